"""Run: `python -m analyses.gradient_geometry` (minutes on 2 cores).

DoRA's gradients on a real batch, in float64, after real training steps:

1. Eq. 6, 7 and 11 against autograd, weight by weight.
2. The projection: how much of the gradient of W' lies along the weight itself and is taken off,
   and what that does to the gradient's covariance, which the paper says comes closer to the
   identity. Per unit, over many small batches: the participation ratio (Σλ)²/Σλ² of the covariance
   of Eq. 6's gradient over that of W's own (above 1: better conditioned), and how much of the
   largest direction lies along the weight.
3. Scenarios S1 and S2 of Sec. 4.2: of two changes, the one that turns a unit less has the larger
   gradient of m, if both changes are equally long. Across the units of a weight: r of |∇m| with
   ΔD of one step, with steps made equally long (relative to their unit), and as they are.

Writes figures/gradient_geometry.{png,svg}, analyses/results/gradient_geometry.{csv,json}.
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import pandas as pd
import torch
from torch import nn

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_about, write_tables
from analyses.finetuning import starting_point
from analyses.finetuning.recipe import LEARNING_RATES, Recipe
from analyses.merge import tuned
from dora_dynamics.adapters import DoRA, adapter_of, pretrained_weight
from dora_dynamics.plotting import save
from dora_dynamics.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from torch import Tensor

    from analyses.finetuning.task import Examples, PairModel
    from dora_dynamics.sites import Site

ROLES: Final = ("query", "value")


def dense_gradients(merged: PairModel, sites: Sequence[Site], batch: Examples) -> dict[str, Tensor]:
    """∇_{W'} L of every site on a batch, shape (out, in)."""
    weights = {site.name: cast("nn.Parameter", merged.get_submodule(site.name).weight)
               for site in sites}  # fmt: skip
    found = torch.autograd.grad(merged.loss(batch), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def direction_gradient(G: Tensor, V: Tensor, m: Tensor) -> Tensor:
    """Eq. 6: ∇_{V'} L = (m/‖V'‖)(I − V'V'ᵀ/‖V'‖²) ∇_{W'} L, per row (unit)."""
    norm = V.norm(dim=-1, keepdim=True)
    radial = (G * V).sum(-1, keepdim=True) / norm**2
    found: Tensor = m[:, None] / norm * (G - radial * V)
    return found


def magnitude_gradient(G: Tensor, V: Tensor) -> Tensor:
    """Eq. 7: ∇_m L = ∇_{W'} L · V'/‖V'‖, per row."""
    found: Tensor = (G * V).sum(-1) / V.norm(dim=-1)
    return found


def decomposed(model: PairModel, site: Site) -> tuple[DoRA, Tensor, Tensor]:
    """A site's adapter, and V' = W_0 + s·BA and m, detached."""
    module = model.get_submodule(site.name)
    adapter = cast("DoRA", adapter_of(module))
    turned = pretrained_weight(module) + adapter.scaling * adapter.lora_B @ adapter.lora_A
    return adapter, turned.detach(), adapter.magnitude.detach()


def against_autograd(
    model: PairModel, merged: PairModel, sites: Sequence[Site], batch: Examples
) -> pd.DataFrame:
    """Relative errors of Eq. 6, 7 and 11 against autograd's gradients of A, B and m."""
    dense = dense_gradients(merged, sites, batch)
    rows = []
    for detached in (False, True):
        for site in sites:
            decomposed(model, site)[0].detach_norm = detached
        model.zero_grad()
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
        for site in sites:
            adapter, V, m = decomposed(model, site)
            G = dense[site.name]
            turning = m[:, None] / V.norm(dim=1, keepdim=True) * G
            if not detached:
                turning = direction_gradient(G, V, m)
            expected = {
                "A": adapter.scaling * adapter.lora_B.detach().T @ turning,
                "B": adapter.scaling * turning @ adapter.lora_A.detach().T,
                "m": magnitude_gradient(G, V),
            }
            got = {"A": adapter.lora_A.grad, "B": adapter.lora_B.grad, "m": adapter.magnitude.grad}
            errors = {
                f"error_{name}": float((cast("Tensor", got[name]) - e).norm() / e.norm())
                for name, e in expected.items()
            }
            equations = "Eq. 11, 7" if detached else "Eq. 6, 7"
            rows.append({"site": site.name, "role": site.role, "equations": equations} | errors)
    return pd.DataFrame(rows)


def participation(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Participation ratio of the covariance over batches, and its first eigenvector, per unit.

    Args:
        gradients: shape (batches, units, inputs).
    """
    centred = (gradients - gradients.mean(0)).transpose(0, 1)
    gram = centred @ centred.transpose(1, 2)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    first = (vectors[..., -1:].transpose(1, 2) @ centred).squeeze(1)
    ratio: Tensor = values.sum(-1) ** 2 / (values**2).sum(-1)
    return ratio, first / first.norm(dim=-1, keepdim=True)


def conditioning(
    model: PairModel, merged: PairModel, sites: Sequence[Site], batches: Sequence[Examples]
) -> pd.DataFrame:
    """A row a site: what the projection takes off, and what it does to the covariance."""
    each = [dense_gradients(merged, sites, batch) for batch in batches]
    rows = []
    for site in sites:
        _, V, m = decomposed(model, site)
        G = torch.stack([gradients[site.name] for gradients in each])
        projected = torch.stack([direction_gradient(g, V, m) for g in G])
        scaled = G * (m / V.norm(dim=1))[None, :, None]
        unit = V / V.norm(dim=1, keepdim=True)
        along = ((G * unit).sum(-1) ** 2 / (G**2).sum(-1)).mean()
        plain, first = participation(scaled)
        without, _ = participation(projected)
        mean = G.mean(0)
        pull = magnitude_gradient(mean, V).abs()
        turned = {
            "equal": mean / mean.norm(dim=1, keepdim=True),
            "actual": mean,
        }
        r: dict[str, Any] = {}
        for name, step in turned.items():
            tangential = step - (step * unit).sum(1, keepdim=True) * unit
            size, strength = tangential.norm(dim=1) / V.norm(dim=1), pull
            if name == "equal":
                size, strength = tangential.norm(dim=1), pull / mean.norm(dim=1)
            pair = torch.stack([strength, size**2 / 2])
            r[f"r_{name}_length"] = float(torch.corrcoef(pair)[0, 1])
        rows.append(
            {
                "site": site.name,
                "role": site.role,
                "layer": site.layer,
                "inputs": V.shape[1],
                "radial_share": float(along),
                "participation": float(plain.median()),
                "participation_gain": float((without / plain).mean() - 1),
                "first_along_weight": float(((first * unit).sum(-1) ** 2).mean()),
            }
            | r
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, checks: pd.DataFrame) -> Figure:
    """Errors of the equations; what is radial; conditioning; the two scenarios."""
    looks: dict[str, Any] = {"markersize": 4, "linestyle": "none"}
    with drawing.panels(2, 2) as (figure, axes):
        error, radial, gain, scenario = axes.flat
        for place, (_, rows) in enumerate(checks.groupby("equations", sort=False)):
            for shift, quantity in zip((-0.2, 0, 0.2), ("A", "B", "m"), strict=True):
                y = rows[f"error_{quantity}"]
                error.plot(np.full(len(y), place + shift), y, ".", color="#0072B2", markersize=4)
                error.annotate(f"∇{quantity}", (place + shift, y.max()), (0, 3), ha="center",
                               textcoords="offset points", fontsize=6.5)  # fmt: skip
        error.set_xticks((0, 1), ["Eq. 6 and 7", "Eq. 11 (norm detached) and 7"])
        error.set_xlim(-0.5, 1.5)
        error.set_yscale("log")
        error.set_ylim(1e-16, 1e-14)
        error.set_title("equations against autograd (float64)")
        error.set_ylabel("relative error")
        for role, marker, colour in (("query", "o", "#0072B2"), ("value", "^", "#D55E00")):
            rows = table[table["role"] == role]
            x = rows["layer"]
            radial.plot(x, rows["radial_share"], marker, color=colour, label=role, **looks)
            radial.plot(x, rows["first_along_weight"], marker, color=colour, fillstyle="none",
                        label=f"{role}, largest direction of the covariance", **looks)  # fmt: skip
            gain.plot(x, 100 * rows["participation_gain"], marker, color=colour, **looks)
            scenario.plot(x, rows["r_equal_length"], marker, color=colour, **looks)
            scenario.plot(
                x, rows["r_actual_length"], marker, color=colour, fillstyle="none", **looks
            )
        random = 1 / int(table["inputs"].iloc[0])
        radial.axhline(random, color="#333333", linewidth=0.8, linestyle=":")
        radial.annotate("a random\ndirection: 1/k", (1, random), (3, 0), fontsize=6.5, va="center",
                        xycoords=radial.get_yaxis_transform(),
                        textcoords="offset points")  # fmt: skip
        middle = float(table["layer"].mean())
        for height, words in ((0.85, "hollow: steps as long as the gradients"),
                         (-0.75, "filled: steps made equally long (S1, S2)")):  # fmt: skip
            scenario.annotate(words, (middle, height), ha="center", fontsize=6.5)
        radial.set_yscale("log")
        radial.set_title("what the projection takes off")
        radial.set_ylabel("share of ‖∇W′‖² along the weight")
        gain.set_title("what that does to the covariance")
        gain.set_ylabel("gain in participation ratio, %\n(above 0: better conditioned)")
        scenario.set_title("across units: |∇m| against ΔD of a step")
        scenario.set_ylabel("r")
        scenario.set_ylim(-1.05, 1.05)
        for panel in (radial, gain, scenario):
            panel.set_xlabel("layer")
        for panel in (gain, scenario):
            drawing.zero_line(panel)
        drawing.legend_below(figure, radial, columns=4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains DoRA for some steps, checks, measures; writes table and figure."""
    parser = argparse.ArgumentParser(prog="python -m analyses.gradient_geometry")
    starting_point.add_options(parser, examples=200)
    parser.add_argument("--steps", type=int, default=50, help="of training before measuring")
    parser.add_argument("--batches", type=int, default=64, help="gradients a covariance is of")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(argv)
    started, device = starting_point.load(options, 1), torch.device(options.device)
    task, base = started.task.to(device), started.base
    base.fit_head(task.train)
    recipe = Recipe("DoRA", options.steps, options.batch_size, LEARNING_RATES["DoRA"])
    model = tuned(base, task, recipe).double()
    sites = find_sites(model, list(ROLES))
    merged = cast("PairModel", dd.merge(copy.deepcopy(model)))
    for site in sites:
        cast("nn.Parameter", merged.get_submodule(site.name).weight).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    batches = [
        task.train[torch.randperm(len(task.train), generator=generator)[: options.batch_size]
                   .to(device)]
        for _ in range(options.batches)
    ]  # fmt: skip
    checks = against_autograd(model, merged, sites, batches[0])
    table = conditioning(model, merged, sites, batches)
    write_tables(options.out, "gradient_geometry", {"": table})
    write_tables(options.out, "gradient_geometry", {"_checks": checks}, digits=3)
    settings = {name: getattr(options, name) for name in ("steps", "batches", "batch_size")}
    write_about(options.out, "gradient_geometry", settings | {"seed": 0})
    files = save(draw(table, checks), options.out / "figures" / "gradient_geometry")
    print(table.round(4).to_string(index=False))
    print(checks.groupby("equations").max(numeric_only=True).to_string())
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
