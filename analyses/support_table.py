"""Run: `python -m analyses.support_table` (half a minute; needs peft).

How the effective weight of every PEFT method is read, in the variants that tests/effective builds.
Writes peft_support.csv; `table()` is the same in Markdown, for README.md.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS: Final = Path(__file__).parent / "results"
NAME: Final = "peft_support.csv"
_ACRONYMS: Final = {"CPT": "CPT", "SHADOW": "ShadowPEFT", "XLORA": "X-LoRA", "P_TUNING": "P-tuning"}


def rows() -> pd.DataFrame:
    """One row for each method and variant: its name, how it is read, or why it is refused."""
    from dora_dynamics.effective.peft_layers import method_name

    found = []
    for kind, case in all_cases():
        model = case.build()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with warnings.catch_warnings():  # what PEFT says about its own settings
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
            model = case.adapt(model)
            layers = _layers(model, case)
            read, why, needs = _reading(model, layers, before)
        name = method_name(next(iter(layers.values()))) if layers else _ACRONYMS.get(kind.value)
        method = {"DoRA": "LoRA"}.get(name or "", name) or kind.value.replace("_", " ").lower()
        found.append((kind.value, method, case.name, read, needs, why))
    return pd.DataFrame(found, columns=["type", "method", "variant", "read", "baseline", "why"])


def all_cases() -> list[tuple[Any, Any]]:
    """What the tests build: every method of PEFT's registry, and QALoRA."""
    cases = importlib.import_module("tests.effective.peft_cases")
    found: list[tuple[Any, Any]] = cases.all_cases()
    found.append((next(kind for kind, _ in found if kind.value == "LORA"), cases.QALORA))
    return sorted(found, key=lambda item: (item[0].value != "LORA", item[0].value))


def table(support: pd.DataFrame | None = None) -> str:
    """The rows as a Markdown table, one line for each method and way of reading."""
    support = pd.read_csv(RESULTS / NAME, keep_default_na=False) if support is None else support
    lines = ["| PEFT method | variants tested | effective weight |", "|---|---|---|"]
    groups = support.groupby(["method", "read", "baseline", "why"], sort=False)
    for key, group in groups:
        method, read, baseline, why = (str(part) for part in key)
        variants = ", ".join(v for v in group["variant"] if v != "plain") or "–"
        how = f"refused: {why}" if why else f"{read}{'; ' + baseline if baseline else ''}"
        lines.append(f"| {method} | {variants} | {how} |")
    return "\n".join(lines)


def _layers(model: Any, case: Any) -> dict[str, Any]:
    from dora_dynamics.effective.peft_layers import is_tuner_layer, resolved

    found = {}
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        if name.split(".")[-1] in case.followed and is_tuner_layer(resolved(module)):
            found[name] = resolved(module)
    return found


def _reading(
    model: Any, layers: dict[str, Any], before: dict[str, torch.Tensor]
) -> tuple[str, str, str]:
    from dora_dynamics.effective import NoDenseWeightError
    from dora_dynamics.effective.peft_layers import refuse_model
    from dora_dynamics.effective.peft_weights import how_read

    try:
        refuse_model(model)
        ways = sorted({how_read(layer) for layer in layers.values()})
    except NoDenseWeightError as error:
        return "", str(error).partition(": ")[2].rstrip("."), ""
    kept = all(
        torch.equal(layer.get_base_layer().state_dict()[part], before[f"{name}.{part}"])
        for name, layer in layers.items()
        for part in ("weight", "qweight")
        if f"{name}.{part}" in before
    )
    return ", ".join(ways), "", "" if kept else "`baseline=` needed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    support = rows()
    support.to_csv(options.out / NAME, index=False, lineterminator="\n")
    print(table(support))


if __name__ == "__main__":
    main()
