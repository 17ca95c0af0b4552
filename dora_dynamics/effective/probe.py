"""Reading a weight off what a layer does: feed it a basis, and check that it is affine.

A layer that computes y = W' x + b has, whatever is inside, W' x = f(x) − f(0) for every x; feeding
it the unit vectors gives W', and random vectors tell whether the layer is affine at all.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from dora_dynamics.effective.private_copy import wide_dtype
from dora_dynamics.effective.weights import Check, Dense, NoDenseWeightError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

CLOSE: Final = 1e-7
"""Two evaluations of one layer differ by less than this, relative to the largest value: a part of
some tuners is computed in fp32 whatever they are given."""
_CLOSE_IN_FP32: Final = 1e-6
_AFFINE: Final = 1e-5
"""What is affine deviates by less than this, also where it computes in fp32 inside."""
_CHUNK: Final = 1024
_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sample_input(leaf: nn.Module, shape: torch.Size, device: torch.device) -> Tensor | None:
    """A random input that fits a layer whose weight has this shape; None where it is not known.

    Args:
        leaf: the plain layer that says what kind of layer it is.
        shape: of its weight.
        device: of its weight.
    """
    generator = torch.Generator().manual_seed(20240214)
    if isinstance(leaf, nn.Embedding):
        return torch.arange(shape[0], device=device)
    if isinstance(leaf, _CONVOLUTIONS):
        size = (2, leaf.in_channels, *_image(leaf, margin=2))
    elif isinstance(leaf, nn.LayerNorm):
        size = (1, 6, *leaf.normalized_shape)
    elif len(shape) == 2:
        size = (1, 6, shape[0] if _is_transposed(leaf) else shape[1])
    else:
        return None
    return torch.randn(size, generator=generator, dtype=torch.float64).to(
        device, wide_dtype(device), non_blocking=True
    )


def probed_weight(copy: nn.Module, leaf: nn.Module, shape: torch.Size, kind: str) -> Dense:
    """The weight W' of an affine layer, read off its outputs, stored as `leaf` stores its own.

    Whether the layer is affine is for the check to say.

    Args:
        copy: a private copy of the layer (see `private_copy`).
        leaf: the plain layer that says what kind of layer it is.
        shape: of the weight.
        kind: what the layer is called in a refusal.

    Raises:
        NoDenseWeightError: the layer cannot be fed, or no weight of this shape does what it does.
    """
    parameter = next(itertools.chain(copy.parameters(), copy.buffers()))
    sample = sample_input(leaf, shape, parameter.device)
    if sample is None:
        raise NoDenseWeightError(
            f"{kind} cannot be probed: what its input looks like is not known; say how its "
            "weight is read with dora_dynamics.register_effective_weight."
        )
    try:
        if isinstance(leaf, nn.Embedding):
            return Dense(_embedding(copy, leaf, sample))
        weight, again = _PROBES[_kind(leaf)](copy, leaf, shape, sample)
        expected = copy(sample)
    except NoDenseWeightError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise NoDenseWeightError(
            f"{kind} cannot be probed ({reason[:200]}): say how its weight is read with "
            "dora_dynamics.register_effective_weight."
        ) from error
    not_affine = f"{kind} is not affine in its input: there is no one weight that it multiplies by."
    affine = close(again, expected, _AFFINE)
    return Dense(weight, (Check(affine, NoDenseWeightError(not_affine)),))


def close(value: Tensor, expected: Tensor, tolerance: float | None = None) -> Tensor:
    """Whether two outputs agree, relative to the largest of the expected ones; one boolean.

    Outputs that are not finite agree where both are not: such a weight is to be reported, and not
    to be refused.
    """
    if value.shape != expected.shape:
        return expected.new_zeros((), dtype=torch.bool)
    if tolerance is None:
        in_fp32 = (expected.to(torch.float32).to(expected.dtype) == expected).all()
        limit: Tensor | float = torch.where(in_fp32, _CLOSE_IN_FP32, CLOSE)
    else:
        limit = tolerance
    near = (value - expected).abs().max() <= limit * expected.abs().max().clamp_min(1e-30)
    return torch.where(expected.isfinite().all(), near, ~value.isfinite().all())


def _linear(
    copy: nn.Module, leaf: nn.Module, shape: torch.Size, sample: Tensor
) -> tuple[Tensor, Tensor]:
    features = sample.shape[-1]
    zero = copy(torch.zeros_like(sample[:, :1]))
    columns = []
    for start in range(0, features, _CHUNK):
        basis = torch.zeros(
            1, min(_CHUNK, features - start), features, dtype=sample.dtype, device=sample.device
        )
        basis[0, :, start : start + _CHUNK].fill_diagonal_(1.0)
        columns.append((copy(basis) - zero)[0])
    transposed = torch.cat(columns)
    weight = transposed if _is_transposed(leaf) else transposed.T
    if weight.shape != shape:
        raise NoDenseWeightError(
            f"{type(copy).__name__} gives {weight.shape[0]} outputs where its weight has the shape "
            f"{tuple(shape)}."
        )
    return weight.contiguous(), sample @ transposed + zero


def _convolution(
    copy: nn.Module, leaf: nn.Module, shape: torch.Size, sample: Tensor
) -> tuple[Tensor, Tensor]:
    conv = cast("nn.Conv2d", leaf)
    size = _image(conv, margin=0)
    places = list(itertools.product(*(range(kernel) for kernel in conv.kernel_size)))
    full = sample.new_zeros(shape[0], conv.in_channels, *shape[2:])
    blank = sample.new_zeros(1, conv.in_channels, *size)
    zero = copy(blank)
    at = tuple(
        padding // stride + 1 for padding, stride in zip(_padding(conv), conv.stride, strict=True)
    )
    everywhere = slice(None)
    for place in places:
        impulses = blank.repeat(conv.in_channels, *(1,) * (blank.ndim - 1))
        for channel in range(conv.in_channels):
            position = tuple(
                a * stride - padding + tap * dilation
                for a, stride, padding, tap, dilation in zip(
                    at, conv.stride, _padding(conv), place, conv.dilation, strict=True
                )
            )
            impulses[(channel, channel, *position)] = 1.0
        answer = copy(impulses) - zero
        here: Any = (everywhere, everywhere, *place)
        there: Any = (everywhere, everywhere, *at)
        full[here] = answer[there].T
    weight = _ungrouped(full, conv.groups)
    functional = {
        1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d
    }[len(places[0])]  # fmt: skip
    again = functional(
        sample, weight, None, conv.stride, cast("int", conv.padding), conv.dilation, conv.groups
    )
    bias = copy(torch.zeros_like(sample))
    return weight, again + bias


def _ungrouped(full: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return full
    rows = full.chunk(groups, dim=0)
    return torch.cat([part.chunk(groups, dim=1)[group] for group, part in enumerate(rows)])


def _embedding(copy: nn.Module, leaf: nn.Embedding, tokens: Tensor) -> Tensor:
    """The rows an embedding looks up, without the factor that Gemma-like ones put on them."""
    rows: Tensor = copy(tokens)
    scale = getattr(leaf, "embed_scale", None)
    return rows if scale is None else rows / torch.as_tensor(scale, dtype=rows.dtype)


_PROBES: Final[dict[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "linear": _linear,
    "convolution": _convolution,
}


def _kind(leaf: nn.Module) -> str:
    return "convolution" if isinstance(leaf, _CONVOLUTIONS) else "linear"


def _padding(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Iterator[int]:
    if isinstance(conv.padding, str):
        reverse = conv._reversed_padding_repeated_twice
        return iter([reverse[2 * i] for i in reversed(range(len(conv.kernel_size)))])
    return iter(conv.padding)


def _image(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, margin: int) -> tuple[int, ...]:
    """An image on which one output position sees no padding."""
    return tuple(
        dilation * (kernel - 1) + 2 * stride + 2 * padding + 1 + margin
        for kernel, dilation, stride, padding in zip(
            conv.kernel_size, conv.dilation, conv.stride, _padding(conv), strict=True
        )
    )


def _is_transposed(leaf: nn.Module) -> bool:
    """Transformers' Conv1D stores (in, out)."""
    return any(cls.__name__ == "Conv1D" for cls in type(leaf).__mro__)
