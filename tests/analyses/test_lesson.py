"""The notebook runs from its first cell to its last, and is stored without what it printed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import analyses

NOTEBOOK = Path(analyses.__file__).parent / "lesson.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert cell.metadata == {}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "## Exercises" in prose
    assert "python -m analyses.reproduce" in prose


def test_it_leads_to_the_finding(notebook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORA_DYNAMICS_LESSON", "small")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own libraries
        nbclient = pytest.importorskip("nbclient")
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        )
        done = client.execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    written = "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for output in outputs
    )
    for claim in (
        "without decay all rise",
        "with decay FT falls",
        "with decay DoRA falls",
        "with decay LoRA still rises",
    ):
        assert f"'{claim}': True" in written
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    assert "|m' - m0|  = 0.400" in written
    assert "1 - cos θ  = 0.200" in written
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_outside_a_clone_it_says_where_to_open_it(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="in a clone of dora_dynamics"):
        exec(first, {})
