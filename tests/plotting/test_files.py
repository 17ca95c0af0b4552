from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dora_dynamics.plotting import magnitude_direction, save
from tests.plotting.plotting_tables import trajectory

if TYPE_CHECKING:
    from pathlib import Path


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    formats = ("png", "svg", "pdf")
    first, second = (
        save(
            magnitude_direction(trajectory(["LoRA"], layers=2)), tmp_path / name / "fig.v1", formats
        )
        for name in ("a", "b")
    )
    assert [path.name for path in first] == ["fig.v1.png", "fig.v1.svg", "fig.v1.pdf"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_text_stays_text(tmp_path: Path) -> None:
    (svg,) = save(magnitude_direction(trajectory(["LoRA"], layers=2)), [tmp_path / "figure.svg"])
    written = svg.read_text(encoding="utf-8")
    assert "LoRA, query</text>" in written
    assert "<dc:date>" not in written
    (pdf,) = save(
        magnitude_direction(trajectory(["LoRA"], layers=2)), str(tmp_path / "figure"), ["pdf"]
    )
    assert b"/TrueType" in pdf.read_bytes() or b"/CIDFontType2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()


def test_unknown_formats_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="png, svg or pdf"):
        save(
            magnitude_direction(trajectory(["LoRA"], layers=2)), tmp_path / "figure", ["png", "gif"]
        )
    assert not list(tmp_path.iterdir())
