"""Run where only the core is installed: it imports, trains, records, measures, draws, and says so.

Not a pytest file: `.ci/run` runs it in an environment without any extra.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("error")

EXTRAS = ("transformers", "peft", "accelerate", "lightning", "sklearn", "numba", "bokeh", "pytest")


def main() -> None:
    """Train a small network three ways with nothing but the core."""
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        raise SystemExit(f"this environment holds more than the core: {present}")
    import torch
    from torch import nn

    import dora_dynamics as dd

    for name in dd.__all__:
        getattr(dd, name)
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for method in ("FT", "LoRA", "DoRA"):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 9)) for _ in "abcd"]
            model = nn.Sequential(*blocks)
            if method != "FT":
                apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
                apply(model, ["*.0", "*.2"], rank=3)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2)
            runs.append(str(Path(folder) / method))
            recorder = dd.Recorder(model, ["*.0", "*.2"], every=5, run_dir=runs[-1])
            with recorder.attach(optimizer):
                for _ in range(20):
                    loss = model(torch.randn(16, 9)).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        table = dd.load_runs(runs)
        found = dd.coupling(table, by="method", level="within_step")
        assert found["pearson"].notna().all(), found
        dd.plotting.magnitude_direction(table)
        for command in (["runs"], ["coupling"], ["plot", "--out", f"{folder}/figure.svg"]):
            subprocess.run(
                [sys.executable, "-m", "dora_dynamics", command[0], *runs, *command[1:]],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        refused = subprocess.run(
            [sys.executable, "-m", "dora_dynamics", "report", *runs, "--out", f"{folder}/r.html"],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert refused.returncode == 2
        assert "pip install 'dora-dynamics[report]'" in refused.stderr
        assert Path(folder, "figure.svg").stat().st_size > 10_000
    print("the core works alone")


if __name__ == "__main__":
    main()
