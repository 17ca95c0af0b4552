"""Which run directories the paths on a command line stand for, and which are too much to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_MOST_GROUPS: Final = 300


def named_runs(paths: tuple[str, ...]) -> list[str]:
    """The folders that were named; a folder that holds runs stands for them, a glob likewise.

    A file that lies beside a run that is named too, as a shell's `runs/*` gives it, is left out.

    Raises:
        InputError: a path is none that a folder can have.
    """
    from glob import glob
    from pathlib import Path

    from dora_dynamics.runs.directory import RUN_FILE

    found: list[str] = []
    for path in paths:
        try:
            matches = sorted(glob(path)) if not Path(path).exists() else [path]  # noqa: PTH207
            for match in matches or [path]:
                inner = sorted(str(file.parent) for file in Path(match).glob(f"*/{RUN_FILE}"))
                is_run = (Path(match) / RUN_FILE).exists()
                found += [match] if is_run or not inner else inner
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path[:80]!r} is not a usable path: {reason}.") from error
    beside = {Path(run).parent for run in found if (Path(run) / RUN_FILE).exists()}
    return [
        path
        for path in dict.fromkeys(found)
        if not (Path(path).is_file() and Path(path).parent in beside)
    ]


def refuse_many_groups(table: pd.DataFrame, by: list[str]) -> None:
    """Refuse a table whose statistics by these columns would take hours.

    Raises:
        InputError: it has hundreds of groups.
    """
    groups = len(table[by].drop_duplicates())
    if groups > _MOST_GROUPS:
        raise InputError(
            f"the rows fall into {groups:,} groups by {', '.join(by)}, more than the "
            f"{_MOST_GROUPS} that are correlated at once: use dd.coupling on a part of the table."
        )
