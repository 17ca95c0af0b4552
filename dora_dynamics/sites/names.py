"""What a path says: layer, stack and role of a weight, from the names that models use.

The tables are the only place that knows names. What none of them holds has its path for a role:
nothing is guessed.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

ROLES: Final[dict[str, tuple[str, ...]]] = {
    "query": ("query", "q_proj", "q_lin", "q", "q_attn", "to_q", "query_proj"),
    "key": ("key", "k_proj", "k_lin", "k", "to_k", "key_proj"),
    "value": ("value", "v_proj", "v_lin", "v", "to_v", "value_proj"),
    "output": (
        "attention.output.dense",
        "attention.dense",
        "self_attention.dense",
        "self_attn.dense",
        "out_proj",
        "o_proj",
        "out_lin",
        "o",
        "attn.c_proj",
        "crossattention.c_proj",
        "to_out.0",
        "attn.Wo",
    ),
    "query_key_value": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "attn.in_proj"),
    "up": (
        "intermediate.dense",
        "fc1",
        "up_proj",
        "lin1",
        "linear1",
        "wi",
        "wi_1",
        "mlp.c_fc",
        "mlp.fc_in",
        "dense_h_to_4h",
    ),
    "gate": ("gate_proj", "wi_0"),
    "gate_up": ("gate_up_proj", "ff.net.0.proj", "mlp.Wi"),
    "down": (
        "output.dense",
        "fc2",
        "down_proj",
        "lin2",
        "linear2",
        "wo",
        "mlp.c_proj",
        "mlp.fc_out",
        "mlp.Wo",
        "dense_4h_to_h",
        "ff.net.2",
    ),
    "router": ("mlp.gate", "block_sparse_moe.gate", "router"),
    "embedding": (
        "word_embeddings",
        "wte",
        "embed_tokens",
        "embed_in",
        "token_embedding",
        "shared",
        "backbone.embeddings",
    ),
    "position_embedding": (
        "position_embeddings",
        "wpe",
        "embed_positions",
        "position_embedding",
    ),
    "lm_head": ("lm_head",),
    "in_proj": ("mixer.in_proj",),
    "x_proj": ("mixer.x_proj",),
    "dt_proj": ("mixer.dt_proj",),
    "out_proj": ("mixer.out_proj",),
}
"""The names modules of each role go by: the last components of their paths, the longest match
first. The last four rows keep a state-space mixer's projections apart from attention's."""

_EXPERT_ROLES: Final = {"w1": "gate", "w2": "down", "w3": "up"}
"""Names that mean something only below `experts.N`, as in Mixtral's files."""

_ENDS: Final = {end: role for role, ends in ROLES.items() for end in ends}
_LONGEST: Final = max(end.count(".") + 1 for end in _ENDS)

_STACKS: Final[dict[str, tuple[str, ...]]] = {
    "vision": ("vision_model", "vision_tower", "vision_encoder", "visual"),
    "audio": ("audio_model", "audio_tower", "audio_encoder"),
    "text": ("text_model", "language_model", "text_encoder"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "down": ("down_blocks",),
    "mid": ("mid_block",),
    "up": ("up_blocks",),
}
"""Path components that name a stack; the first row that matches decides."""

_CROSS_ATTENTION: Final = frozenset(
    {
        "encoder_attn",
        "EncDecAttention",
        "crossattention",
        "cross_attn",
        "cross_attention",
        "multihead_attn",  # of torch's TransformerDecoderLayer
        "attn2",  # of a Stable Diffusion transformer block
    }
)

_WRAPPERS: Final = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
_PEFT_PREFIX: Final = re.compile(r"(^|\.)base_model\.model\.")
"""What PEFT puts before the paths of the model it wraps, also where that is part of another."""
_LAYER_CONTAINER: Final = re.compile(r"(.*_)?(layers?|blocks?|h)")


def clean_name(path: str) -> str:
    """`path` without what torch.compile, FSDP, checkpointing and PEFT put into it."""
    path = _PEFT_PREFIX.sub(r"\1", path)
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def layer_of(name: str) -> int | None:
    """The number of the layer: the one after `layers`, `h`, `block`, …, or else the first one."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if part.isdecimal() and _LAYER_CONTAINER.fullmatch(before):
            return int(part)
    return next((int(part) for part in parts if part.isdecimal()), None)


def stack_of(name: str) -> str:
    """The stack that the path names: "encoder", "decoder", "vision", …; "" where it names none."""
    parts = frozenset(name.split("."))
    return next((stack for stack, names in _STACKS.items() if parts & frozenset(names)), "")


def role_of(name: str) -> str:
    """The role a path tells; where the tables have none, the path itself, "*" for its numbers.

    "cross_" stands before the role in cross-attention, "expert_" and "shared_" in a
    mixture of experts.
    """
    parts = name.split(".")
    role = _known_role(parts)
    if role is None:
        return ".".join("*" if part.isdecimal() else part for part in parts)
    if _CROSS_ATTENTION.intersection(parts):
        return f"cross_{role}"
    if "experts" in parts:
        return f"expert_{role}"
    if any(part in ("shared_expert", "shared_experts") for part in parts):
        return f"shared_{role}"
    return role


def is_known(name: str) -> bool:
    """Whether the tables know the role of the weight at this path."""
    return _known_role(name.split(".")) is not None


def _known_role(parts: list[str]) -> str | None:
    for length in range(min(_LONGEST, len(parts)), 0, -1):
        role = _ENDS.get(".".join(parts[-length:]))
        if role is not None:
            return role
    if "experts" in parts[:-1]:
        return _EXPERT_ROLES.get(parts[-1])
    return None
