"""The tables of README.md's "How fast", from the result files of the recipes that measure speed.

Each part reads the tables of all machines that are stored; where there are none it says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from analyses import _tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULTS: Final = Path(__file__).parent / "results"
WHOLE: Final = "LLaMA-7B, bf16"
"""The whole model, of which the ratios below are asked, whatever the rank."""
OVER_FLOAT64: Final = 25.0
"""Times the naive way in float64 that the whole model in one go is to be faster."""
OVER_BUILT: Final = 5.0
"""Times that a low-rank change is to be measured faster than by building W', on a GPU."""
PAPER_SAVINGS: Final = {"LLaMA-7B": -0.244, "VL-BART": -0.124}
"""What the detached norm saves of the memory of training, by Sec. 4.3 of the paper."""
STRAIGHT: Final = 0.995
"""R² from which growth is called a straight line."""
GROWTHS: Final = {
    "parameters": "parameters",
    "sites": "weights",
    "rank": "rank",
    "steps": "recorded steps",
}


def block(results: Path = RESULTS) -> str:
    """All tables of the section."""
    parts = (kernels, low_rank, observer, adapters, merged, growth)
    return "\n\n".join(part(results) for part in parts)


def kernels(results: Path) -> str:
    """Dense weights: the fraction of bandwidth, and the ratio to both naive ways."""
    title = "**Reading weights** (`python -m analyses.performance`)"
    table = stored("performance", results)
    if table.empty:
        return missing(title)
    ours = table[(table["rank"] == 0) & ~table["path"].str.startswith(("naive", "copy", "read"))]
    chosen = ours[ours["target"].notna()]
    missed = [
        f"{row['case']} with {row['path']} on {row['device']} ({row['fraction']:.2f})"
        for row in records(chosen[chosen["fraction"] < chosen["target"]])
    ]
    whole = chosen[(chosen["case"] == WHOLE) & (chosen["path"] == "triton")]
    missed += [
        f"{row['case']} on {row['device']} ({row['times_naive_float64']:.1f} times naive in "
        f"float64, asked for {OVER_FLOAT64:.0f})"
        for row in records(whole[whole["times_naive_float64"] < OVER_FLOAT64])
    ]
    narrow = ours[ours["case"].str.match(r"(384×384|768×768)")]
    missed += [
        f"{row['case']} with {row['path']} on {row['device']} ({row['times_naive']:.2f} times "
        "naive, asked for 1)"
        for row in records(narrow[narrow["times_naive"] < 1])
    ]
    in_full = ours[ours["path"] == "triton, to host"].set_index(["device", "case"])
    beside = in_full["times_naive_float64"].map(ratio)
    rows = [
        [
            *(row["device"], row["case"], row["path"], f"{row['fraction']:.2f}"),
            "" if pd.isna(row["target"]) else f"{row['target']:.2f}",
            *(ratio(row["times_naive"]), ratio(row["times_naive_float64"])),
            beside.get((row["device"], row["case"]), ""),
        ]
        for row in records(pd.concat([chosen, narrow]).sort_index())
    ]
    heads = ["device", "weights", "path", "of bandwidth", "asked for", "× naive"]
    heads += ["× naive in float64", "the same, to host"]
    slower = [
        f"{row['case']} on {row['device']} ({row['times_naive_float64']:.0f})"
        for row in records(ours[(ours["case"] == WHOLE) & (ours["path"] == "triton, to host")])
        if row["times_naive_float64"] < OVER_FLOAT64
    ]
    said = (
        f"Asked for, by a GPU's own time: these fractions; of the whole model {OVER_FLOAT64:.0f} "
    )
    said += "times naive in float64; on a CPU never slower than naive. "
    return "\n\n".join([title, markdown(heads, rows), said + misses(missed) + to_host(slower)])


def low_rank(results: Path) -> str:
    """Low-rank changes: the ratio to building W' first, and the memory of both."""
    title = "**LoRA and DoRA without building W'** (the same command)"
    table = stored("performance", results)
    if table.empty or not (table["path"] == "low rank").any():
        return missing(title)
    rows, missed, slower = [], list[str](), list[str]()
    for (device, case), group in groups(table[table["rank"] > 0], "device", "case"):
        ways = {row["path"]: row for row in group}
        found = ways["low rank"]
        names = ["built, then triton", "naive", "naive, float64"]
        times = {n: ways[n]["median_ms"] / found["median_ms"] for n in names if n in ways}
        fastest = min(times.values())
        in_full = ways.get("low rank, to host")
        to_end = fastest * found["median_ms"] / in_full["median_ms"] if in_full else None
        if case.startswith(WHOLE) and not device.startswith("CPU"):
            if fastest < OVER_BUILT:
                missed.append(f"{case} on {device} ({fastest:.1f})")
            if to_end is not None and to_end < OVER_BUILT:
                slower.append(f"{case} on {device} ({to_end:.1f})")
        built = min(ways[name]["extra_mb"] for name in times)
        if found["extra_mb"] > built:
            missed.append(f"{case} on {device} (more memory)")
        memory = ["" if pd.isna(mb) else f"{mb:.0f}" for mb in (found["extra_mb"], built)]
        beside = [ratio(times[n]) if n in times else "" for n in names]
        rows.append([device, case, *beside, "" if to_end is None else ratio(to_end), *memory])
    heads = ["device", "weights", "× built, our kernel", "× built, naive"]
    heads += ["× built, naive in float64", "the least, to host", "MB more", "MB more, built"]
    said = (
        f"Asked for: of the whole model, by a GPU's own time, {OVER_BUILT:.0f} times the fastest "
    )
    said += "way that builds W'; and everywhere less memory. "
    return "\n\n".join([title, markdown(heads, rows), said + misses(missed) + to_host(slower)])


def observer(results: Path) -> str:
    """What recording costs the training."""
    title = "**Recording every linear weight** (`python -m analyses.observer_cost`)"
    table = stored("observer_cost", results)
    if table.empty:
        return missing(title)
    rows, missed = [], []
    for row in records(table):
        name = f"{row['model']}, {row['batch']}×{row['sequence']}"
        place = _tables.PLACES[row["place"]]
        memory = f"{row['copied_mb']:.0f}" + (
            f" ({row['mapped_mb']:.0f} mapped)" if row["mapped_mb"] else ""
        )
        share = f"{percent(row['share'])} [{percent(row['share_low'])}, "
        share += f"{percent(row['share_high'])}]"
        asked = "" if pd.isna(row["target"]) else percent(row["target"])
        rows.append(
            [
                *(row["device"], name, row["method"], place, share, asked),
                *(f"{100 * row['share_every_100']:.2g}%", memory),
            ]
        )
        if row["share"] > row["target"]:
            missed.append(f"{name} on {row['device']} ({percent(row['share'])})")
        if pd.notna(row["target"]) and row["share_every_100"] > 0.001:
            missed.append(
                f"{name} on {row['device']}, every 100th step "
                f"({100 * row['share_every_100']:.2g}%, asked for 0.1%)"
            )
    heads = ["device", "model", "training", "W₀", "of a step's time", "asked for"]
    heads += ["every 100th step", "MB copied"]
    small = "A step of 1×512 tokens is so small that the GPU waits for the host, from which "
    small += "recording takes time. " if (table["batch"] == 1).any() else ""
    return "\n\n".join([title, markdown(heads, rows), small + misses(missed)])


def adapters(results: Path) -> str:
    """What adapters cost while they train, ours beside PEFT's, and what detaching saves."""
    title = "**Adapters while they train** (`python -m analyses.adapter_cost`)"
    table = stored("adapter_cost", results)
    if table.empty:
        return missing(title)
    rows, savings, missed, beside = [], [], [], []
    trained = table[~table["merged"] & (table["by"] != "original")]
    for (device, model), group in groups(trained, "device", "model"):
        on_gpu = all(pd.notna(row["peak_mb"]) for row in group)
        memory = "peak_mb" if on_gpu else "kept_mb"
        for row in group:
            held = f"{row[memory]:.0f}" + ("" if on_gpu else " (kept for backward)")
            times = [f"{row[name]:.1f}" for name in ("forward_ms", "backward_ms")]
            rows.append([device, model, row["variant"], *times, held])
        ways = {row["variant"]: row for row in group}
        detached, exact = ways["DoRA detached, ours"], ways["DoRA exact, ours"]
        saved = [detached[name] / exact[name] - 1 for name in (memory, "backward_ms")]
        savings.append(
            f"{'peak' if on_gpu else 'kept'} memory by {signed(saved[0])} and backward's time by "
            f"{signed(saved[1])} ({model}, {device})"
        )
        for method in ("LoRA", "DoRA detached"):
            ours, peft = ways[f"{method}, ours"], ways.get(f"{method}, PEFT")
            if peft is not None:
                time, other = (w["forward_ms"] + w["backward_ms"] for w in (ours, peft))
                beside.append(
                    f"{method} {time / other:.2f} of the time and "
                    f"{ours[memory] / peft[memory]:.2f} of the memory ({model}, {device})"
                )
        if saved[0] > max(PAPER_SAVINGS.values()):
            missed.append(f"{model} on {device}")
    paper = " and ".join(f"{signed(saving)} ({name})" for name, saving in PAPER_SAVINGS.items())
    said = f"Of PEFT's, ours take: {'; '.join(beside)}. " if beside else ""
    said += f"Detaching the norm changes {'; '.join(savings)}. The paper reports {paper} of memory"
    said += f": not reached for {'; '.join(missed)}." if missed else "."
    heads = ["device", "model", "adapter", "forward, ms", "backward, ms", "peak MB"]
    return "\n\n".join([title, markdown(heads, rows), said])


def merged(results: Path) -> str:
    """Latency after merging, over the original model's."""
    title = "**Merged** (the same command)"
    table = stored("adapter_cost", results)
    if table.empty:
        return missing(title)
    rows, missed = [], []
    for (device, model), group in groups(table, "device", "model"):
        again = [row for row in group if row["variant"].startswith("original again")]
        low = min([1.0, *(row["ratio_low"] for row in again)])
        high = max([1.0, *(row["ratio_high"] for row in again)])
        for row in [*again, *(row for row in group if row["merged"])]:
            ratio, ends = row["latency_ratio"], (row["ratio_low"], row["ratio_high"])
            by = f"merged by {row['by']}" if row["merged"] else "the original, made again"
            rows.append([device, model, by, f"{ratio:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"])
            if row["by"] == "ours" and not (ends[0] <= high and low <= ends[1]):
                missed.append(f"{model} on {device} ({ratio:.3f})")
    said = (
        "Asked for: the original's within noise: quartiles that meet 1, or those of the same model "
    )
    said += "made again, whose memory lies elsewhere. " + misses(missed)
    heads = ["device", "model", "which", "latency / original [quartiles]"]
    return "\n\n".join([title, markdown(heads, rows), said])


def growth(results: Path) -> str:
    """How time grows: how straight the line, and the exponent of a power law."""
    title = "**Growth** (`python -m analyses.growth`)"
    table = stored("growth", results)
    if table.empty:
        return missing(title)
    rows, missed, bent = [], list[str](), list[str]()
    on_gpu = set(table[table["clock"] == "behind"]["device"])
    for (device, kind, clock), group in groups(table, "device", "growth", "clock"):
        first, sizes = group[0], [row["size"] for row in group]
        straight, exponent = first["r_squared"], first["exponent"]
        ends = f"{min(sizes):,} to {max(sizes):,}"
        rows.append([device, GROWTHS[kind], clock, ends, f"{straight:.4f}", f"{exponent:.2f}"])
        if straight < STRAIGHT:
            hidden = clock == "alone" and device in on_gpu and kind != "steps"
            (bent if hidden else missed).append(f"{GROWTHS[kind]} on {device} ({straight:.3f})")
    said = f"Asked for: straight lines, R² at least {STRAIGHT}, on a GPU of its own time: of work "
    said += f"that is queued behind other work, as in training. {misses(missed)} "
    said += "A call alone takes what the longer of the two takes, the host to queue it or the GPU "
    said += "to read: level first, then straight"
    said += f" (R² below that for {', '.join(bent)}). " if bent else ". "
    said += "The exponent is of the sizes from a tenth of the largest on: below 1 where a fixed "
    said += "cost still counts."
    heads = ["device", "time against", "clock", "from, to", "R² of a straight line", "exponent"]
    return "\n\n".join([title, markdown(heads, rows), said])


def stored(name: str, results: Path) -> pd.DataFrame:
    """The tables of a recipe of all machines, one below the other, `device` short for the machine.

    Empty where there are none.
    """
    files = sorted(results.glob(f"{name}_*.csv"))
    if not files:
        return pd.DataFrame()
    tables = []
    for file in files:
        table = pd.read_csv(file)
        on_cpu = file.stem.startswith(f"{name}_cpu")
        pattern = r"(\d+ cores)" if on_cpu else r"NVIDIA (\w+)"
        device = ("CPU, " if on_cpu else "") + table["machine"].str.extract(pattern, expand=False)
        tables.append(table.assign(device=device))
    return pd.concat(tables, ignore_index=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, by column."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def groups(table: pd.DataFrame, *by: str) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Rows that agree in columns of text, in the table's order: what they agree in, and them."""
    for keys, group in table.groupby([*by], sort=False):
        yield [str(key) for key in keys], records(group)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_host(slower: Sequence[str]) -> str:
    """What would miss it if the host's work were counted, in a sentence."""
    return f" To host it is less than that for {'; '.join(slower)}." if slower else ""


def misses(missed: Sequence[str]) -> str:
    """What misses what was asked for, in a sentence."""
    return f"Misses: {'; '.join(missed)}." if missed else "Nothing here misses what was asked for."


def missing(title: str) -> str:
    """That there is no table yet."""
    return f"{title}: not measured yet."


def ratio(times: float) -> str:
    """A ratio: to a tenth below 10, in full above."""
    return f"{times:.0f}" if times >= 10 else f"{times:.1f}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}%"


def signed(share: float) -> str:
    """A change in percent, with its sign; none that rounds to zero."""
    text = f"{100 * share:+.1f}%".replace("-", "−")
    return text[1:] if text in ("+0.0%", "−0.0%") else text
