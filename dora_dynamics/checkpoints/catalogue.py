"""The sites of a checkpoint, told from the names and shapes of its tensors and `config.json`."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.naming import plain_names
from dora_dynamics.sites import (
    NoHeadsError,
    NoSiteMatchesError,
    UnknownAxisError,
    once,
    select_tensors,
)
from dora_dynamics.sites.tied import names_in_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dora_dynamics.checkpoints.stored import Contents, StoredTensor
    from dora_dynamics.sites import Granularity, Site
    from dora_dynamics.sites.select import Target

_CONV1D_NAMES: Final = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def names_in_contents(contents: Contents) -> list[list[str]]:
    """The names of each tensor of a checkpoint that has several, by `Site.tensor`.

    Raises:
        CheckpointError: two names are one without what wrappers put into them.
    """
    plain = plain_names(contents.tensors, contents.path)
    places = {short: contents.tensors[name].place for short, name in plain.items()}
    return names_in_file(places, contents.metadata, contents.config)


def choose_sites(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    targets: Sequence[Target],
    *,
    granularity: Granularity = "matrix",
    transposed: Sequence[str] = (),
    fan_in_fan_out: bool | None = None,
    names: Sequence[Sequence[str]] = (),
) -> list[Site]:
    """The sites that the targets select among the tensors of a base.

    Args:
        tensors: the base's tensors by their plain names.
        config: the model's `config.json`, {} where there is none.
        targets: roles, ends of module paths, globs or patterns, as in `sites.find_sites`.
        granularity: as in `sites.find_sites`.
        transposed: globs over module paths whose weights are stored (in, out).
        fan_in_fan_out: what an adapter of this base says of its layers, None where none does.
        names: those of tensors that have several; each is one site.

    Raises:
        CheckpointError: a target matches nothing, or how a weight is stored cannot be told.
    """
    shapes = {
        name: tensor.shape for name, tensor in tensors.items() if tensor.dtype.is_floating_point
    }
    if "model_type" not in config:
        found = _model_type(shapes, transposed, fan_in_fan_out)
        config = {**config, **({"model_type": found} if found else {})}
    try:
        sites = once(select_tensors(shapes, config, targets, granularity, names))
    except UnknownAxisError as error:
        raise CheckpointError(
            f"{str(error).rstrip('.')}, or say which weights are stored (in, out) with "
            "transposed= (--transposed PATTERN)."
        ) from error
    except (NoSiteMatchesError, NoHeadsError) as error:
        raise CheckpointError(str(error)) from error
    return [_with_axis(site, transposed) for site in sites]


def tensor_name(site: Site) -> str:
    """The plain name of the tensor that holds a site."""
    return f"{site.module}.{site.parameter}" if site.module else site.parameter


def _with_axis(site: Site, transposed: Sequence[str]) -> Site:
    if site.kind == "matrix" and any(fnmatchcase(site.module, glob) for glob in transposed):
        return replace(site, stored_transposed=True)
    return site


def _model_type(
    shapes: Mapping[str, tuple[int, ...]],
    transposed: Sequence[str],
    fan_in_fan_out: bool | None,
) -> str | None:
    """A stand-in for a missing `model_type`: only whether the layers are Conv1D is told by it.

    A bias as long as its weight's second dimension, and not the first, proves a Conv1D; one as
    long as the first proves a linear layer.
    """
    proven: set[bool] = set()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module.rpartition(".")[2] not in _CONV1D_NAMES:
            continue
        bias = shapes.get(f"{module}.bias")
        if bias is not None and shape[0] != shape[1] and bias in ((shape[0],), (shape[1],)):
            proven.add(bias == (shape[1],))
    if transposed:
        return "named by the user"
    if len(proven) == 1:
        return "gpt2" if proven.pop() else "linear"
    if fan_in_fan_out is not None and not proven:
        return "gpt2" if fan_in_fan_out else "linear"
    return None
