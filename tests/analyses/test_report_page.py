from __future__ import annotations

from typing import TYPE_CHECKING

from analyses import report_page
from tests.report.browser import need_browser

if TYPE_CHECKING:
    from pathlib import Path


def test_the_recipe_from_end_to_end(tmp_path: Path) -> None:
    need_browser()
    small = ["--steps", "4", "--batch-size", "4", "--examples", "9", "--held-out", "6"]
    options = ["--methods", "LoRA", "--seeds", "1", "--device", "cpu", "--out", str(tmp_path)]
    report_page.main([*small, *options])
    assert (tmp_path / "figures" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "report" / "report.html").stat().st_size > 1_000_000
    assert (tmp_path / "runs/report/LoRA-seed0/units/step-4.safetensors").exists()
