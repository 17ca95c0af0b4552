"""One layer of a LoRA file: LoCon, LoHa, LoKr or a plain difference, with or without DoRA."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

import torch

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.updates import Built, Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from dora_dynamics.checkpoints.stored import StoredTensor
    from dora_dynamics.checkpoints.updates import Update
    from dora_dynamics.decomposition import Axis
    from dora_dynamics.sites import Site

_NAMES: Final = {"up": "LoRA", "hada_w1_a": "LoHa", "diff": "FT"}


@dataclass(frozen=True)
class Layer:
    """The tensors of one adapted layer.

    Attributes:
        name: of the layer, as the file has it.
        path: of the file.
        parts: tensors by what they are: "down", "up", "alpha", "hada_w1_a", …
        scaling: the factor on the update where metadata tells it, and no alpha does.
    """

    name: str
    path: Path
    parts: Mapping[str, StoredTensor]
    scaling: float | None = None

    @property
    def method(self) -> str:
        """What kind of adapter this is."""
        kind = next((name for part, name in _NAMES.items() if part in self.parts), "LoKr")
        if "dora_scale" in self.parts or "magnitude" in self.parts:
            return "DoRA" if kind == "LoRA" else f"{kind} + DoRA"
        return kind

    def scale(self, rank: int) -> float:
        """The factor on the update: alpha / rank; 1 where the file has no alpha."""
        alpha = self.parts.get("alpha")
        if alpha is None:
            return 1.0 if self.scaling is None else self.scaling
        if prod(alpha.shape) != 1 or rank < 1:
            raise self.wrong(f"its alpha has shape {alpha.shape}, not one number")
        value = float(alpha.load().to(torch.float64).reshape(()))
        if value - value != 0:
            raise self.wrong(f"its alpha is {value}")
        return value / rank

    def wrong(self, reason: str) -> CheckpointError:
        """The error that says what is wrong with this layer."""
        return CheckpointError(f"{self.path}: the layer {self.name!r} cannot be read: {reason}.")

    def need(self, *names: str) -> None:
        """Refuse a layer that lacks one of these parts."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise self.wrong(f"it lacks {', '.join(missing)}")


def layer_update(layer: Layer, base: StoredTensor) -> Update:
    """What a layer does to the base weight `base`.

    Raises:
        CheckpointError: its tensors do not fit together or not to the base.
    """
    parts = layer.parts
    for name, part in parts.items():
        if not part.dtype.is_floating_point and name != "alpha":
            raise layer.wrong(f"{name} holds {part.dtype}, not numbers with a fraction")
    if len(base.shape) < 2:
        return _dense(layer, base, _difference(layer, base))
    axis = _dora_axis(layer, base)
    if ("down" in parts or "up" in parts) and (axis is None or len(base.shape) == 2 or
                                               axis == "output"):  # fmt: skip
        return _low_rank(layer, base, axis)
    if "down" in parts or "up" in parts:
        return _dense(layer, base, _multiplied(layer, base))
    if any(name.startswith("hada_") for name in parts):
        return _dense(layer, base, _hadamard(layer, base))
    if any(name.startswith("lokr_") for name in parts):
        return _dense(layer, base, _kronecker(layer, base))
    return _dense(layer, base, _difference(layer, base))


def _dora_axis(layer: Layer, base: StoredTensor) -> Axis | None:
    """The axis that the layer's magnitude belongs to, by the shape it is saved in."""
    if "magnitude" in layer.parts:
        return "output"
    scale = layer.parts.get("dora_scale")
    if scale is None:
        return None
    out_features, in_features = base.shape[0], base.shape[1]
    shape = scale.shape
    if len(shape) == 1:
        if out_features == in_features:
            raise layer.wrong(
                f"its dora_scale of shape {shape} does not say whether it belongs to the outputs "
                "or the inputs of a square weight; save it as (out, 1) or (1, in)"
            )
        shape = (shape[0], 1) if shape[0] == out_features else (1, shape[0])
    ones = (1,) * (len(shape) - 2)
    if shape == (out_features, 1, *ones):
        return "output"
    if shape == (1, in_features, *ones):
        return "input"
    raise layer.wrong(f"its dora_scale has shape {shape} and the base weight {base.shape}")


def _magnitude(layer: Layer) -> Callable[[], Tensor] | None:
    stored = layer.parts.get("dora_scale") or layer.parts.get("magnitude")
    return None if stored is None else lambda: stored.load().flatten()


def _low_rank(layer: Layer, base: StoredTensor, axis: Axis | None) -> Factors:
    A, B = _factors(layer, base)
    m = layer.parts.get("dora_scale") or layer.parts.get("magnitude")
    if m is not None and axis is not None:
        units = base.shape[0] if axis == "output" else base.shape[1]
        if prod(m.shape) != units:
            raise layer.wrong(f"its magnitude has shape {m.shape} and the base weight {base.shape}")
    rank = layer.parts["down"].shape[0]
    return Factors(
        tuple(layer.parts.values()),
        lambda: (A(), B()),
        layer.scale(rank),
        _magnitude(layer),
        axis or "output",
    )


def _factors(layer: Layer, base: StoredTensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A of shape (rank, in · taps) and B of shape (out, rank), checked against the base."""
    layer.need("down", "up")
    down, up, mid = layer.parts["down"], layer.parts["up"], layer.parts.get("mid")
    if len(down.shape) < 2 or len(up.shape) < 2:
        raise layer.wrong(f"its factors have shapes {down.shape} and {up.shape}")
    taps = prod(base.shape[2:])
    own_taps = prod(down.shape[2:])
    if mid is not None:
        fits = mid.shape[:2] == (up.shape[1], down.shape[0]) and prod(mid.shape[2:]) == taps
        fits = fits and own_taps == 1
    else:
        fits = up.shape[1] == down.shape[0] and own_taps == taps
    if not fits or prod(up.shape[2:]) != 1 or (up.shape[0], down.shape[1]) != base.shape[:2]:
        raise layer.wrong(
            f"its factors of shapes {down.shape} and {up.shape} do not fit the base weight of "
            f"shape {base.shape}"
        )

    def first() -> Tensor:
        flat = down.load().flatten(1)
        if mid is None:
            return flat
        core = mid.load().to(torch.float64).flatten(2)
        return torch.einsum("mnt,nj->mjt", core, flat.to(torch.float64)).flatten(1)

    return first, lambda: up.load().flatten(1)


def _multiplied(layer: Layer, base: StoredTensor) -> Callable[[], Tensor]:
    A, B = _factors(layer, base)
    scale = layer.scale(layer.parts["down"].shape[0])
    return lambda: scale * (B().to(torch.float64) @ A().to(torch.float64))


def _hadamard(layer: Layer, base: StoredTensor) -> Callable[[], Tensor]:
    """LoHa: the elementwise product of two low-rank matrices."""
    layer.need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts = layer.parts
    rank = parts["hada_w1_b"].shape[0] if parts["hada_w1_b"].shape else 0
    scale = layer.scale(rank)

    def delta() -> Tensor:
        w = {name: part.load().to(torch.float64) for name, part in parts.items() if "hada" in name}
        if "hada_t1" in w and "hada_t2" in w:
            first = _tucker(w["hada_t1"], w["hada_w1_a"], w["hada_w1_b"])
            second = _tucker(w["hada_t2"], w["hada_w2_a"], w["hada_w2_b"])
        else:
            first = w["hada_w1_a"] @ w["hada_w1_b"]
            second = w["hada_w2_a"] @ w["hada_w2_b"]
        return scale * first * second

    return _checked(layer, base, delta)


def _kronecker(layer: Layer, base: StoredTensor) -> Callable[[], Tensor]:
    """LoKr: a Kronecker product, each of its factors whole or low-rank."""
    parts = layer.parts
    for number in ("1", "2"):
        if f"lokr_w{number}" not in parts:
            layer.need(f"lokr_w{number}_a", f"lokr_w{number}_b")
    ranks = [parts[n].shape[0] for n in ("lokr_w1_b", "lokr_w2_b") if parts.get(n) is not None]
    scale = layer.scale(ranks[-1]) if ranks else 1.0

    def delta() -> Tensor:
        w = {name: part.load().to(torch.float64) for name, part in parts.items() if "lokr" in name}
        first = w["lokr_w1"] if "lokr_w1" in w else w["lokr_w1_a"] @ w["lokr_w1_b"]
        if "lokr_w2" in w:
            second = w["lokr_w2"]
        elif "lokr_t2" in w:
            second = _tucker(w["lokr_t2"], w["lokr_w2_a"], w["lokr_w2_b"])
        else:
            second = w["lokr_w2_a"] @ w["lokr_w2_b"].flatten(1)
            if parts["lokr_w2_b"].shape[2:]:
                second = second.view(len(second), -1, *parts["lokr_w2_b"].shape[2:])
        first = first.view(*first.shape, *(1,) * (second.ndim - first.ndim))
        return scale * torch.kron(first, second.contiguous())

    return _checked(layer, base, delta)


def _difference(layer: Layer, base: StoredTensor) -> Callable[[], Tensor]:
    layer.need("diff")
    return _checked(layer, base, lambda: layer.parts["diff"].load().to(torch.float64))


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rebuilt: Tensor = torch.einsum("ij...,jr,ip->pr...", core, b, a)
    return rebuilt


def _checked(layer: Layer, base: StoredTensor, delta: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def checked() -> Tensor:
        try:
            update = delta()
        except (RuntimeError, ValueError) as error:
            raise layer.wrong("its tensors do not fit together") from error
        if update.numel() != prod(base.shape) or len(update) != base.shape[0]:
            raise layer.wrong(
                f"its update has shape {tuple(update.shape)} and the base weight {base.shape}"
            )
        return update

    return checked


def _dense(layer: Layer, base: StoredTensor, delta: Callable[[], Tensor]) -> Built:
    axis = _dora_axis(layer, base) if len(base.shape) > 1 else None
    magnitude = _magnitude(layer)

    def build(weight: Tensor, _site: Site) -> Tensor:
        after = weight + delta().view(weight.shape)
        if axis is None or magnitude is None:
            return after
        unit = 0 if axis == "output" else 1
        over = [dim for dim in range(after.ndim) if dim != unit]
        norm = torch.linalg.vector_norm(after, dim=over, keepdim=True)
        scaled: Tensor = after * (magnitude().to(torch.float64).view(norm.shape) / norm)
        return scaled

    return Built(tuple(layer.parts.values()), build)
