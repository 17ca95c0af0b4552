"""What strangers do to files, by accident or on purpose; and how a command has to take it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
from click.testing import CliRunner

from dora_dynamics.cli import main
from dora_dynamics.trajectory import COLUMNS

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

NAMES = [
    "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "'", "", " ", "None", "nan", "_hidden",
    "</script><xss onxss=1>", '"><xss onxss="1">', "<!--<script>", "]]>", "&lt;", "{{ 7 * 7 }}",
    "$\\frac{$", "$x$", "$$", "\\", "%s%n", "{0}", "\x1b[2J", "\x07", "a\nb", "a\rb", "a\u2028b",
    "\u202eevil", "e\u0301", "名前", "\U0001f9ea", "\x00", "../../etc/passwd", "a" * 3000,
    "🧪" * 500,
]  # fmt: skip
"""Text that a spreadsheet, a browser, a terminal, a template or a figure could take for more."""

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 1e308, -0.0, 2**31, 2**53 + 1, 2**64, 10**400, "", "x", "1",
    "NaN", [], [[]], {}, {"": ""}, [None], [-1], [1e9], {"a": [1, {"b": None}]}, "\udc80",
]  # fmt: skip
"""Values of JSON where others belong."""


class HangError(BaseException):
    """A file kept a command busy for longer than any honest one would; nothing catches it."""


@contextmanager
def soon(seconds: int = 60) -> Iterator[None]:
    """Refuse to wait."""

    def stop(*_: object) -> None:
        raise HangError(f"a bad file took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def answer(*arguments: object) -> str | None:
    """What a command prints, or None where it refused its files in one sentence.

    Anything else (a traceback, a hang, an answer of many lines, what commands a terminal) fails.
    """
    with soon():
        done = CliRunner().invoke(main, [str(part) for part in arguments], color=True)
    told = f"{arguments}: {done.exit_code} {done.output[-3000:]!r}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(told) from done.exception
    assert not any(c < " " and c != "\n" for c in done.output), told
    if done.exit_code == 0:
        return str(done.stdout)
    assert done.exit_code == 2, told
    assert done.output.startswith(("Error: ", "Usage: ")), told
    assert 20 < len(done.output) < 3000, told
    assert done.output.count("\n") == 1 or done.output.startswith("Usage: "), told
    return None


def damaged(content: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """A file after one to four accidents or attacks, mostly within its first `head` bytes."""
    data = bytearray(content)
    words = [b"nan", b"inf", b"-1", b"1e999", b"=cmd()", b'"', b"\0", b"\n", b",", b"\xff", b"\r",
             b"\x1b[2J", b"9" * 400, b"[" * 9000, b"../../etc/passwd", b"null", b"{}",
             b"\xff" * 8, b"\0" * 8, b"99999999", b'"a":"b",']  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 4))):
        reach = len(data) if head is None or rng.random() < 0.1 else min(head, len(data))
        at = rng.randrange(reach + 1)
        kind = rng.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.choice((1, 8, 300))]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((32, 300))]
        elif kind == 4:
            data[at:at] = rng.choice(words)
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 64)))
        else:
            end = min((i for i in (data.find(c, at) for c in b',":\n') if i >= 0), default=at)
            data[at:end] = rng.choice(words)
    return bytes(data)


def other_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file in which one value is another, or that JSON's readers differ about."""
    document = json.loads(content)
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" \n" * 99, b"//\n")) + content
    if kind == 1:
        return content.decode().encode(rng.choice(("utf-16", "utf-32", "utf-16-le")))
    if kind == 2:  # one key twice
        key = rng.choice(list(document))
        again = json.dumps({key: rng.choice(VALUES)}).encode()[1:-1]
        return content.rstrip()[:-1] + b", " + again + b"}"
    if kind == 3:
        deep = rng.choice((b"[" * 99_999, b'{"a":' * 99_999, b"[" * 500 + b"]" * 500))
        return content.rstrip()[:-1] + b', "extra": ' + deep + b"}"
    if kind == 4:
        word = rng.choice((b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000))
        return content.rstrip()[:-1] + b', "extra": ' + word + b"}"
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if kind == 5:
            del place[key]
        elif kind == 6:
            place[key] = rng.choice(NAMES)
        else:
            place[key] = rng.choice(VALUES)
        return json.dumps(document).encode()


def other_table(content: bytes, rng: random.Random) -> bytes:
    """A `trajectory.csv` with cells, rows or columns that are others than they were."""
    lines = list(csv.reader(io.StringIO(content.decode(), newline="")))
    header, rows = lines[0], lines[1:]
    kind, at = rng.randrange(12), rng.randrange(len(rows))
    column = rng.randrange(len(header))
    if kind <= 3:
        cells = ["", "nan", "inf", "-inf", "1e999", "-0.0", "5e-324", "1e308", "1_0", "0x1", "٣",
                 "1.5", "-2", "3", "2.0", "1e3", "9" * 30, *NAMES]  # fmt: skip
        rows[at][column] = rng.choice(cells)
    elif kind == 4:
        rows.insert(at, list(rng.choice(rows)))
    elif kind == 5:
        del rows[at : at + rng.choice((1, 3, len(rows)))]
    elif kind == 6:
        rng.shuffle(rows)
    elif kind == 7:  # columns in another order are the same table
        order = rng.sample(range(len(header)), len(header))
        header, rows = [header[i] for i in order], [[row[i] for i in order] for row in rows]
    elif kind == 8:
        header = [*header, rng.choice([*NAMES, header[column]])]
        rows = [[*row, rng.choice(NAMES)] for row in rows]
    elif kind == 9:
        name = header[column]
        header[column] = rng.choice([*NAMES, header[at % len(header)], name.upper(), f"{name} "])
    elif kind == 10:
        rows[at] = rng.choice(([], rows[at][:-1], [*rows[at], ""], [""] * len(header)))
    else:
        del header[column]
        rows = [[cell for i, cell in enumerate(row) if i != column] for row in rows]
    text = io.StringIO(newline="")
    ending = rng.choice(("\n", "\n", "\n", "\r\n"))
    csv.writer(text, lineterminator=ending, quoting=rng.choice((0, 0, 1))).writerows(
        [header, *rows]
    )
    codec = rng.choice(("utf-8",) * 9 + ("utf-8-sig", "utf-16"))
    return text.getvalue().encode(codec)


def renamed_run(run: Path, rng: random.Random) -> None:
    """Give a run names that hurt, in both of its files: valid, and to be shown as text."""
    name, method, role = (rng.choice(NAMES) for _ in range(3))
    file = run / "run.json"
    content = json.loads(file.read_bytes()) | {"run": name, "method": method, "model": name}
    file.write_text(json.dumps(content))
    lines = list(csv.reader(io.StringIO((run / "trajectory.csv").read_text(), newline="")))
    place = {column: i for i, column in enumerate(lines[0])}
    sites = {
        site: f"{site}{rng.choice(NAMES)}" for site in {row[place["site"]] for row in lines[1:]}
    }
    content["sites"] = list(sites.values())
    file.write_text(json.dumps(content))
    for row in lines[1:]:
        row[place["run"]], row[place["method"]] = _cell(name), _cell(method)
        row[place["role"]] = _cell(role)
        row[place["site"]] = _cell(sites[row[place["site"]]])
    with (run / "trajectory.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(lines)


def _cell(name: str) -> str:
    """A name as `trajectory.csv` has it."""
    return f"'{name}" if name.lstrip("'")[:1] in tuple("=+-@\t\r") else name


def misplaced(file: Path, rng: random.Random) -> None:
    """Put something in the file's place that is no file of the folder."""
    content = file.read_bytes()
    file.unlink()
    kind = rng.randrange(9)
    outside = file.parent.parent / f"outside-{file.name}"
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(file.name)
    elif kind == 3:
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif kind == 4:
        file.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd")))
    elif kind == 5:
        file.symlink_to("nowhere")
    elif kind == 6:
        with file.open("wb") as stream:
            stream.write(rng.choice((b"", content)))
            stream.truncate(10 * 10**9)
    elif kind == 7:
        file.write_bytes(b"")
    # else: it is missing


def told_by(table: Path) -> pd.DataFrame | None:
    """What a `trajectory.csv` says, read by other means; None where it is none."""
    kinds = {column.name: column.kind for column in COLUMNS}
    if table.is_symlink() or not table.is_file() or table.stat().st_size > 1 << 24:
        return None
    try:
        content = table.read_bytes()
        complete = content[: content.rindex(b"\n") + 1].decode("utf-8")
        header, *rows = list(csv.reader(io.StringIO(complete, newline=""), strict=True))
        if len(set(header)) < len(header):
            return None
        columns: dict[str, Any] = {}
        for name, kind in kinds.items():
            cells = [row[header.index(name)] for row in rows]
            if kind == "text":
                columns[name] = pd.Series([_uncell(cell) for cell in cells], dtype=object)
            else:
                numbers = pd.Series([float(cell or "nan") for cell in cells], dtype="float64")
                columns[name] = numbers
        found = pd.DataFrame(columns)
        found["step"] = found["step"].astype("int64")
        for name in ("layer", "head"):
            found[name] = found[name].astype("Int64")
        return found
    except (OSError, ValueError, IndexError, OverflowError, csv.Error):
        return None


def _uncell(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'")[:1] in tuple("=+-@\t\r") else cell
