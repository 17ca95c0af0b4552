"""Effective weights that a user says how to read: one function for a class of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_functions: dict[type[nn.Module], Callable[[nn.Module], Tensor]] = {}


def register_effective_weight(
    module_type: type[nn.Module], function: Callable[[nn.Module], Tensor]
) -> None:
    """Say how the effective weight of a module is read.

    For an adapter of your own that neither exposes its effective weight as `.weight` nor can be
    probed (see `probe.probed_weight`), or that is cheaper to read than to probe.

    Args:
        module_type: class of the module, subclasses included; the last registration of a class
            counts.
        function: given a module, its effective weight W', in the orientation of the layer that it
            stands for: (out, in) for a linear layer. It is called without gradients and must
            leave the module as it is.

    Example:
        >>> class ScaledLinear(nn.Module):  # y = (g ∘ W_0) x, one g per output
        ...     def __init__(self, base):
        ...         super().__init__()
        ...         self.base_layer = base.requires_grad_(False)
        ...         self.gain = nn.Parameter(torch.ones(base.out_features, 1))
        ...
        >>> dd.register_effective_weight(ScaledLinear, lambda m: m.gain * m.base_layer.weight)
    """
    _functions[module_type] = function


def registered_function(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """The function registered for the class of `module`, or for the nearest of its bases."""
    return next((_functions[cls] for cls in type(module).__mro__ if cls in _functions), None)
