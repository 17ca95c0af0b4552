"""LoRA and DoRA in plain PyTorch: the reference to read and to teach from.

Both are parametrizations (`torch.nn.utils.parametrize`): the module keeps its class and its
forward, and its `.weight` *is* the effective weight W'. The pre-trained weight stays inside,
frozen. `merge` writes W' into the module and removes every trace of the adapter, so that a merged
module runs as one that was never adapted.

This has a price while training: since `.weight` stays the effective weight, W' is built in forward
and kept for backward, which forms the dense gradient of W', as large as the weight itself. For
training at scale use PEFT's adapters, which `Recorder` follows as well; `analyses.adapter_cost`
measures both.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from dora_dynamics.errors import InputError
from dora_dynamics.sites import Site, find_sites

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

    from torch import Tensor


class LoRA(nn.Module):
    """W' = W_0 + s·B A (Eq. 1), with s = alpha / rank.

    `A` has shape (rank, in) and starts Kaiming-uniform; `B` has shape (out, rank) and starts at
    zero, so that training starts from the pre-trained weight. Below a bf16 or fp16 weight they are
    fp32, as is the arithmetic up to W', which has the weight's own dtype.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        alpha: float,
        stored_transposed: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        out_features, in_features = weight.T.shape if stored_transposed else weight.shape
        self.rank = rank
        self.scaling = alpha / rank
        self.stored_transposed = stored_transposed
        dtype = torch.promote_types(weight.dtype, torch.float32)
        where = weight.device if generator is None else generator.device
        start = torch.empty(rank, in_features, dtype=dtype, device=where)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(weight.device))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, stored as `weight` is."""
        return self._updated(weight).to(weight.dtype)

    def _updated(self, weight: Tensor) -> Tensor:
        """W_0 + s·B A, stored as `weight` is, in the precision of A and B."""
        return _updated(weight, self.lora_A, self.lora_B, self.scaling, self.stored_transposed)


class DoRA(LoRA):
    """W' = m · (W_0 + s·B A) / ‖W_0 + s·B A‖_c (Eq. 5).

    `magnitude` is m, shape (out,), and starts at ‖W_0‖_c. With `detach_norm` the norm below the
    fraction is a constant to the gradient (Sec. 4.3, Eq. 11), and V = W_0 + s·B A, as large as the
    weight and in fp32, need not be kept for backward; without it the gradient is the exact one
    (Eq. 6), projected off each unit's own direction. A unit of W_0 whose
    norm is zero has no direction to scale, and stays zero.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        alpha: float,
        stored_transposed: bool = False,
        detach_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            weight,
            rank=rank,
            alpha=alpha,
            stored_transposed=stored_transposed,
            generator=generator,
        )
        self.detach_norm = detach_norm
        start = weight.detach().to(self.lora_A.dtype)
        dim = 0 if stored_transposed else 1
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(start, dim=dim))

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, stored as `weight` is."""
        if self.detach_norm:
            factors = (self.lora_A, self.lora_B, self.magnitude)
            result: Tensor
            result, _ = _ScaledByConstant.apply(  # type: ignore[no-untyped-call]
                weight, *factors, self.scaling, self.stored_transposed
            )
            return result
        turned = self._updated(weight)
        norm = _norm(turned, self.stored_transposed)
        return ((self.magnitude.view_as(norm) / norm) * turned).to(weight.dtype)


def _updated(weight: Tensor, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """W_0 + s·B A, stored as `weight` is."""
    update = scaling * (B @ A)
    return weight + (update.T if transposed else update)


def _norm(weight: Tensor, transposed: bool) -> Tensor:
    """Norm of each unit, 1 where it is 0, shaped to broadcast over the weight as it is stored."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=0 if transposed else 1, keepdim=True)
    return norm.masked_fill(norm == 0, 1.0)


class _ScaledByConstant(torch.autograd.Function):
    """W' of DoRA where the norm is a constant, and Eq. 11 from W_0, A, B and the norm alone.

    With G the gradient of W' and c = m/‖V‖, the gradients are s·(c∘G) Aᵀ of B, s·Bᵀ (c∘G) of A and
    Σ G∘V / ‖V‖ of m, where Σ G∘V = Σ G∘W_0 + s Σ (G Aᵀ)∘B: nothing as large as the weight is kept
    from forward to backward. Autograd would keep V for the gradient of m.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float, transposed: bool
    ) -> tuple[Tensor, Tensor]:
        turned = _updated(weight, A, B, scaling, transposed)
        norm = _norm(turned, transposed)
        result = (m.view_as(norm) / norm) * turned
        if result.dtype != weight.dtype:  # compiled by torch 2.11, one that changes nothing loses
            result = result.to(weight.dtype)  # the gradient
        return result, norm.flatten()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, A, B, m, ctx.scaling, ctx.transposed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, A, B, m, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, m, norm = ctx.saved_tensors
        G = (gradients[0].T if ctx.transposed else gradients[0]).to(A.dtype)
        rows = weight.T if ctx.transposed else weight
        scale = (m / norm).unsqueeze(1)
        projected = G @ A.T
        of_weight = of_A = of_B = of_m = None
        if ctx.needs_input_grad[0]:
            of_weight = (scale * G).to(weight.dtype)
            of_weight = of_weight.T if ctx.transposed else of_weight
        if ctx.needs_input_grad[1]:
            of_A = ctx.scaling * ((scale * B).T @ G)
        if ctx.needs_input_grad[2]:
            of_B = ctx.scaling * (scale * projected)
        if ctx.needs_input_grad[3]:
            along = torch.linalg.vecdot(G, rows.to(A.dtype))
            of_m = (along + ctx.scaling * torch.linalg.vecdot(projected, B)) / norm
        return of_weight, of_A, of_B, of_m, None, None


def apply_lora(
    model: nn.Module,
    targets: Sequence[str | re.Pattern[str]],
    *,
    rank: int = 16,
    alpha: float = 16.0,
    generator: torch.Generator | None = None,
) -> list[Site]:
    """Put LoRA (Eq. 1) on the selected linear layers of `model`, in place.

    Every other parameter of the model is frozen, but for those of adapters applied before; set
    `requires_grad` again on what should also train (a classification head, say).

    Args:
        model: the pre-trained model.
        targets: roles, module names, globs or patterns, as in `sites.find_sites`.
        rank: columns of B and rows of A.
        alpha: the update is scaled by alpha / rank.
        generator: source of randomness for A, on any device: one on the CPU gives the same
            start wherever the model is; the global one of the weights' device if None.

    Returns:
        The sites that carry an adapter now.

    Raises:
        InputError: a target matches nothing, the rank is not a whole number above 0, or a selected
            layer already carries an adapter.
    """
    return _apply(LoRA, model, targets, rank, alpha=alpha, generator=generator)


def apply_dora(
    model: nn.Module,
    targets: Sequence[str | re.Pattern[str]],
    *,
    rank: int = 16,
    alpha: float = 16.0,
    detach_norm: bool = True,
    generator: torch.Generator | None = None,
) -> list[Site]:
    """Put DoRA (Eq. 5) on the selected linear layers of `model`, in place.

    Args:
        model: the pre-trained model.
        targets: roles, module names, globs or patterns, as in `sites.find_sites`.
        rank: columns of B and rows of A.
        alpha: the low-rank update is scaled by alpha / rank.
        detach_norm: treat the norm as a constant in the backward pass (Eq. 11), as PEFT does and
            the paper recommends; False gives the exact gradient (Eq. 6).
        generator: source of randomness for A, on any device: one on the CPU gives the same
            start wherever the model is; the global one of the weights' device if None.

    Returns:
        The sites that carry an adapter now. All other parameters are frozen, as in `apply_lora`.

    Raises:
        InputError: as in `apply_lora`.
    """
    return _apply(
        DoRA, model, targets, rank, alpha=alpha, generator=generator, detach_norm=detach_norm
    )


def _apply(
    adapter: type[LoRA],
    model: nn.Module,
    targets: Sequence[str | re.Pattern[str]],
    rank: int,
    **options: object,
) -> list[Site]:
    try:
        rank = operator.index(rank)
    except TypeError:
        raise InputError(f"rank must be a whole number, not {rank!r}.") from None
    if rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}.")
    sites = find_sites(model, targets)
    for site in sites:
        if parametrize.is_parametrized(model.get_submodule(site.name), "weight"):
            raise InputError(f"{site.name} already has a parametrized weight; merge it first.")
    earlier = {
        parameter
        for module in model.modules()
        if isinstance(module, LoRA)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    model.requires_grad_(False)
    for parameter in earlier:
        parameter.requires_grad_(True)
    for site in sites:
        module = model.get_submodule(site.name)
        weight = cast("Tensor", module.weight)
        parametrization = adapter(
            weight,
            rank=rank,
            stored_transposed=site.stored_transposed,
            **options,  # type: ignore[arg-type]
        )
        parametrize.register_parametrization(module, "weight", parametrization)
    return sites


def adapter_of(module: nn.Module) -> LoRA | None:
    """The LoRA or DoRA that alone parametrizes the module's weight, or None.

    None also for a subclass with a forward of its own: its weight is not what the factors say.
    """
    alone = _alone_on_weight(module)
    if alone is None or type(alone).forward not in (LoRA.forward, DoRA.forward):
        return None
    return alone


def _alone_on_weight(module: nn.Module) -> LoRA | None:
    """The LoRA or DoRA, or one derived from them, that alone parametrizes a module's weight."""
    stack = _parametrizations_of_weight(module)
    if stack is None or len(stack._modules) != 1:
        return None
    (only,) = stack._modules.values()
    return only if isinstance(only, LoRA) else None


def pretrained_weight(module: nn.Module) -> nn.Parameter:
    """The frozen W_0 below the module's parametrization, stored as the module stores it."""
    return cast("nn.Parameter", cast("nn.Module", _parametrizations_of_weight(module)).original)


def _parametrizations_of_weight(module: nn.Module) -> nn.Module | None:
    """Torch's list of what parametrizes a weight, taken from where modules keep it.

    Attributes that are modules take torch some ten times as long to find, and this is asked for
    each followed weight at each recorded step.
    """
    stacks = module._modules.get("parametrizations")
    return stacks._modules.get("weight") if isinstance(stacks, nn.ModuleDict) else None


def merge(model: nn.Module) -> nn.Module:
    """Write every LoRA's and DoRA's effective weight into its module and remove the adapter.

    The modules are plain again: same outputs to within rounding, nothing of the adapter left in
    the forward path, in the parameters or in the state dict. The merged weights stay frozen.

    Returns:
        `model` itself, changed in place.

    Raises:
        InputError: the model carries no adapter of this package, or one that shares its weight
            with another parametrization; nothing is merged then.
    """
    adapted = [module for module in model.modules() if _alone_on_weight(module) is not None]
    alone = {id(_alone_on_weight(module)) for module in adapted}
    if any(isinstance(module, LoRA) and id(module) not in alone for module in model.modules()):
        raise InputError(
            "a weight carries another parametrization beside its LoRA or DoRA: remove that first "
            "(torch.nn.utils.parametrize.remove_parametrizations)."
        )
    if not adapted:
        raise InputError("the model carries no LoRA or DoRA of dora_dynamics to merge.")
    for module in adapted:
        with torch.no_grad():
            merged = cast("Tensor", module.weight).clone()
        original = pretrained_weight(module)
        _give_own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        others = dict(module.named_parameters(recurse=False))
        for name in others:
            delattr(module, name)
        others.pop("weight")
        # As in the plain module, the weight first: optimizers know parameters by their order.
        module.weight = nn.Parameter(merged, requires_grad=original.requires_grad)
        for name, parameter in others.items():
            module.register_parameter(name, parameter)
    return model


def _give_own_class(module: nn.Module) -> None:
    """Part the class that `parametrize` made for a module from that of the module's deep copies.

    Copies share it, and torch takes the weight off the class when a parametrization is removed:
    merging a copy would leave the original without a weight.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
