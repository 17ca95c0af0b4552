"""Quantised base weights: what of a measured change may be the error of quantising them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dora_dynamics.recording.troubles import warn_user

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from dora_dynamics.recording.followed import Followed


def quantized(followed: Mapping[str, Followed]) -> dict[str, str]:
    """What each base weight that is quantised is quantised as, by `Site.tensor`."""
    return {name: kind for name, where in followed.items() if (kind := where.quantization())}


def with_quantization(description: str, kinds: Iterable[str], *, is_given: bool) -> str:
    """The description of a W_0 whose base weights are quantised.

    Args:
        description: what W_0 is.
        kinds: what base weights are quantised as.
        is_given: W_0 was given, and is not what they decode to.

    Warns:
        UserWarning: W_0 is what they decode to, so that the error of that is not known.
    """
    words = ", ".join(sorted(set(kinds)))
    if is_given:
        return f"{description}; the model's own base weights are quantised ({words})"
    warn_user(
        f"the base weights are quantised ({words}): changes are measured from their "
        "dequantised values, and the quantisation error, which can be many times the update, "
        "is not known; baseline= the 16-bit checkpoint measures from that, and tells."
    )
    return f"{description}, dequantised ({words})"


def error_beside_update(
    names: Iterable[str], followed: Mapping[str, Followed], weights: Mapping[str, Tensor]
) -> str:
    """How the error of quantising these tensors compares with the update, in words.

    The error is the base's distance from W_0, the update is how far the effective weight is from
    the base; the median over the tensors.
    """
    ratios = []
    for name in names:
        where = followed[name]
        base, now = where.base().to(torch.float64), where.dense().to(torch.float64)
        error = torch.linalg.vector_norm(base - weights[name].to(base))
        ratios.append(error / torch.linalg.vector_norm(now - base))
    ratio = float(torch.stack(ratios).median())
    return f"the quantisation error of the base weights is {ratio:.2g} times the update"
