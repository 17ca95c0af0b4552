"""Effective weights that a user says how to read: one function for a class of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

from dora_dynamics.sites import register_linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NO_MATRIX: Final = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)
_functions: dict[type[nn.Module], Callable[[nn.Module], Tensor]] = {}


def register_effective_weight(
    module_type: type[nn.Module], function: Callable[[nn.Module], Tensor]
) -> None:
    """Say how the effective weight of a module is read.

    For an adapter of your own that neither exposes its effective weight as `.weight` nor can be
    probed (see `probe.probed_weight`), or that is cheaper to read than to probe. Modules of the
    class are followed as linear layers from now on (as `register_linear` makes them be), by their
    `in_features` and `out_features` or those of their `base_layer`.

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
    if not issubclass(module_type, NO_MATRIX):
        register_linear(module_type)


def registered_function(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """The function registered for the class of `module`, or for the nearest of its bases."""
    if not _functions:
        return None
    return next((_functions[cls] for cls in type(module).__mro__ if cls in _functions), None)
