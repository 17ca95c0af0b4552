"""From targets to sites: what a user names, found in a model or in the tensors of a file."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dora_dynamics.errors import InputError
from dora_dynamics.sites.catalogue import (
    GRANULARITIES,
    Granularity,
    Weight,
    describe_weight,
)
from dora_dynamics.sites.models import list_weights, tensor_names
from dora_dynamics.sites.names import role_of
from dora_dynamics.sites.tied import with_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from torch import nn

    from dora_dynamics.sites.site import Site

Target = str | re.Pattern[str]


class NoSiteMatchesError(InputError):
    """No weight of the model matches the targets; the message lists what there is."""


class NoHeadsError(InputError):
    """Rows per head are asked for where the heads of a projection are not known."""


def find_sites(
    model: nn.Module, targets: Sequence[Target], granularity: Granularity = "module"
) -> list[Site]:
    """The weights of `model` that `targets` selects, in the model's own order.

    Args:
        model: any module.
        targets: each a role ("query"), the end of a module's path ("q_proj",
            "self_attn.q_proj"), a glob over whole paths ("encoder.*.query") or a compiled regular
            expression searched in the path. A weight is selected if any of them matches. A
            target that fits a linear layer selects linear layers only; embeddings,
            convolutions, norms ("norm") and biases ("query_bias", "*.bias") are selected by
            targets that fit no linear layer. A module that is used in several places is selected
            by any of its paths. Tied weights are a site for each module that has them; `tied.once`
            leaves one.
        granularity: "module" gives linear layers whole, as an adapter is put on them. "matrix"
            also knows the parts of fused weights (the target "query" finds the query rows of
            GPT-2's c_attn, while "c_attn" finds the whole), the experts stored in one tensor,
            and all the other kinds. "head" splits that further into attention heads; what has no
            heads stays whole.

    Raises:
        TypeError: `targets` is one string; pass a list.
        NoSiteMatchesError: one of the targets matches nothing.
        NoHeadsError: "head" is asked for and a query, key or value projection does not tell its
            heads, or nothing that is selected has any.
        InputError: the granularity is unknown.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity must be 'matrix' or 'head', not {granularity!r}.")
    weights = with_names(list_weights(model), tensor_names(model))
    if granularity == "module":
        weights = [Weight((as_module,)) for weight in weights if (as_module := _as_module(weight))]
    try:
        return select(weights, targets, granularity)
    except NoSiteMatchesError as error:
        raise NoSiteMatchesError(f"{error}{_about_modules(model, targets)}") from None


def select_tensors(
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any] | None,
    targets: Sequence[Target],
    granularity: Granularity = "matrix",
    names: Sequence[Sequence[str]] = (),
) -> list[Site]:
    """As `find_sites`, for the tensors of a file: their names and shapes, and `config.json`.

    `names` are those of tensors that have several, as `tied.names_in_file` finds them.

    Raises:
        UnknownAxisError: a tensor's axis depends on the model and `config` does not say which.
        TypeError, NoSiteMatchesError, NoHeadsError: as in `find_sites`.
    """
    found = (describe_weight(name, shape, config) for name, shape in shapes.items())
    weights = with_names((weight for weight in found if weight is not None), names)
    return select(weights, targets, granularity)


def select(
    weights: Sequence[Weight], targets: Sequence[Target], granularity: Granularity
) -> list[Site]:
    """The sites of `weights` that any of the targets selects, in the order of `weights`."""
    if isinstance(targets, str):
        raise TypeError(f"targets must be a list of strings: [{targets!r}], not {targets!r}.")
    if not targets:
        raise NoSiteMatchesError(f"targets is empty. {_list_available(weights)}")
    matrices = [weight for weight in weights if weight.kind == "matrix"]
    others = [weight for weight in weights if weight.kind != "matrix"]
    listed = {whole.tensor for weight in weights for whole in weight.wholes}
    chosen: set[Site] = set()
    for target in targets:
        matched = _matching(matrices, target, listed) or _matching(others, target, listed)
        if not matched:
            shown = target.pattern if isinstance(target, re.Pattern) else target
            raise NoSiteMatchesError(
                f"no linear layer matches the target {shown!r}. {_list_available(weights)}"
            )
        chosen.update(matched)
    selected = [
        (weight, site)
        for weight in weights
        for site in (*weight.wholes, *weight.parts)
        if site in chosen
    ]
    if granularity != "head":
        return [site for _, site in selected]
    return _by_head(selected)


def _as_module(weight: Weight) -> Site | None:
    """The linear layer as the model itself names it; None for any other kind of weight."""
    site = weight.wholes[0]
    if weight.kind != "matrix" or site.expert is not None or site.parameter != "weight":
        return None
    return replace(site, name=site.module)


def _by_head(selected: Sequence[tuple[Weight, Site]]) -> list[Site]:
    sites: dict[Site, None] = {}
    for weight, site in selected:
        heads = weight.heads(site)
        if not heads and _has_heads(site.role):
            raise NoHeadsError(
                f"the attention heads of {site.name} are not known: its model's configuration "
                "gives no head count, or one that does not fit the shape of the weight."
            )
        sites.update(dict.fromkeys(heads or (site,)))
    if all(site.head is None for site in sites):
        raise NoHeadsError(
            "nothing that is selected has attention heads in its output features: select query, "
            "key or value."
        )
    return list(sites)


def _has_heads(role: str) -> bool:
    return role.removeprefix("cross_") in ("query", "key", "value", "query_key_value")


def _matching(weights: Iterable[Weight], target: Target, listed: AbstractSet[str]) -> list[Site]:
    """The sites that match by their own names, or by others that no weight of the list has."""
    return [
        site
        for weight in weights
        for site in (*weight.wholes, *weight.parts)
        if _matches(site, target)
        or any(
            _matches(_renamed(site, name), target)
            for name in site.also_known_as
            if name.partition("[")[0] not in listed
        )
    ]


def _renamed(site: Site, name: str) -> Site:
    """The site as it would be under another of its names."""
    tensor = name.partition("[")[0]
    module = tensor if site.parameter == "weight" else tensor.removesuffix(f".{site.parameter}")
    whole = site.rows is None and site.kind in ("matrix", "embedding")
    return replace(site, name=name, module=module, role=role_of(tensor) if whole else site.role)


def _matches(site: Site, target: Target) -> bool:
    """A role or exact name selects a whole or a part; a path selects what the module holds."""
    if not isinstance(target, re.Pattern) and target in (site.role, site.name):
        return True
    if site.rows is not None:
        return False
    own = "" if site.parameter == "weight" else f".{site.parameter}"
    paths = {site.name, site.tensor, site.module + own}
    if isinstance(target, re.Pattern):
        return any(target.search(path) for path in paths)
    return any(path.endswith("." + target) or fnmatchcase(path, target) for path in paths)


def _about_modules(model: nn.Module, targets: Sequence[Target]) -> str:
    """What to do where a target names a module that is no layer, as an adapter of a user's own."""
    named = [
        (path, type(module).__name__)
        for path, module in model.named_modules()
        for target in targets
        if isinstance(target, str) and f".{path}".endswith(f".{target}")
    ]
    if not named:
        return ""
    path, kind = named[0]
    return (
        f" {path} is a {kind}: if that adapts one layer, have it hold the layer as `base_layer`, "
        "or give it in_features and out_features and say how its weight is read with "
        "dora_dynamics.register_effective_weight."
    )


def _list_available(weights: Iterable[Weight]) -> str:
    by_role: dict[str, list[str]] = {}
    for weight in weights:
        for site in (*weight.wholes, *weight.parts):
            if weight.kind == "matrix":
                by_role.setdefault(site.role, []).append(site.name)
    if not by_role:
        return "The model has no linear layers."
    listed = ", ".join(
        f"{role!r} ({len(names)}, such as {names[0]})" for role, names in by_role.items()
    )
    return f"There are, by role: {listed}."
