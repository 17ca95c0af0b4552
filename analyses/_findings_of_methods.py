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
    rates = jobs.groupby("method")["rate"]
    chosen = found.set_index("method")["rate"].drop("FT")
    at_end = int(
        ((chosen == rates.min()[chosen.index]) | (chosen == rates.max()[chosen.index])).sum()
    )
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

    def rho(name: str) -> str:
        return with_interval(said.loc[name], "rho", "low", "high")

    return (
        f"{'There is a relation' if seen else 'No such relation is seen'}: over "
        f"{int(row['methods'])} methods of PEFT, without weight decay, each at the best of four "
        f"learning rates, means of {seeds} seeds, the rank correlation of the "
        f"distance from full fine-tuning with the score is {rho('distance')} (95%, bootstrap over "
        f"methods{'' if seen else ': strong ones are excluded, weak ones are not'}; "
        f"{rho('standardised_distance')} by standardised measures in place of their ranks). The four "
        "measures by themselves: "
        + ", ".join(f"{words} {rho(name)}" for name, words in measures.items())
        + f"; of these four intervals, {excludes} excludes 0. "
        f"Highest scores: {', '.join(best['method'][:4])} "
        f"({best['retrieval'].iloc[0]:.3f} to {best['retrieval'].iloc[3]:.3f}); FT "
        f"{one(found, method='FT')['retrieval']:.3f}, "
        f"last {best['method'].iloc[-1]} {best['retrieval'].iloc[-1]:.3f}; the seeds of a method "
        f"differ by a standard deviation of {apart:.3f}, so that the order of neighbours is not sure. "
        f"The rates were chosen by the same score, and {at_end} of the {len(chosen)} methods have their "
        "best at an end of their four, so that they may have better ones beyond, and the lowest scores "
        "are of this budget."
        + (f" Not measured: {refused} ({failed['error'].iloc[0].rstrip('.')})." if refused else "")
    )  # fmt: skip


def below() -> str:
    """Heads and norms."""
    found = table("heads_and_norms")

    def r(method: str, part: str, scope: str) -> str:
        return with_interval(one(found, method=method, part=part, scope=scope))

    inside, every = "heads of one layer", "all heads or norms"
    relative = "heads of one layer, ΔM/m"
    shares = "; ".join(
        f"{method} {r(method, 'query heads', relative)} (query), {r(method, 'value heads', relative)} (value)"
        for method in METHODS
    )
    heads = "; ".join(
        f"{method} {r(method, 'query heads', inside)} (query), {r(method, 'value heads', inside)} (value)"
        for method in METHODS
    )
    norms = ", ".join(f"{method} {r(method, 'norms', every)}" for method in METHODS)
    path = table("heads_and_norms_path")
    last = path[path["step"] == path["step"].max()].set_index(["method", "part"])
    moved = 100 * last["relative_delta_magnitude_median"]
    sizes = ", ".join(
        f"{method} {moved[method, 'norms']:.2f}% (its query heads {moved[method, 'query heads']:.2g}%)"
        for method in METHODS
    )
    return (
        "Both can be decomposed; heads show the finding, norms do not as a whole. Across the heads "
        f"inside a layer r is, with the paper's decay: {heads}. Of ΔM/m, which a head's size does not "
        f"change, it is {shares}. Norm weights, one vector each, change too, by less, and decay does "
        f"not reach them: the median ΔM/m is {sizes}. r across norms: {norms}."
    )


def ranks() -> str:
    """Score and coupling against rank."""
    found = table("rank")
    value = found[found["role"] == "value"].set_index(["method", "rank"])

    def score(method: str, rank: int) -> str:
        return f"{value.loc[(method, rank), 'score']:.3f}"

    used = value["effective_rank"]
    return (
        f"Score against rank 2 → 128: LoRA {score('LoRA', 2)} → {score('LoRA', 128)}, DoRA "
        f"{score('DoRA', 2)} → {score('DoRA', 128)}, FT {score('FT', 0)}. That is not the shape of "
        "the paper's Table 15, in which DoRA is above at every rank: with the paper's total decay, "
        f"pressed into a short run, {_held_against('rank')}: percentage points, means over ranks with "
        f"95% paired t over {int(table('rank_halved')['seeds'].iloc[0])} seeds."
        + _ranks_without_decay()
        + " With decay the coupling of the value matrices across layers is "
        f"{_range(value.loc['LoRA'], 'pearson')} for LoRA and {_range(value.loc['DoRA'], 'pearson')} "
        f"for DoRA over the ranks, its sign sure at {_sure(value.loc['LoRA'])} and "
        f"{_sure(value.loc['DoRA'])} of them: no dependence on rank is seen, and six layers would show "
        "a strong one only. "
        f"At rank 128 LoRA's ΔW has an effective rank of {used['LoRA', 128]:.0f}; DoRA's, whose "
        f"magnitudes rescale W_0 whole, {used['DoRA'].mean():.0f} of 384 at every rank, near FT's "
        f"({used['FT', 0]:.0f})."
    )  # fmt: skip


def _range(rows: Any, name: str) -> str:
    return f"{number(rows[name].min())} to {number(rows[name].max())}"


def _sure(rows: Any) -> int:
    """At how many of the ranks the sign is sure."""
    return int((rows["pearson_low"] * rows["pearson_high"] > 0).sum())


def _held_against(name: str) -> str:
    """DoRA's score against that of LoRA of its rank, and of twice its rank."""
    pairs = table(f"{name}_halved")
    ranks, parts = pairs[pairs["scope"] == "one rank"], []
    for times, words in ((1, "its rank"), (2, "twice its rank")):
        rows = ranks[ranks["lora_rank"] == times * ranks["dora_rank"]]
        every = one(pairs, scope=f"all ranks × {times}")
        points = with_interval(
            100 * every[["difference", "low", "high"]], "difference", "low", "high"
        )
        first, last = (rows.sort_values("dora_rank").iloc[end] for end in (0, -1))
        parts.append(
            f"{points} from LoRA of {words} ({number(100 * first['difference'])} at rank "
            f"{first['dora_rank']:.0f}, {number(100 * last['difference'])} at {last['dora_rank']:.0f})"
        )
    return f"DoRA's score differs by {' and by '.join(parts)}"


def _ranks_without_decay() -> str:
    """The same without decay, where that was run."""
    if not (RESULTS / "rank_no_decay_halved.csv").exists():
        return ""
    found = table("rank_no_decay")
    value = found[found["role"] == "value"].set_index(["method", "rank"])
    low, high = (value.loc[("DoRA", rank)] for rank in (2, 128))
    return (
        f" Without decay {_held_against('rank_no_decay')}; the coupling of DoRA's value matrices is "
        f"{with_interval(low)} at rank 2 and {with_interval(high)} at rank 128, and the effective "
        f"rank of its ΔW there is {low['effective_rank']:.0f} and {high['effective_rank']:.0f}."
    )


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
