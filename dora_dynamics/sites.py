"""Which weights of a model are followed, and what they are: layer, stack, role, output axis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

ROLES: Final[dict[str, tuple[str, ...]]] = {
    "query": ("query", "q_proj", "q_lin", "q"),
    "key": ("key", "k_proj", "k_lin", "k"),
    "value": ("value", "v_proj", "v_lin", "v"),
    "output": ("attention.output.dense", "out_proj", "o_proj", "out_lin", "o", "attn.c_proj"),
    "query_key_value": ("c_attn", "query_key_value", "qkv_proj", "in_proj", "qkv"),
    "up": ("intermediate.dense", "fc1", "up_proj", "lin1", "wi", "mlp.c_fc", "dense_h_to_4h"),
    "gate": ("gate_proj",),
    "down": ("output.dense", "fc2", "down_proj", "lin2", "wo", "mlp.c_proj", "dense_4h_to_h"),
}
"""The names modules of each role go by: the last one or two components of the module's path."""

_STACKS: Final = ("encoder", "decoder")
_CROSS_ATTENTION: Final = ("encoder_attn", "EncDecAttention", "crossattention", "cross_attn")


@dataclass(frozen=True)
class Site:
    """One weight that is followed.

    Attributes:
        name: path of the module in the model.
        layer: number of its layer within its stack, None where the path has no number.
        stack: "encoder" or "decoder" where the model has both, else "".
        role: what the weight does ("query", "value", …); the module's own name where unknown.
        stored_transposed: True where the module stores (in, out), as GPT-2's Conv1D does, and
            False where it stores (out, in), as `nn.Linear` does.
    """

    name: str
    layer: int | None
    stack: str
    role: str
    stored_transposed: bool = False

    def oriented(self, weight: Tensor) -> Tensor:
        """A view of a weight as this module stores it, in the orientation (out, in)."""
        return weight.T if self.stored_transposed else weight


class NoSiteMatchesError(ValueError):
    """No weight of the model matches the targets; the message lists what there is."""


def find_sites(model: nn.Module, targets: Sequence[str | re.Pattern[str]]) -> list[Site]:
    """The weights of `model` that `targets` selects, in the model's own order.

    Args:
        model: any module; linear layers (`nn.Linear`, GPT-2's Conv1D) can be followed.
        targets: each a role ("query"), the end of a module's path ("q_proj",
            "self_attn.q_proj"), a glob over whole paths ("encoder.*.query") or a compiled regular
            expression searched in the path. A weight is selected if any of them matches.

    Raises:
        TypeError: `targets` is one string; pass a list.
        NoSiteMatchesError: one of the targets matches nothing.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be a list of strings: [{targets!r}], not {targets!r}.")
    available = [
        describe_site(name, module)
        for name, module in model.named_modules()
        if is_linear(module) and not _inside_parametrization(name)
    ]
    if not targets:
        raise NoSiteMatchesError(f"targets is empty. {_list_available(available)}")
    selected: set[str] = set()
    for target in targets:
        matched = {site.name for site in available if _matches(site, target)}
        if not matched:
            shown = target.pattern if isinstance(target, re.Pattern) else target
            raise NoSiteMatchesError(
                f"no linear layer matches the target {shown!r}. {_list_available(available)}"
            )
        selected |= matched
    return [site for site in available if site.name in selected]


def describe_site(name: str, module: nn.Module) -> Site:
    """What the module at path `name` is, from its path and its type."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return Site(
        name=name,
        layer=numbers[0] if numbers else None,
        stack=next((part for part in parts if part in _STACKS), ""),
        role=role_of(name),
        stored_transposed=_is_conv1d(module),
    )


def role_of(name: str) -> str:
    """The role a module's path tells, "cross_" before it in cross-attention; else its own name."""
    ends = {end: role for role, names in ROLES.items() for end in names}
    parts = name.split(".")
    for length in (2, 1):
        role = ends.get(".".join(parts[-length:]))
        if role is not None:
            is_cross = any(part in _CROSS_ATTENTION for part in parts)
            return f"cross_{role}" if is_cross else role
    return parts[-1]


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one matrix that it calls `weight`."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D, told by its name so that transformers need not be installed."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def _inside_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def _matches(site: Site, target: str | re.Pattern[str]) -> bool:
    if isinstance(target, re.Pattern):
        return target.search(site.name) is not None
    return (
        target in (site.role, site.name)
        or site.name.endswith("." + target)
        or fnmatchcase(site.name, target)
    )


def _list_available(available: Iterable[Site]) -> str:
    by_role: dict[str, list[str]] = {}
    for site in available:
        by_role.setdefault(site.role, []).append(site.name)
    if not by_role:
        return "The model has no linear layers."
    listed = ", ".join(
        f"{role!r} ({len(names)}, such as {names[0]})" for role, names in by_role.items()
    )
    return f"There are, by role: {listed}."
