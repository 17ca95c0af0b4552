"""What is told of the study: true of its results, in commands and pictures that there are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from analyses import _findings, _stored, answers, full_study, heads_and_norms, reproduce

if TYPE_CHECKING:
    import pandas as pd
    import pytest


def test_the_full_setting_is_made_of_commands_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_study.main(["--list", "--data", "D", "--minilm", "M"])
    lines = capsys.readouterr().out.splitlines()
    recipes = {line.split()[2].removeprefix("analyses.") for line in lines}
    speed = {"observer_cost", "performance", "adapter_cost", "growth"}
    assert recipes == {entry.name for entry in answers.ENTRIES} | {"pretrain"} | speed

    def settings(line: str) -> frozenset[str]:
        """A command without the places on a machine, which options may name in any order."""
        words = re.sub(r"--(data|model|out|workers) \S+", "", line).split(" --")
        return frozenset(word.strip() for word in words)

    told = [entry.command for entry in answers.ENTRIES]
    told += [command for entry in answers.ENTRIES for *_, command in entry.more]
    assert {settings(command) for command in told} <= {settings(line) for line in lines}


def test_without_decay_adam_is_counted_once() -> None:
    found = _findings.signs()
    without = found[found["decay"] == "no decay"]
    assert not without.duplicated(["method", "role", "level", "pearson", "slope"]).any()
    with_decay = found[found["decay"] != "no decay"]
    assert set(with_decay["setting"]) - set(without["setting"]) == {"Adam, decay in the gradient"}


def test_the_gallery_names_every_recipe_that_writes_results() -> None:
    gallery = (answers.ROOT / "figures/README.md").read_text(encoding="utf-8")
    writing = {
        path.stem
        for path in (answers.ROOT / "analyses").glob("[!_]*.py")
        if re.search(
            r"to_csv\(|tables\.write\(|write_(tables|about)\(", path.read_text(encoding="utf-8")
        )
    }
    assert len(writing) > 20
    assert not {name for name in writing if f"analyses.{name}" not in gallery}
    pictures = {path.name for path in (answers.ROOT / "figures").glob("*.png")}
    assert len(pictures) > 15
    assert not {name for name in pictures if f"({name})" not in gallery}


def test_the_answers_are_those_of_the_results() -> None:
    assert (answers.ROOT / "analyses/README.md").read_text(encoding="utf-8") == answers.readme()
    gallery = (answers.ROOT / "figures/README.md").read_text(encoding="utf-8")
    assert answers.gallery(gallery) == gallery
    assert all(
        (answers.ROOT / "figures" / f"{entry.figure or entry.name}.png").exists()
        for entry in answers.ENTRIES
    )


def sure_signs(table: pd.DataFrame, *by: str) -> dict[tuple[str, ...], int]:
    """The sign of r where its whole interval has it, else 0."""
    low, high = table["pearson_low"], table["pearson_high"]
    signs = np.where(low * high > 0, np.sign(low), 0).astype(int)
    keys = (tuple(map(str, key)) for key in table[list(by)].itertuples(index=False))
    return dict(zip(keys, signs.tolist(), strict=True))


def test_the_words_of_the_answers_are_true_of_the_tables() -> None:
    """What the sentences say in words that no number fills in: new results are to be read anew."""
    table = _stored.table
    claimed = reproduce.CLAIMED

    found = table("weight_decay")
    most = found[~found["signed"] & (found["total"] == 0.1)]
    units = sure_signs(most[most["level"] == "units"], "method", "role")
    assert all(units[key] == claimed[key[0]] for key in units)
    relative = table("weight_decay_relative")
    left = sure_signs(relative[relative["total"] == 0.1], "method", "role")
    assert {key for key in left if left[key] < 0} == {("FT", "value")}
    points = table("weight_decay_prediction")
    alone = points[points["total"] == 0].groupby("method")[["measured", "predicted"]].mean()
    assert abs(alone.loc["LoRA", "measured"] / alone.loc["LoRA", "predicted"] - 1) < 0.1
    assert alone.loc["DoRA", "measured"] < 0.2 * alone.loc["DoRA", "predicted"]

    found = table("decay_placement")
    units = found[~found["signed"] & (found["level"] == "units") & (found["total"] == 0.1)]
    signs = sure_signs(units, "decay_on", "role")
    for role in ("query", "value"):
        assert signs["all", role] == signs["magnitude", role] == -1
        assert signs["factors", role] >= 0

    geometry = table("update_geometry")
    others = geometry[(geometry["method"] != "LoRA") & (geometry["source"] != "paper")]
    assert (others["r_squared"] < 0).all()
    gradient = table("gradient_geometry")
    assert gradient["participation_gain"].abs().max() < 0.01
    assert (gradient["r_equal_length"] < 0).all()
    assert (gradient["r_actual_length"] > 0).all()

    told = re.findall(r"(?:FT|LoRA|DoRA) (\d+) of (\d+), surely", _findings.when())
    assert len(told) == 3
    assert all(right == cells for right, cells in told)
    signs_with_decay = _findings.signs().query('decay == "paper\'s decay"')
    for setting in ("Adam, decay in the gradient", "SGD with momentum"):
        r = signs_with_decay[signs_with_decay["setting"] == setting].groupby("method")["pearson"]
        assert r.max()["FT"] < 0 < r.max()["DoRA"]

    zoo = table("adapter_zoo_answer").set_index("measure").loc["distance"]
    assert -0.55 < zoo["low"] < 0 < zoo["high"] < 0.55
    heads = table("heads_and_norms")
    inside = sure_signs(heads[heads["scope"] == heads_and_norms.INSIDE], "method", "part")
    assert all(inside[key] == claimed[key[0]] for key in inside)
    norms = sure_signs(heads[heads["part"] == "norms"], "method", "part")
    assert norms != {key: claimed[key[0]] for key in norms}
    assert table("rank_halved").set_index("scope").loc["all ranks × 1", "high"] < 0
