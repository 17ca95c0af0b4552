"""What came out of the recipes on the coupling, in sentences whose numbers are of result files."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analyses._stored import (
    LEVELS,
    METHODS,
    RUNS,
    TRIALS,
    about,
    number,
    one,
    table,
    there,
    with_interval,
)
from analyses.reproduce import CLAIMED, verdict_table
from analyses.sign_map import COUPLED, DECAYS, SGD


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
    turned = stacks.set_index(["stack", "role", "method"])["median_delta_direction"].unstack(
        "stack"
    )
    apart = turned["decoder"] / turned["encoder"]
    bart, pre = about("reproduction_bart"), about("pretrain_bart")
    cut = len(bart.get("unfinished", []))
    return "\n".join(
        [
            "For each sign of the paper's claim, with the paper's total weight decay, r of ΔD and "
            "ΔM with its 95% interval over layers and seeds (ρ and slopes are in the result files). A "
            "verdict is that of one interval, with no correction for their number:",
            "",
            *lines,
            "",
            f"The second starting point is an encoder–decoder in BART's shape "
            f"({pre['parameters'] / 1e6:.0f}M parameters, {pre['settings']['layers']} layers), "
            f"pre-trained here from random weights on {pre['tokens'] / 1e6:.0f}M tokens of Python "
            f"source (`analyses.pretrain`; held-out loss {pre['held_out_loss']['before']:.2f} → "
            f"{pre['held_out_loss']['after']:.2f}{_blind(pre)}). A text is embedded by its decoder's "
            f"states. The median matrix of its decoder turns {apart.min():.1f} to {apart.max():.1f} times "
            "as far as that of its encoder, by method and role"
            + (": over both stacks r is that of two clouds." if not 0.2 < apart.min() < apart.max() < 5 else ".")
            + (f" {cut} of its {cut + len(bart['jobs'])} runs were cut off and are left out." if cut else "")
            + _without_decay()
            + f" Held-out score: {_scores('reproduction_minilm')}; {_scores('reproduction_bart')}.",
        ]
    )  # fmt: skip


def _scores(name: str) -> str:
    """The score before and after, mean over seeds."""
    made = about(name)
    means = pd.DataFrame(made["jobs"]).groupby("method")["retrieval"].mean()
    told = ", ".join(f"{method} {means[method]:.3f}" for method in METHODS)
    return f"{RUNS[name]} before {made['before']['retrieval']:.3f}, then {told}"


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
    alone = 100 * points[points["total"] == 0].groupby("method")[["measured", "predicted"]].mean()
    turning = ", ".join(
        f"{method} {number(alone.loc[method, 'measured'])}% ({number(alone.loc[method, 'predicted'])}%)"
        for method in METHODS
    )
    shares = table("weight_decay_relative")

    def without(method: str) -> str:
        place = {"method": method, "role": "value", "total": 0.0, "level": "within_step"}
        return with_interval(one(absolute, **place))

    def of_size(method: str, role: str) -> str:
        return with_interval(one(shares, method=method, total=0.1, role=role))

    def layers(method: str, role: str) -> str:
        return r(method, 0.1, role, "within_step")

    turned = one(shares, method="FT", total=0.1, role="value")["r_direction_size"]
    cells = [(method, role) for method in ("FT", "DoRA") for role in ("query", "value")]
    told = ", ".join(f"{method} {role} {layers(method, role)}" for method, role in cells)
    sized = ", ".join(f"{method} {role} {of_size(method, role)}" for method, role in cells)
    return (
        f"Across the units of the value matrices r of FT goes from {r('FT', 0.0)} without decay to "
        f"{r('FT', 0.1)} at Λ = 10%, that of DoRA from {r('DoRA', 0.0)} to {r('DoRA', 0.1)}, and "
        f"LoRA's stays ({r('LoRA', 0.0)}, {r('LoRA', 0.1)}); of the query matrices likewise (FT "
        f"{r('FT', 0.0, 'query')} to {r('FT', 0.1, 'query')}, DoRA {r('DoRA', 0.0, 'query')} to "
        f"{r('DoRA', 0.1, 'query')}): decay on what holds the magnitude "
        "makes the sign negative. Is the paper's contrast between LoRA and DoRA left when decay is "
        f"off? Yes, though not as one of signs: across layers r of LoRA is above that of DoRA by "
        f"{left['query']} (query) and {left['value']} (value; means over seeds with t-intervals, "
        f"which speak of these layers).\n\nAcross six layers less is sure: at Λ = 10% r is {told}. "
        "Sizes do a part: decay takes from each layer in proportion to m_0, and large weights turn "
        f"less (value, r of ΔD and m_0: {number(turned)} in FT). Of ΔM relative to m_0 it is {sized}: "
        "what is left of the sign across layers is FT's of value.\n\n"
        "The prediction m' = m(1 − Λ_eff)/(1 − ΔD), Λ_eff = 1 − exp(−Λ), misses the relative signed "
        f"ΔM by {errors['FT']:.2f} (FT), {errors['LoRA']:.2f} (LoRA) and {errors['DoRA']:.2f} (DoRA) "
        f"percentage points on average. Without decay turning is all that it has: {turning} are "
        "measured (and predicted), means over weights. For LoRA it is nearly right; FT turns so little that "
        "decay is all its test; DoRA's m, a parameter of its own, does not lengthen as its weights turn. "
        "The first trials, of one seed, had r across the layers of value without decay at "
        + " and ".join(
            f"{number(trial)} ({method}), where here it is {without(method)}"
            for method, trial in TRIALS.items()
        )
        + "."
        + _unfinished("weight_decay")
    )


def placement() -> str:
    """Which of DoRA's parameters has to decay."""
    absolute = table("decay_placement")
    absolute = absolute[~absolute["signed"]]
    found, layers = (absolute[absolute["level"] == level] for level in ("units", "within_step"))
    sure = int((layers["pearson_low"] * layers["pearson_high"] > 0).sum())

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
        "Decay on m does; decay on A and B changes r across units by less than "
        f"{_moved_by_factors(found):.3f} at any Λ. r across units, {told}. At Λ = {100 * largest:g}% "
        f"with decay on m the magnitudes change by {number(change['magnitude'])}% on average, with "
        f"decay on A and B by {number(change['factors'])}%, and with none by "
        f"{number(100 * found[found['total'] == 0]['relative_change'].mean())}%. Across layers "
        f"{sure or 'none'} of the {len(layers)} intervals, of six layers each, leaves out zero."
    )


def _moved_by_factors(found: Any) -> float:
    """The largest change of r by decay on A and B alone, rounded up to a thousandth."""
    alone = found[found["decay_on"] == "factors"].set_index(["role", "total"])["pearson"].unstack()
    none = found[found["total"] == 0].set_index("role")["pearson"]
    return math.ceil(1000 * float(alone.sub(none, axis=0).abs().max(axis=None))) / 1000


def geometry() -> str:
    """How well the orthogonal curve tells LoRA's points."""
    found = table("update_geometry")

    def r_squared(source: str, role: str, method: str = "LoRA") -> str:
        return f"{one(found, source=source, role=role, method=method)['r_squared']:.2f}"

    others = found[(found["method"] != "LoRA") & (found["source"] != "paper")]
    paper = [one(found, source="paper", role=role, method="LoRA") for role in ("query", "value")]
    share = table("update_geometry_share")
    last = share[share["step"] == share.groupby("source")["step"].transform("max")]
    shares = last.groupby(["source", "method"])["mean"].mean()
    minilm, bart = "reproduction_minilm", "reproduction_bart"
    query = one(last, source=bart, role="query", method="LoRA")["mean"]
    return (
        "The curve ΔM = m·ΔD/(1 − ΔD), with each weight's own m and nothing fitted, explains "
        f"R² = {r_squared(minilm, 'query')} (query) and {r_squared(minilm, 'value')} (value) of LoRA's "
        f"points on MiniLM, and {r_squared(bart, 'query')} and {r_squared(bart, 'value')} on our BART "
        f"(without decay {r_squared(f'{minilm}_no_decay', 'query')}, "
        f"{r_squared(f'{minilm}_no_decay', 'value')}, {r_squared(f'{bart}_no_decay', 'query')} and "
        f"{r_squared(f'{bart}_no_decay', 'value')}). On the paper's own LoRA points, with one fitted m, "
        f"it explains {paper[0]['r_squared']:.2f} and {paper[1]['r_squared']:.2f}; a straight line, of "
        f"one number more, {paper[0]['r_squared_line']:.2f} and {paper[1]['r_squared_line']:.2f}. "
        "It tells nothing of FT and DoRA, with decay or without: the mean of ΔM is a better guess in "
        f"{int((others['r_squared'] < 0).sum())} of {len(others)} sets of their points. At the end of "
        f"training on MiniLM the radial share of ‖ΔW‖² is {shares[minilm, 'LoRA']:.4f} for LoRA (a "
        f"random direction has 1/384 = {1 / 384:.4f}), {shares[minilm, 'FT']:.2f} for FT and "
        f"{shares[minilm, 'DoRA']:.2f} for DoRA; without decay FT's is "
        f"{shares[f'{minilm}_no_decay', 'FT']:.4f} and DoRA's {shares[f'{minilm}_no_decay', 'DoRA']:.3f}. "
        "The rest is tangential. "
        f"Where the curve fits least, BART's query, LoRA's share is {query:.4f}, twice that of a random "
        f"direction (1/256)."
    )


def gradients() -> str:
    """The equations checked; conditioning; the scenarios."""
    found, checks = table("gradient_geometry"), table("gradient_geometry_checks")
    worst = checks[["error_A", "error_B", "error_m"]].max().max()
    gain, made = 100 * found["participation_gain"], about("gradient_geometry")
    return (
        f"Eq. 6, 7 and 11 agree with autograd to {worst:.1e} in float64, on all "
        f"{len(found)} adapted weights (one DoRA run of {made['steps']} steps, {made['batches']} batches "
        f"of {made['batch_size']}). Of the gradient of a unit, {100 * found['radial_share'].mean():.2f}% "
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
    found = signs()
    within = found[found["level"] == "within_step"]
    lines = [
        "| | lowest r | highest r | cells | negative | surely negative | surely positive |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for decay in DECAYS:
            cells = within[(within["method"] == method) & (within["decay"] == decay)]
            r, sure = cells["pearson"], cells["sure"]
            number_of = (len(r), (r < 0).sum(), (sure & (r < 0)).sum(), (sure & (r > 0)).sum())
            row = [number(r.min()), number(r.max()), *map(str, number_of)]
            lines.append(f"| {method}, {decay} | {' | '.join(row)} |")

    def r_of(setting: str, method: str) -> str:
        rows = (
            one(found, setting=setting, method=method, decay=DECAYS[0], role=role)
            for role in ("query", "value")
        )
        return ", ".join(with_interval(row) for row in rows)

    by_adamw = within["setting"].str.startswith(("middle", "learning rate", "batch size", "rank"))
    plain = within[by_adamw & (within["decay"] == DECAYS[0])]
    right = plain["pearson"] * plain["method"].map(CLAIMED) > 0
    held = pd.DataFrame({"method": plain["method"], "right": right, "sure": right & plain["sure"]})
    counts = held.groupby("method").agg(["sum", "size"])
    told = "; ".join(
        f"{method} {row['right', 'sum']} of {row['right', 'size']}, surely {row['sure', 'sum']}"
        for method, row in counts.loc[list(METHODS)].iterrows()
    )
    without = within[(within["method"] != "LoRA") & (within["decay"] == DECAYS[1])]
    others = found[found["setting"].isin([COUPLED, SGD]) & (found["decay"] == DECAYS[0])]
    others = others[others["method"] != "LoRA"]
    return (
        "With AdamW's decay r has the paper's sign at each learning rate, rank and batch size "
        f"(of cells, one a setting and role: {told}); without it, {int(without['sure'].sum())} of the "
        f"{len(without)} signs of FT and DoRA "
        f"{'is' if without['sure'].sum() == 1 else 'are'} sure, where chance alone gives "
        f"{0.05 * len(without):.0f}. Six layers decide few signs one by one, and all cells share them "
        "and the seeds, so that counts are no votes. Across layers, one thing varied at a time "
        "(surely: the 95% interval leaves out zero; without decay Adam is AdamW, and is counted "
        "once):\n\n" + "\n".join(lines) + "\n\n"
        "Other optimizers, with decay (query, value): in Adam's gradient FT "
        f"{r_of(COUPLED, 'FT')}, DoRA {r_of(COUPLED, 'DoRA')}; with SGD FT {r_of(SGD, 'FT')}, DoRA "
        f"{r_of(SGD, 'DoRA')}: FT's estimates are negative, DoRA's of both signs, and "
        f"{int(others['sure'].sum()) or 'none'} of these {len(others)} is sure. "
        "The choice of checkpoints matters to pooled r: over the whole run, in which both measures "
        f"grow from zero, it is with decay FT {r_of('pooled, the whole run', 'FT')}, DoRA "
        f"{r_of('pooled, the whole run', 'DoRA')}, over the paper's late ones "
        f"{r_of('pooled, late checkpoints', 'FT')} and {r_of('pooled, late checkpoints', 'DoRA')}."
        + _unfinished("sign_map")
    )


def signs() -> Any:
    """The map of signs, each run counted once, and whether each r is surely not zero."""
    found = table("sign_map").dropna(subset=["pearson"])
    copied = (found["setting"] == COUPLED) & (found["decay"] == DECAYS[1])
    found = found[~copied]
    return found.assign(sure=found["pearson_low"] * found["pearson_high"] > 0)


def _unfinished(name: str) -> str:
    cut = about(name).get("unfinished", [])
    if not cut:
        return ""
    made = len(about(name)["jobs"])
    return f" ({len(cut)} of {made + len(cut)} runs were cut off when the machine's time was up, and are left out.)"
