"""What came out of the recipes on the coupling, in sentences whose numbers are of result files."""

from __future__ import annotations

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
