"""What came out of each recipe of the study, in sentences whose numbers come from result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from analyses.reproduce import verdict_table

if TYPE_CHECKING:
    from dora_dynamics.statistics import Level

RESULTS: Final = Path(__file__).parent / "results"
METHODS: Final = ("FT", "LoRA", "DoRA")
LEVELS: Final[dict[Level, str]] = {
    "pooled": "pooled, as in the paper",
    "within_step": "across layers",
    "within_layer": "over a weight's steps",
    "units": "across units",
}

RUNS: Final = {
    "reproduction_minilm": "MiniLM",
    "reproduction_minilm_no_decay": "MiniLM, no decay",
    "reproduction_bart": "our BART",
    "reproduction_bart_no_decay": "our BART, no decay",
}
"""What `reproduce` was run on, in words, by the name of its results."""

TRIALS: Final = {"FT": 0.83, "DoRA": 0.95}
"""r of the small trials that suggested the role of weight decay: one seed, another 6-layer encoder,
value matrices across layers at the last checkpoint, without decay."""


def table(name: str) -> Any:
    """A table of results."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def about(name: str) -> dict[str, Any]:
    """What is known of how results came about."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def there(*names: str) -> tuple[str, ...]:
    """Those of the names of which there are results."""
    return tuple(name for name in names if (RESULTS / f"{name}.json").exists())


def number(value: float, digits: int = 2) -> str:
    """A number with its sign and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def with_interval(row: Any, name: str = "pearson", low: str = "", high: str = "") -> str:
    """An estimate and its interval."""
    ends = row[low or f"{name}_low"], row[high or f"{name}_high"]
    return f"{number(row[name])} [{number(ends[0])}, {number(ends[1])}]"


def one(found: Any, **place: Any) -> Any:
    """The only row at a place."""
    for column, value in place.items():
        found = found[found[column] == value]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows at {place}.")
    return found.iloc[0]


def reproduced() -> str:
    """Which signs of the paper's claim are found, on two starting points."""
    lines = [
        "| starting point | | FT: negative | LoRA: positive | DoRA: negative |",
        "|---|---|---|---|---|",
    ]
    for name, words in (("minilm", "MiniLM"), ("bart", "our BART")):
        for level, told in LEVELS.items():
            found = verdict_table(table(f"reproduction_{name}"), level)
            for role in ("query", "value"):
                lines.append(f"| {words} | {role}, {told} | {_signs(found, role)} |")
    stacks = verdict_table(table("reproduction_bart_stacks"))
    for stack, found in stacks.groupby("stack", sort=False):
        for role in ("query", "value"):
            lines.append(f"| its {stack} alone | {role}, across layers | {_signs(found, role)} |")
    turned = stacks.groupby(["stack", "role"])["median_delta_direction"].median()
    apart = turned["decoder", "query"] / turned["encoder", "query"]
    bart, pre = about("reproduction_bart"), about("pretrain_bart")
    cut = len(bart.get("unfinished", []))
    scores = pd.DataFrame(about("reproduction_minilm")["jobs"]).groupby("method")["retrieval"]
    means = ", ".join(f"{method} {scores.mean()[method]:.3f}" for method in METHODS)
    return "\n".join(
        [
            "For each sign of the paper's claim, with the paper's total weight decay, r of ΔD and "
            "ΔM with its 95% interval over layers and seeds (ρ and slopes are in the result files):",
            "",
            *lines,
            "",
            f"The second starting point is an encoder–decoder in BART's shape "
            f"({pre['parameters'] / 1e6:.0f}M parameters, {pre['settings']['layers']} layers), "
            f"pre-trained here from random weights on {pre['tokens'] / 1e6:.0f}M tokens of Python "
            f"source (`analyses.pretrain`; held-out loss {pre['held_out_loss']['before']:.2f} → "
            f"{pre['held_out_loss']['after']:.2f}{_blind(pre)}). A text is embedded by its decoder's "
            "states. The median query of its decoder "
            f"turns {apart:,.{0 if apart > 10 else 1}f} times as far as that of its encoder"
            + (": over both stacks r is that of two clouds." if not 0.2 < apart < 5 else ".")
            + (f" {cut} of its {cut + len(bart['jobs'])} runs were cut off and are left out." if cut else "")
            + _without_decay()
            + f" MiniLM's held-out score: before {about('reproduction_minilm')['before']['retrieval']:.3f}, "
            f"then {means}.",
        ]
    )  # fmt: skip


def _signs(found: Any, role: str) -> str:
    """The verdicts of one role, with r, as the cells of a row.

    Over the steps of one weight both measures grow; the paper claims nothing of that.
    """
    rows = (one(found, role=role, method=method) for method in METHODS)
    return " | ".join(
        with_interval(row)
        if row["level"] == "within_layer"
        else f"{row['verdict']}: {with_interval(row)}"
        for row in rows
    )


def _without_decay() -> str:
    """What is left across units on each starting point."""
    names = there("reproduction_minilm_no_decay", "reproduction_bart_no_decay")
    parts = []
    for name in names:
        found = table(name)
        found = found[(found["level"] == "units") & ~found["signed"]]
        told = (
            f"{method} {with_interval(one(found, role='query', method=method))} and "
            f"{with_interval(one(found, role='value', method=method))}"
            for method in ("FT", "DoRA")
        )
        parts.append(f"on {RUNS[name].split(',')[0]} {', '.join(told)}")
    return f" Without decay r across units (query and value) is {'; '.join(parts)}."


def _blind(pre: dict[str, Any]) -> str:
    """What pre-training says of the encoder's use, where it was measured."""
    loss = pre["held_out_loss"].get("encoder_blind")
    return "" if loss is None else f"; {loss:.2f} with nothing but masks in the encoder"


def decay() -> str:
    """What weight decay does to the coupling, and what is left without."""
    found, contrast = table("weight_decay"), table("weight_decay_contrast")
    points = table("weight_decay_prediction")
    absolute = found[~found["signed"]]

    def r(method: str, total: float, role: str = "value", level: str = "units") -> str:
        return with_interval(one(absolute, method=method, total=total, role=role, level=level))

    left = {
        role: with_interval(
            one(contrast, role=role, total=0.0, contrast="LoRA − DoRA"), "mean", "low", "high"
        )
        for role in ("query", "value")
    }
    errors = points.groupby("method")["error"].apply(lambda e: 100 * e.abs().mean())
    shares = table("weight_decay_relative")

    def without(method: str) -> str:
        place = {"method": method, "role": "value", "total": 0.0, "level": "within_step"}
        return with_interval(one(absolute, **place))

    def of_size(method: str, role: str, name: str = "pearson") -> str:
        return number(one(shares, method=method, total=0.1, role=role)[name])

    def layers(method: str, role: str) -> str:
        place = {"method": method, "role": role, "total": 0.1, "level": "within_step"}
        return number(one(absolute, **place)["pearson"])

    return (
        f"Across the units of the value matrices r of FT goes from {r('FT', 0.0)} without decay to "
        f"{r('FT', 0.1)} at Λ = 10%, that of DoRA from {r('DoRA', 0.0)} to {r('DoRA', 0.1)}, and "
        f"LoRA's stays ({r('LoRA', 0.0)}, {r('LoRA', 0.1)}): decay on what holds the magnitude "
        "makes the sign negative. Is the paper's contrast between LoRA and DoRA left when decay is "
        f"off? Yes, though not as one of signs: across layers r of LoRA is above that of DoRA by "
        f"{left['query']} (query) and {left['value']} (value; means over seeds with t-intervals, "
        "which speak of these layers).\n\nThe prediction m' = m(1 − Λ_eff)/(1 − ΔD), Λ_eff = 1 − exp(−Λ), misses "
        f"the relative signed ΔM by {errors['FT']:.2f} (FT), {errors['LoRA']:.2f} (LoRA) and {errors['DoRA']:.2f} "
        "(DoRA) percentage points on average: DoRA's m learns against the turning that it predicts. "
        "Sizes do a part: decay takes from each layer in proportion to m_0, and large weights turn "
        f"less (value, r of ΔD and m_0: {of_size('FT', 'value', 'r_direction_size')} in FT). Across "
        "layers at Λ = 10%, r goes from "
        + ", ".join(
            f"{layers(method, role)} to {of_size(method, role)} ({method} {role})"
            for method in ("FT", "DoRA")
            for role in ("query", "value")
        )
        + " if ΔM is taken relative to m_0. The first trials, of one seed, had r across the layers of "
        "value without decay at "
        + " and ".join(
            f"{number(trial)} ({method}), where here it is {without(method)}"
            for method, trial in TRIALS.items()
        )
        + "."
        + _unfinished("weight_decay")
    )


def placement() -> str:
    """Which of DoRA's parameters has to decay."""
    found = table("decay_placement")
    found = found[(found["level"] == "units") & ~found["signed"]]

    def r(place: str, total: float, role: str) -> str:
        return with_interval(one(found, decay_on=place, total=total, role=role))

    largest = found["total"].max()
    change = 100 * found[found["total"] == largest].groupby("decay_on")["relative_change"].mean()
    told = "; ".join(
        f"{role}: {r('all', 0.0, role)} without decay, at Λ = {100 * largest:g}% "
        f"{r('all', largest, role)} with decay on all, {r('magnitude', largest, role)} on m alone, "
        f"{r('factors', largest, role)} on A and B alone"
        for role in ("query", "value")
    )
    return (
        f"Decay on m does, decay on A and B does nothing. r across units, {told}. Decay on m "
        f"changes the magnitudes by {number(change['magnitude'])}% on average, decay on A and B by "
        f"{number(change['factors'])}%."
    )


def geometry() -> str:
    """How well the orthogonal curve tells LoRA's points."""
    found = table("update_geometry")

    def r_squared(source: str, role: str, method: str = "LoRA") -> str:
        return f"{one(found, source=source, role=role, method=method)['r_squared']:.2f}"

    others = found[(found["method"] != "LoRA") & (found["source"] != "paper")]
    share = table("update_geometry_share")
    last = share[share["step"] == share.groupby("source")["step"].transform("max")]
    last = last[last["source"] == "reproduction_minilm"]
    shares = last.groupby("method")["mean"].mean()
    return (
        "The curve ΔM = m·ΔD/(1 − ΔD), with each weight's own m and nothing fitted, explains "
        f"R² = {r_squared('reproduction_minilm', 'query')} (query) and "
        f"{r_squared('reproduction_minilm', 'value')} (value) of LoRA's points on MiniLM, and "
        f"{r_squared('reproduction_bart', 'query')} and {r_squared('reproduction_bart', 'value')} on "
        "our BART. On the paper's own LoRA points, with one fitted m, it explains "
        f"{r_squared('paper', 'query')} and {r_squared('paper', 'value')}. It tells nothing of FT "
        "and DoRA, with decay or without: the mean of ΔM is a better guess in "
        f"{int((others['r_squared'] < 0).sum())} of {len(others)} sets of their points. At the end of "
        "training the radial share of "
        f"‖ΔW‖² is {shares['LoRA']:.4f} for LoRA (a random direction has 1/384 = {1 / 384:.4f}), "
        f"{shares['FT']:.2f} for FT and {shares['DoRA']:.2f} for DoRA; the rest is tangential."
    )


def gradients() -> str:
    """The equations checked; conditioning; the scenarios."""
    found, checks = table("gradient_geometry"), table("gradient_geometry_checks")
    worst = checks[["error_A", "error_B", "error_m"]].max().max()
    gain = 100 * found["participation_gain"]
    return (
        f"Eq. 6, 7 and 11 agree with autograd to {worst:.0e} in float64, on all "
        f"{len(found)} adapted weights. Of the gradient of a unit, {100 * found['radial_share'].mean():.2f}% "
        f"lies along the unit itself (a random direction: {100 / found['inputs'].iloc[0]:.2f}%), so "
        "that the projection takes off next to nothing: the participation ratio of the gradient's "
        f"covariance grows by {gain.mean():.2f}% on average ({number(gain.min())}% to {number(gain.max())}% "
        "over the weights). The claim that it comes closer to the identity has the right sign in "
        + " and in ".join(
            f"{int((gain[found['role'] == role] > 0).sum())} of {int((found['role'] == role).sum())} "
            f"{role} matrices"
            for role in ("query", "value")
        )
        + ", and hardly any size here. Scenarios S1 and S2: "
        "if the steps of all units are made equally long, |∇m| goes against ΔD as the paper says "
        f"(mean r = {number(found['r_equal_length'].mean())}, which is geometry); with the gradients' "
        f"actual lengths it goes with ΔD (mean r = {number(found['r_actual_length'].mean())}, "
        f"{number(found['r_actual_length'].min())} to {number(found['r_actual_length'].max())}): units "
        "with long gradients move more in both. The assumption of equal lengths decides."
    )  # fmt: skip


def when() -> str:
    """How often each sign is met over the settings, and what the others change."""
    found = table("sign_map")
    within = found[found["level"] == "within_step"].dropna(subset=["pearson"])
    lines = [
        "| | lowest r | highest r | settings | negative | surely negative | surely positive |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for decay in ("paper's decay", "no decay"):
            cells = within[(within["method"] == method) & (within["decay"] == decay)]
            r, sure = cells["pearson"], cells["pearson_low"] * cells["pearson_high"] > 0
            counts = (len(r), (r < 0).sum(), (sure & (r < 0)).sum(), (sure & (r > 0)).sum())
            told = [number(r.min()), number(r.max()), *map(str, counts)]
            lines.append(f"| {method}, {decay} | {' | '.join(told)} |")

    def r_of(setting: str, method: str, decay: str = "paper's decay") -> str:
        rows = (
            one(found, setting=setting, method=method, decay=decay, role=role)
            for role in ("query", "value")
        )
        return ", ".join(number(row["pearson"]) for row in rows)

    coupled = "Adam, decay in the gradient"
    without = within[(within["method"] != "LoRA") & (within["decay"] == "no decay")]
    sure_ones = int((without["pearson_low"] * without["pearson_high"] > 0).sum())
    return (
        "With decoupled decay expect the paper's signs at every learning rate, rank and batch "
        f"size; without it, {sure_ones or 'none'} of the {len(without)} signs of FT and DoRA "
        f"{'are' if sure_ones > 1 else 'is'} sure. Across layers, query and value, one thing varied "
        "at a time (surely: the 95% interval leaves out zero):\n\n" + "\n".join(lines) + "\n\n"
        "With the decay in Adam's gradient (query, value) FT keeps its sign "
        f"({r_of(coupled, 'FT')}), DoRA less so ({r_of(coupled, 'DoRA')}); with SGD FT does "
        f"({r_of('SGD with momentum', 'FT')}), DoRA does not ({r_of('SGD with momentum', 'DoRA')}). "
        "The choice of checkpoints matters to pooled r: over the whole run, in which both measures "
        f"grow from zero, it is with decay FT {r_of('pooled, the whole run', 'FT')}, DoRA "
        f"{r_of('pooled, the whole run', 'DoRA')}, over the paper's late ones "
        f"{r_of('pooled, late checkpoints', 'FT')} and {r_of('pooled, late checkpoints', 'DoRA')}."
        + _unfinished("sign_map")
    )


def zoo() -> str:
    """Whether closeness to FT goes with the score."""
    found, said = table("adapter_zoo"), table("adapter_zoo_answer").set_index("measure")
    best = found.sort_values("retrieval", ascending=False)
    jobs = pd.DataFrame(about("adapter_zoo")["jobs"])
    failed = jobs[jobs["error"].notna()] if "error" in jobs else jobs[:0]
    refused = ", ".join(sorted(set(failed["method"])))
    row = said.loc["distance"]
    return (
        f"No such relation is seen: over {int(row['methods'])} methods of PEFT, without weight decay, "
        "each at the best of four learning rates, the rank correlation of the distance from full "
        f"fine-tuning with the score is {with_interval(row, 'rho', 'low', 'high')} (95%, bootstrap "
        "over methods: strong ones are excluded, weak ones are not). The four measures by themselves: "
        + ", ".join(
            f"{words} {with_interval(said.loc[name], 'rho', 'low', 'high')}"
            for name, words in (
                ("r_layers", "r across layers"),
                ("r_units", "r across units"),
                ("radial_share", "radial share"),
                ("log_ratio", "ΔM over ΔD"),
            )
        )
        + f". Best at the task: {', '.join(best['method'][:4])}; FT {one(found, method='FT')['retrieval']:.3f}, "
        f"last {best['method'].iloc[-1]} {best['retrieval'].iloc[-1]:.3f}."
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
        + " The coupling of the value matrices hardly depends on rank: "
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
    return f" Without decay {_held_against(table('rank_no_decay_halved'))}."


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


def _unfinished(name: str) -> str:
    cut = about(name).get("unfinished", [])
    if not cut:
        return ""
    made = len(about(name)["jobs"])
    return f" ({len(cut)} of {made + len(cut)} runs were cut off when the machine's time was up, and are left out.)"
