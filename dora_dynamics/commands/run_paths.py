"""Which run directories the paths on a command line stand for."""

from __future__ import annotations


def named_runs(paths: tuple[str, ...]) -> list[str]:
    """The folders that were named; a folder that holds runs stands for them, a glob likewise."""
    from glob import glob
    from pathlib import Path

    from dora_dynamics.run_directory import RUN_FILE

    found: list[str] = []
    for path in paths:
        matches = sorted(glob(path)) if not Path(path).exists() else [path]  # noqa: PTH207
        for match in matches or [path]:
            inner = sorted(str(file.parent) for file in Path(match).glob(f"*/{RUN_FILE}"))
            is_run = (Path(match) / RUN_FILE).exists()
            found += [match] if is_run or not inner else inner
    return list(dict.fromkeys(found))
