"""Where W_0 comes from: the model before its adapter, a state dict, or a checkpoint's files.

Some methods rewrite the base weight when they start (PiSSA and OLoRA move its leading part into
their factors): what lies below their adapter is not W_0, and is refused as that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dora_dynamics.effective.peft_layers import rewriting_method
from dora_dynamics.errors import InputError
from dora_dynamics.recording.followed import Followed, follow
from dora_dynamics.sharded.models import expose
from dora_dynamics.sites import find_sites, once

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from dora_dynamics.runs.directory import StrPath
    from dora_dynamics.sites import Granularity, Site


class BaselineError(InputError):
    """W_0 is not to be had that way; the message says how it is."""


@dataclass(frozen=True)
class CapturedBaseline:
    """Pre-trained weights taken from a model before an adapter was applied.

    Attributes:
        weights: copies of the weights, by their names in the model's state dict.
        model: class of the model they were taken from.
    """

    weights: Mapping[str, Tensor]
    model: str


def capture_baseline(
    model: nn.Module,
    targets: Sequence[str | re.Pattern[str]],
    granularity: Granularity = "matrix",
) -> CapturedBaseline:
    """Copy the weights that `targets` selects, to be a recorder's baseline later.

    Call it before the adapter is applied:

        >>> baseline = dd.capture_baseline(model, ["query", "value"])
        >>> model = peft.get_peft_model(model, LoraConfig(init_lora_weights="pissa"))
        >>> recorder = dd.Recorder(model, ["query", "value"], baseline=baseline)

    The copies are on the CPU; what is equal to a frozen weight of the model is let go of once the
    recorder is attached.

    Args:
        model: the pre-trained model.
        targets: as `Recorder` takes them.
        granularity: as `Recorder` takes it.

    Raises:
        BaselineError: the model already carries an adapter that rewrote its base weights.
        NoSiteMatchesError: a target matches nothing.
    """
    expose(model)
    sites = once(find_sites(model, targets, granularity))
    followed = follow(model, sites)
    refuse_rewritten(model, followed)
    names = _names(sites)
    weights = {
        names[tensor]: where.base().detach().to("cpu", copy=True)
        for tensor, where in followed.items()
    }
    return CapturedBaseline(weights, type(model).__name__)


def refuse_rewritten(model: nn.Module, followed: Mapping[str, Followed]) -> None:
    """Refuse to take W_0 from below an adapter that rewrote it, or that is merged into it.

    Raises:
        BaselineError: with the way out.
    """
    way_out = (
        "give the weights from before: baseline=dora_dynamics.capture_baseline(model, targets), "
        "called before the adapter is applied, or baseline= the pre-trained checkpoint."
    )
    for name, where in followed.items():
        method = rewriting_method(model, where.module)
        if method is not None:
            raise BaselineError(
                f"{method} rewrote the base weight of {name} when it started, so that what lies "
                f"below the adapter is not W_0; {way_out}"
            )
        if where.is_merged():
            raise BaselineError(
                f"the adapter of {name} is merged into its base weight, which is no longer W_0; "
                f"unmerge it first, or {way_out}"
            )


def given_weights(
    source: StrPath | Mapping[str, Tensor] | CapturedBaseline, sites: Iterable[Site]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a source by `Site.tensor`, and what it is in words.

    Raises:
        BaselineError: the source lacks a weight, or is an adapter.
        CheckpointError: the checkpoint cannot be read.
        TypeError: it is none of the three.
    """
    from dora_dynamics.checkpoints.naming import align, plain_names

    names = _names(sites)
    loads: dict[str, Callable[[], Tensor]]
    if isinstance(source, CapturedBaseline):
        where = "the captured baseline"
        description = f"captured from the {source.model} before the adapter was applied"
        loads = {name: partial(_itself, tensor) for name, tensor in source.weights.items()}
    elif isinstance(source, Mapping):
        where, description = "the baseline's state dict", "a state dict that was given"
        loads = {name: partial(_itself, tensor) for name, tensor in source.items()}
    elif isinstance(source, (str, os.PathLike)):
        from dora_dynamics.checkpoints.discover import locate
        from dora_dynamics.checkpoints.opening import open_checkpoint

        where = os.fspath(source)
        contents = open_checkpoint(locate(source))
        if contents.kind != "weights":
            raise BaselineError(
                f"{where} is an adapter: the baseline is the pre-trained checkpoint below it."
            )
        description = f"the checkpoint {where}"
        loads = {name: tensor.load for name, tensor in contents.tensors.items()}
    else:
        raise TypeError(
            "baseline must be a path, a state dict or what capture_baseline returned, not "
            f"{type(source).__name__}."
        )
    plain = plain_names(loads, where)
    pairs = align(dict.fromkeys(names.values()), plain, where).pairs
    missing = sorted(set(names.values()) - set(pairs))
    if missing:
        raise BaselineError(
            f"{where} holds no {missing[0]!r}"
            + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
            + ": give the baseline of this very model, captured with these targets."
        )
    found = {tensor: loads[plain[pairs[name]]]() for tensor, name in names.items()}
    return found, description


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _names(sites: Iterable[Site]) -> dict[str, str]:
    """`Site.tensor` → the tensor's name in a state dict."""
    return {
        site.tensor: f"{site.tensor}.weight" if site.parameter == "weight" else site.tensor
        for site in sites
    }
