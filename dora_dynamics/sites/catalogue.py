"""The sites a tensor offers, from its name, its shape and the model's configuration.

Files on disk know nothing else; a live model adds what its modules say (see `models`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from dora_dynamics.errors import InputError
from dora_dynamics.sites.blocks import (
    CONV1D_NAMES,
    GATE_UP,
    TRANSPOSED,
    Block,
    Heads,
    fused_blocks,
    heads_of,
    merged,
    own_blocks,
)
from dora_dynamics.sites.names import clean_name, is_known, layer_of, role_of, stack_of
from dora_dynamics.sites.site import Kind, Site

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EMBEDDING: Final = re.compile(r"(^|_)embed|embeddings?$|^wte$|^wpe$|^shared$|_attention_bias$")
"""Names that embeddings go by; what is in a file does not tell them from linear layers."""

Granularity = Literal["module", "matrix", "head"]
GRANULARITIES: Final[tuple[Granularity, ...]] = get_args(Granularity)


EXPERTS_STORED_TRANSPOSED: Final = {
    "mixtral": False,
    "qwen2_moe": False,
    "qwen3_moe": False,
    "gpt_oss": True,
}
"""How models store the experts of a layer in one tensor: (experts, in, out) where True."""


class UnknownAxisError(InputError):
    """A stored tensor does not say which of its dimensions counts output features."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a model and the sites it can be followed as.

    Attributes:
        wholes: the tensor itself as one site, or one site for each expert it holds.
        blocks: its rows by part and head; empty where they are not known.
    """

    wholes: tuple[Site, ...]
    blocks: tuple[Block, ...] = ()

    @property
    def role(self) -> str:
        """Role of the whole."""
        return self.wholes[0].role

    @property
    def kind(self) -> Kind:
        """Kind of the whole."""
        return self.wholes[0].kind

    @property
    def parts(self) -> tuple[Site, ...]:
        """Query, key and value (gate and up) of a fused weight; empty where it is not fused."""
        by_role: dict[str, list[Block]] = defaultdict(list)
        for block in self.blocks:
            by_role[block.role].append(block)
        if set(by_role) <= {self.role}:
            return ()
        return tuple(
            replace(whole.part(_bare(role)), role=role, rows=merged(by_role[role]))
            for whole in self.wholes
            for role in by_role
        )

    def heads(self, site: Site) -> tuple[Site, ...]:
        """The attention heads of one of `wholes` or `parts`; empty where it has none known."""
        found: dict[tuple[str, int], list[Block]] = defaultdict(list)
        whole = site.rows is None
        for block in self.blocks:
            if block.head is not None and (whole or block.role == site.role):
                found[block.role, block.head].append(block)
        fused = whole and bool(self.parts)
        return tuple(
            replace(
                site.part(_bare(role)) if fused else site,
                role=role,
                rows=merged(blocks),
                head=head,
            )
            for (role, head), blocks in sorted(
                found.items(), key=lambda item: (_part_order(item[0][0]), item[0][1])
            )
        )


def describe_tensor(
    name: str,
    shape: Sequence[int],
    config: Mapping[str, Any] | None = None,
    granularity: Granularity = "matrix",
) -> list[Site]:
    """The sites of a stored tensor: its parts where it is fused, its experts, or itself.

    Args:
        name: as in the file, `….self_attn.q_proj.weight`.
        shape: of the stored tensor.
        config: content of the model's `config.json`; without it fused weights stay whole.
        granularity: "module" leaves fused weights whole, "matrix" splits them into query, key
            and value, "head" gives one site for each attention head where there are heads.

    Returns:
        An empty list for what has no units: a scalar, or a tensor that is no known kind of
        weight (3-D and not experts, and so on).

    Raises:
        UnknownAxisError: the name is one GPT-2's transposed Conv1D goes by, and `config` does not
            say which model it is.
    """
    weight = describe_weight(name, shape, config)
    return [] if weight is None else expand(weight, granularity)


def expand(weight: Weight, granularity: Granularity) -> list[Site]:
    """The finest sites of `weight` at this granularity; they cover it and do not overlap."""
    if granularity == "module":
        return list(weight.wholes)
    sites = weight.parts or weight.wholes
    if granularity == "matrix":
        return list(sites)
    return [head for site in sites for head in weight.heads(site) or (site,)]


def describe_weight(
    name: str, shape: Sequence[int], config: Mapping[str, Any] | None = None
) -> Weight | None:
    """What a stored tensor is, or None where it has no units; as in `describe_tensor`."""
    path, _, parameter = clean_name(name).rpartition(".")
    config = config or {}
    leaf = path.rpartition(".")[2]
    dimensions = len(shape)
    if 0 in shape or dimensions == 0 or not parameter:
        return None
    if parameter in ("gate_up_proj", "up_proj", "gate_proj", "down_proj") and dimensions == 3:
        return _stored_experts(path, parameter, shape, config)
    if parameter == "in_proj_weight" and dimensions == 2:
        return whole_weight(path, parameter, "matrix", shape, config=config)
    if parameter == "bias" and dimensions == 1:
        return whole_weight(path, parameter, "vector", shape)
    if parameter != "weight":
        return None
    kind: Kind
    if dimensions == 1:
        kind = "vector"
    elif dimensions == 2:
        kind = "embedding" if _EMBEDDING.search(leaf) else "matrix"
    else:
        kind = "filters"
    transposed = False
    if kind == "matrix" and leaf in CONV1D_NAMES:
        if "model_type" not in config:
            raise UnknownAxisError(
                f"{name} may be stored (in, out), as GPT-2 does, or (out, in): give the model's "
                "config.json, whose model_type tells."
            )
        transposed = config["model_type"] in TRANSPOSED
    return whole_weight(path, parameter, kind, shape, config=config, stored_transposed=transposed)


def whole_weight(
    path: str,
    parameter: str,
    kind: Kind,
    shape: Sequence[int],
    *,
    config: Mapping[str, Any] | None = None,
    heads: Heads | None = None,
    stored_transposed: bool = False,
    module: str = "",
) -> Weight:
    """One tensor as a `Weight`, with the rows of its parts and heads where they are known.

    Args:
        path: clean path of the module.
        parameter: the module's name for the tensor.
        kind: see `Site`.
        shape: of the stored tensor.
        config: configuration that covers this module.
        heads: what is known of its attention heads; by default what `config` says.
        stored_transposed: see `Site`.
        module: path of the module in the live model.
    """
    is_weight = parameter == "weight"
    name = path if is_weight else f"{path}.{parameter}" if path else parameter
    layer, stack = layer_of(path), stack_of(path)
    role = _role(path, parameter, kind)
    site = Site(
        name, layer, stack, role, stored_transposed, kind, module=module or path,
        parameter=parameter,
    )  # fmt: skip
    if kind != "matrix":
        return Weight((site,))
    config = sub_config(config or {}, stack)
    heads = heads or heads_of(config, stack)
    rows = int(shape[1] if stored_transposed else shape[0])
    if role.endswith(("query_key_value", "gate_up")):
        leaf = name.rpartition(".")[2]
        return Weight((site,), fused_blocks(leaf, role, rows, heads, config))
    return Weight((site,), own_blocks(role, rows, heads))


def expert_weight(
    path: str,
    parameter: str,
    shape: Sequence[int],
    *,
    stored_transposed: bool,
    gate_first: bool,
    module: str = "",
) -> Weight:
    """A tensor that holds one matrix for each expert of a layer.

    Args:
        path: clean path of the module.
        parameter: the module's name for the tensor.
        shape: (experts, out, in), or (experts, in, out) with `stored_transposed`.
        stored_transposed: see `Site`.
        gate_first: `gate_up_proj` holds the gate's rows first and then those of up, so that it
            can be split.
        module: path of the module in the live model.
    """
    name = f"{path}.{parameter}"
    role = role_of(name)
    wholes = tuple(
        Site(
            f"{name}[{expert}]", layer_of(path), stack_of(path), role, stored_transposed,
            module=module or path, parameter=parameter, expert=expert,
        )
        for expert in range(shape[0])
    )  # fmt: skip
    rows = int(shape[2] if stored_transposed else shape[1])
    can_split = gate_first and role.endswith("gate_up")
    return Weight(wholes, fused_blocks("", role, rows, Heads(None, None, None),
                                       {"model_type": "mixtral"}) if can_split else ())  # fmt: skip


def _stored_experts(
    path: str, parameter: str, shape: Sequence[int], config: Mapping[str, Any]
) -> Weight:
    model_type = config.get("model_type")
    if model_type not in EXPERTS_STORED_TRANSPOSED:
        raise UnknownAxisError(
            f"{path}.{parameter} holds the experts of a layer as (experts, out, in) or as "
            "(experts, in, out): give the config.json of a model that is known to store "
            f"them one way ({', '.join(sorted(EXPERTS_STORED_TRANSPOSED))})."
        )
    transposed = EXPERTS_STORED_TRANSPOSED[model_type]
    return expert_weight(
        path, parameter, shape, stored_transposed=transposed, gate_first=model_type in GATE_UP
    )


def sub_config(config: Mapping[str, Any], stack: str) -> Mapping[str, Any]:
    """The part of a configuration that is about one stack: `vision_config`, `text_config`, …."""
    inner = config.get(f"{stack}_config")
    return inner if isinstance(inner, dict) else config


def _role(path: str, parameter: str, kind: Kind) -> str:
    if parameter == "in_proj_weight":
        cross = role_of(f"{path}.q_proj").removesuffix("query")
        return f"{cross}query_key_value"
    if parameter not in ("weight", "bias"):
        return role_of(f"{path}.{parameter}")
    own = role_of(path)
    if kind != "vector":
        return own
    if parameter == "bias":
        return f"{own}_bias" if is_known(path) else "norm_bias" if _is_norm(path) else "bias"
    return "norm" if _is_norm(path) else own


def _is_norm(path: str) -> bool:
    lowered = path.rpartition(".")[2].lower()
    return "norm" in lowered or "layrnorm" in lowered or lowered.startswith("ln_")


def _bare(role: str) -> str:
    """The part's own name: a prefix of the role is in the path already."""
    return role.rpartition("_")[2]


def _part_order(role: str) -> int:
    order = ("query", "key", "value", "gate", "up")
    return order.index(_bare(role)) if _bare(role) in order else len(order)
