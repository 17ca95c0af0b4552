"""What came out of the recipes on methods: the zoo, heads and norms, ranks and merging."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analyses._stored import (
    METHODS,
    RESULTS,
    about,
    number,
    one,
    table,
    with_interval,
)


def zoo() -> str:
    """Whether closeness to FT goes with the score."""
    found, said = table("adapter_zoo"), table("adapter_zoo_answer").set_index("measure")
    best = found.sort_values("retrieval", ascending=False)
    jobs = pd.DataFrame(about("adapter_zoo")["jobs"])
    failed = jobs[jobs["error"].notna()] if "error" in jobs else jobs[:0]
    refused = ", ".join(sorted(set(failed["method"])))
    row = said.loc["distance"]
    seen = row["low"] > 0 or row["high"] < 0
    at_best = jobs.merge(found[["method", "rate"]]).groupby("method")["retrieval"]
    seeds = int(at_best.count().min())
    apart = at_best.std().pow(2).mean() ** 0.5
    measures = {
        "r_layers": "r across layers",
        "r_units": "r across units",
        "radial_share": "radial share",
        "log_ratio": "ΔM over ΔD",
    }
    alone = [
        f"{words} (methods with {'more' if said.loc[name, 'rho'] > 0 else 'less'} of it score higher)"
        for name, words in measures.items()
        if said.loc[name, "low"] > 0 or said.loc[name, "high"] < 0
    ]
    excludes = " and ".join(alone) if alone else "none"
    return (
        f"{'There is a relation' if seen else 'No such relation is seen'}: over "
        f"{int(row['methods'])} methods of PEFT, without weight decay, each at the best of four "
        f"learning rates, means of {seeds} seeds, the rank correlation of the "
        "distance from full fine-tuning with the score is "
        f"{with_interval(row, 'rho', 'low', 'high')} (95%, bootstrap over methods"
        f"{'' if seen else ': strong ones are excluded, weak ones are not'}). The four measures by "
        "themselves: "
        + ", ".join(
            f"{words} {with_interval(said.loc[name], 'rho', 'low', 'high')}"
            for name, words in measures.items()
        )
        + f"; of these four intervals, {excludes} excludes 0. "
        f"Highest scores: {', '.join(best['method'][:4])} "
        f"({best['retrieval'].iloc[0]:.3f} to {best['retrieval'].iloc[3]:.3f}); FT "
        f"{one(found, method='FT')['retrieval']:.3f}, "
        f"last {best['method'].iloc[-1]} {best['retrieval'].iloc[-1]:.3f}; the seeds of a method "
        f"differ by a standard deviation of {apart:.3f}, so that the order of neighbours is not sure."
        + (f" Not measured: {refused} ({failed['error'].iloc[0].rstrip('.')})." if refused else "")
    )  # fmt: skip


def below() -> str:
    """Heads and norms."""
    found = table("heads_and_norms")

    def r(method: str, part: str, scope: str) -> str:
        return with_interval(one(found, method=method, part=part, scope=scope))

    inside, every = "heads of one layer", "all heads or norms"
    relative = "heads of one layer, ΔM/m"
    shares = ", ".join(
        f"{method} {number(one(found, method=method, part='query heads', scope=relative)['pearson'])} "
        f"and {number(one(found, method=method, part='value heads', scope=relative)['pearson'])}"
        for method in METHODS
    )
    heads = "; ".join(
        f"{method} {r(method, 'query heads', inside)} (query), {r(method, 'value heads', inside)} (value)"
        for method in METHODS
    )
    norms = ", ".join(f"{method} {r(method, 'norms', every)}" for method in METHODS)
    return (
        "Yes. Across the heads inside a layer r is, with the paper's decay: "
        f"{heads}. Of ΔM/m, which a head's size does not change, it is {shares} "
        "(query and value). Norm weights, one vector each, change too, by "
        f"far less, and decay does not reach them; r across them: {norms}."
    )


def ranks() -> str:
    """Score and coupling against rank."""
    found, pairs = table("rank"), table("rank_halved")
    value = found[found["role"] == "value"].set_index(["method", "rank"])

    def score(method: str, rank: int) -> str:
        return f"{value.loc[(method, rank), 'score']:.3f}"

    used = {method: value.loc[(method, 128), "effective_rank"] for method in ("LoRA", "DoRA")}
    return (
        f"Score against rank 2 → 128: LoRA {score('LoRA', 2)} → {score('LoRA', 128)}, DoRA "
        f"{score('DoRA', 2)} → {score('DoRA', 128)}, FT {score('FT', 0)}. That is not the shape of "
        "the paper's Table 15, in which DoRA is above at every rank: with the paper's total decay, "
        f"pressed into a short run, {_held_against(pairs)}."
        + _ranks_without_decay()
        + " With decay the coupling of the value matrices hardly depends on rank: "
        f"LoRA {number(value.loc['LoRA', 'pearson'].min())} to {number(value.loc['LoRA', 'pearson'].max())}, "
        f"DoRA {number(value.loc['DoRA', 'pearson'].min())} to {number(value.loc['DoRA', 'pearson'].max())}. "
        f"At rank 128 LoRA's ΔW has an effective rank of {used['LoRA']:.0f}; DoRA's, whose "
        f"magnitudes rescale W_0 whole, {used['DoRA']:.0f} of 384 at every rank."
    )  # fmt: skip


def _held_against(pairs: Any) -> str:
    """How often DoRA is below or above LoRA of its rank, and of twice its rank."""
    parts = []
    for times, words in ((1, "its rank"), (2, "twice its rank")):
        rows = pairs[pairs["lora_rank"] == times * pairs["dora_rank"]]
        below = ", ".join(map(str, rows[rows["high"] < 0]["dora_rank"])) or "none"
        above = ", ".join(map(str, rows[rows["low"] > 0]["dora_rank"])) or "none"
        parts.append(
            f"below LoRA of {words} at {int((rows['difference'] < 0).sum())} of {len(rows)} ranks "
            f"(surely at {below}; surely above at {above})"
        )
    seeds = int(pairs["seeds"].iloc[0])
    return f"DoRA is {' and '.join(parts)}; 95% paired t over {seeds} seeds"


def _ranks_without_decay() -> str:
    """The same without decay, where that was run."""
    if not (RESULTS / "rank_no_decay_halved.csv").exists():
        return ""
    found = table("rank_no_decay")
    value = found[found["role"] == "value"].set_index(["method", "rank"])
    ends = {
        name: [value.loc[("DoRA", rank), name] for rank in (2, 128)]
        for name in ("pearson", "effective_rank")
    }
    return (
        f" Without decay {_held_against(table('rank_no_decay_halved'))}; DoRA's coupling goes from "
        f"{number(ends['pearson'][0])} at rank 2 to {number(ends['pearson'][1])} at rank 128, and the "
        f"effective rank of its ΔW is {ends['effective_rank'][0]:.0f} and "
        f"{ends['effective_rank'][1]:.0f} there."
    )  # fmt: skip


def merged() -> str:
    """What merging changes and costs."""
    found = table("merge")
    by_peft = found["method"].str.endswith("PEFT")
    ours, theirs = found[~by_peft], found[found["method"] == "DoRA, PEFT"]
    worst = ours.groupby("dtype", sort=False)["merged_from_adapted"].max()
    differ = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    said = f"differ by at most {differ}"
    if worst.max() == 0:
        said = f"are equal to the last bit in {', '.join(map(str, worst.index))}"
    rounded = ", ".join(
        f"{row['dtype']} {row['merged_from_adapted']:.1e} (ε {row['epsilon']:.1e})"
        for row in theirs.to_dict("records")
    )
    rows = ours.drop_duplicates("method").set_index("method")
    times = ", ".join(
        f"{method} {rows.loc[method, 'merged_latency']:.2f} "
        f"(quartiles {rows.loc[method, 'merged_latency_low']:.2f} to "
        f"{rows.loc[method, 'merged_latency_high']:.2f}; adapted {rows.loc[method, 'adapted_latency']:.2f})"
        for method in ("LoRA", "DoRA")
    )
    return (
        f"The outputs of merged and adapted models {said}: the adapted module's weight is W' itself. "
        f"PEFT's DoRA, which computes the update apart, differs once merged by at most {rounded}. "
        "Modules and classes of the merged model are those of the original one, so that it costs "
        f"nothing more. Latency over that of the original model: {times}."
    )
