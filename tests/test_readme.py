"""The examples in README.md, run as they stand.

A ```python block is run if an HTML comment that begins with `test` stands before it. What follows
in the comment is code to run first, which readers do not see; on its first line may stand
`needs=a,b`, the packages without which the example is skipped. Each example runs in an empty
folder; the run directories that it leaves in `runs/` must hold weights that changed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import dora_dynamics as dd
from tests.conftest import PATIENCE

README = Path(__file__).parent.parent / "README.md"
_EXAMPLE = re.compile(
    r"<!--[ \t]*test\b(?P<options>[^\n]*?)(?:\n(?P<setup>.*?))?-->\s*"
    r"```python\n(?P<code>.*?)^[ \t]*```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Example:
    """A block of code, the hidden code before it, what it needs, and the line it starts at."""

    code: str
    setup: str
    needs: tuple[str, ...]
    line: int
    setup_line: int


def examples(text: str) -> list[Example]:
    """The examples of a page that are marked as tests."""
    found = []
    for match in _EXAMPLE.finditer(text):
        needs = re.search(r"needs=([\w.,-]+)", match["options"])
        found.append(
            Example(
                code=textwrap.dedent(match["code"]),
                setup=textwrap.dedent(match["setup"] or ""),
                needs=tuple(needs[1].split(",")) if needs else (),
                line=text.count("\n", 0, match.start("code")) + 1,
                setup_line=text.count("\n", 0, match.start("setup")) + 1 if match["setup"] else 0,
            )
        )
    return found


def run(example: Example, where: object) -> None:
    """Run an example; errors point at the lines of the page."""
    names: dict[str, object] = {"__name__": "__main__"}
    for code, line in ((example.setup, example.setup_line), (example.code, example.line)):
        exec(compile("\n" * (line - 1) + code, str(where), "exec"), names)


def run_apart(example: Example, where: object) -> None:
    """Run an example in a process of its own: the threads of process groups end with it alone.

    Forking costs nothing, but CUDA and autograd do not survive it where there is a GPU.
    """
    start: Any = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "fork")
    process = start.Process(target=run_and_exit, args=(example, where, Path.cwd()))
    with pytest.MonkeyPatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, "the example failed; its traceback is printed"


def run_and_exit(example: Example, where: object, folder: Path) -> NoReturn:
    """All that a process does for an example."""
    os.chdir(folder)
    try:
        run(example, where)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _of_readme() -> list[Example]:
    return examples(README.read_text(encoding="utf-8")) if README.exists() else []


@pytest.mark.parametrize("example", [pytest.param(e, id=f"line {e.line}") for e in _of_readme()])
def test_example(
    example: Example,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in example.needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (run_apart if "init_process_group" in example.setup else run)(example, README)
    if "dd.diagnose(" in example.code:  # numbers differ between machines, the verdict does not
        verdict = capsys.readouterr().out.splitlines()[0]
        assert f"```text\n{verdict}\n" in README.read_text(encoding="utf-8")
    for folder in (tmp_path / "runs").glob("*"):
        table = dd.load_runs(folder)
        assert table["step"].nunique() > 1
        assert table.query("step > 0")["update_norm"].gt(0).any()


class TestReader:
    """The reader of examples itself, so that none is left out in silence."""

    PAGE = textwrap.dedent("""\
        text
        <!-- test needs=numpy,torch
        a = 1
        -->
        ```python
        b = a + 1
        ```
        ```python
        not_run = 1 / 0
        ```
        <!-- a remark -->
        ```python
        not_run = 1 / 0
        ```
        <!-- test -->

        ```python
        raise KeyError("line 18")
        ```
        """)

    def test_marked_blocks_are_found(self) -> None:
        first, second = examples(self.PAGE)
        assert (first.setup, first.code) == ("a = 1\n", "b = a + 1\n")
        assert first.needs == ("numpy", "torch")
        assert (second.setup, second.needs) == ("", ())

    def test_errors_point_at_the_page(self) -> None:
        first, second = examples(self.PAGE)
        run(first, "page.md")
        with pytest.raises(KeyError) as caught:
            run(second, "page.md")
        last = caught.traceback[-1]
        assert (Path(last.path).name, last.lineno + 1) == ("page.md", 18)

    def test_every_mark_in_the_readme_is_an_example(self) -> None:
        if README.exists():
            text = README.read_text(encoding="utf-8")
            assert len(re.findall(r"<!--[ \t]*test\b", text)) == len(_of_readme())

    def test_each_kind_of_loop_has_an_example(self) -> None:
        text = README.read_text(encoding="utf-8")
        section = text.partition("## In your training loop\n")[2].partition("\n## ")[0]
        codes = [example.code for example in examples(section)]
        for loop in (
            "recorder.attach(optimizer)",
            "integrations.transformers import RecorderCallback",
            "integrations.lightning import RecorderCallback",
            "accelerator.prepare(",
            "resume=",
        ):
            assert sum(loop in code for code in codes) >= 1, loop
