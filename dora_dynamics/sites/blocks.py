"""Which rows of a projection belong to which head, and of a fused one, to query, key or value.

What splits a fused weight is its model's own convention: it is looked up by the `model_type` of
the configuration and never read off the shape. A model that is not listed keeps its fused weights
whole, and head counts that do not fit the shape leave a weight without heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Layout = Literal["concatenated", "per_head", "per_group", "falcon", "gpt_bigcode"]


class Block(NamedTuple):
    """A range of output features that does one thing; head is None where there are none."""

    role: str
    head: int | None
    start: int
    stop: int


QUERY_KEY_VALUE: Final[dict[tuple[str, str], Layout]] = {
    ("gpt2", "c_attn"): "concatenated",
    ("imagegpt", "c_attn"): "concatenated",
    ("decision_transformer", "c_attn"): "concatenated",
    ("openai-gpt", "c_attn"): "concatenated",
    ("gpt_bigcode", "c_attn"): "gpt_bigcode",
    ("gpt_neox", "query_key_value"): "per_head",
    ("gpt_neox_japanese", "query_key_value"): "per_head",
    ("bloom", "query_key_value"): "per_head",
    ("persimmon", "query_key_value"): "per_head",
    ("falcon", "query_key_value"): "falcon",
    ("phi3", "qkv_proj"): "concatenated",
    ("phi4_multimodal", "qkv_proj"): "concatenated",
    ("mpt", "Wqkv"): "concatenated",
    ("modernbert", "Wqkv"): "concatenated",
    ("torch.MultiheadAttention", "in_proj_weight"): "concatenated",
}
"""How a fused query-key-value weight is laid out: (model_type, last name in the path)."""

GATE_UP: Final = frozenset({"phi3", "phi4_multimodal", "glm", "glm4", "mixtral", "qwen2_moe",
                            "qwen3_moe"})  # fmt: skip
"""Models whose `gate_up_proj` holds the gate's rows first and then those of up."""

TRANSPOSED: Final = frozenset({"gpt2", "imagegpt", "decision_transformer", "openai-gpt"})
"""Models whose linear layers are Conv1D: stored (in, out)."""

CONV1D_NAMES: Final = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Names that Conv1D layers go by, and `nn.Linear` ones of other models too."""


@dataclass(frozen=True)
class Heads:
    """What is known of a model's attention heads; None where it is not known."""

    query: int | None
    key_value: int | None
    size: int | None


def heads_of(config: Mapping[str, Any], stack: str = "") -> Heads:
    """Head counts and head size of a stack, as the keys of `config.json` name them."""
    query = _first(config, f"{stack}_attention_heads", "num_attention_heads", "n_head",
                   "num_heads", "n_heads", "encoder_attention_heads")  # fmt: skip
    key_value = _first(config, "num_key_value_heads", "num_kv_heads")
    size = _first(config, "head_dim", "d_kv")
    if size is None and query is not None:
        width = _first(config, "hidden_size", "n_embd", "d_model", "dim")
        size = width // query if width is not None and width % query == 0 else None
    return Heads(query, key_value if key_value is not None else query, size)


def own_blocks(role: str, rows: int, heads: Heads) -> tuple[Block, ...]:
    """The heads of a projection that is only query, only key or only value."""
    part = role.removeprefix("cross_")
    if part not in ("query", "key", "value"):
        return ()
    count = heads.query if part == "query" else heads.key_value
    if count is None or heads.size is None or count * heads.size != rows:
        return ()
    size = heads.size
    return tuple(Block(role, head, head * size, (head + 1) * size) for head in range(count))


def fused_blocks(
    name: str, role: str, rows: int, heads: Heads, config: Mapping[str, Any]
) -> tuple[Block, ...]:
    """The parts of a fused projection, in the order of its rows; () where they are not known.

    Args:
        name: last component of the path.
        role: role of the whole, "query_key_value" or "gate_up", with any prefix it has.
        rows: number of output features.
        heads: of this stack.
        config: the model's configuration; its `model_type` decides.
    """
    model_type = str(config.get("model_type", ""))
    if role.endswith("gate_up"):
        return _gate_up(role.removesuffix("gate_up"), rows) if model_type in GATE_UP else ()
    layout = QUERY_KEY_VALUE.get((model_type, name))
    if layout is None or not role.endswith("query_key_value"):
        return ()
    prefix = role.removesuffix("query_key_value")
    if heads.query is None or heads.size is None:
        return ()
    pattern = _pattern(layout, prefix, rows, heads, config)
    if len(pattern) * heads.size != rows:
        return ()
    return tuple(
        Block(prefix + part, head, i * heads.size, (i + 1) * heads.size)
        for i, (part, head) in enumerate(pattern)
    )


def _pattern(
    layout: Layout, prefix: str, rows: int, heads: Heads, config: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """(part, head) of each successive block of head-size rows."""
    query = heads.query or 0
    key_value = heads.key_value or query
    if layout == "falcon":
        if config.get("new_decoder_architecture"):
            layout = "per_group"
        elif config.get("multi_query"):
            layout, key_value = "concatenated", 1
        else:
            layout = "per_head"
    elif layout == "gpt_bigcode":
        multi_query = config.get("multi_query", True)
        layout, key_value = ("concatenated", 1) if multi_query else ("per_head", query)
    if layout == "per_head":
        return [(part, head) for head in range(query) for part in ("query", "key", "value")]
    if layout == "per_group":
        size = query // key_value
        return [
            entry
            for group in range(key_value)
            for entry in [
                *(("query", group * size + i) for i in range(size)),
                ("key", group),
                ("value", group),
            ]
        ]
    keys = [("key", i) for i in range(key_value)] + [("value", i) for i in range(key_value)]
    if prefix == "cross_" and heads.size and rows == len(keys) * heads.size:
        return keys  # GPT-2's cross-attention, whose query is a module of its own
    return [("query", i) for i in range(query)] + keys


def _gate_up(prefix: str, rows: int) -> tuple[Block, ...]:
    half = rows // 2
    if 2 * half != rows:
        return ()
    return (Block(f"{prefix}gate", None, 0, half), Block(f"{prefix}up", None, half, rows))


def merged(blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    """The rows of some blocks as ranges, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block.start:
            ranges[-1] = (ranges[-1][0], block.stop)
        else:
            ranges.append((block.start, block.stop))
    return tuple(ranges)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), None)
