"""Models of many architectures, built tiny, and what each of their linear layers is.

Each is built from its configuration class in transformers. `ARCHITECTURES` says what its linear
layers are in words that do not come from the package; README's table is of these models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WIDTH, HEADS, KV, SIZE, FFN = 16, 4, 2, 4, 24
"""Width, heads, key-value heads, head size and inner width of every model here."""

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASIC: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "vocab_size": 32,
}
LLAMA: dict[str, Any] = BASIC | IDS | {"num_key_value_heads": KV, "head_dim": SIZE}
SEQ2SEQ: dict[str, Any] = IDS | {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "vocab_size": 32,
    "decoder_start_token_id": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "image_size": 8,
    "patch_size": 4,
}


def build(model: str, config: str, **settings: Any) -> nn.Module:
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return built


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what its linear layers are: a pattern of paths → what they are.

    `(\\d+)` in a pattern is the number of the layer. A value is "stack/role" or "role".
    """

    make: Callable[[], nn.Module]
    linears: Mapping[str, str]
    heads: Mapping[str, int] = field(default_factory=dict)
    transposed: str = r"(?!)"


def attention(prefix: str, names: str, stack: str = "", cross: str = "") -> dict[str, str]:
    """Query, key, value and output of an attention module, by the four names they have there."""
    roles = (f"{stack}/{cross}{role}" for role in ("query", "key", "value", "output"))
    return dict(zip((prefix + re.escape(name) for name in names.split()), roles, strict=True))


SEPARATE = {"query": HEADS, "key": HEADS, "value": HEADS}
GROUPED = {"query": HEADS, "key": KV, "value": KV}
LLAMA_LINEARS = attention(r"model\.layers\.(\d+)\.self_attn\.", "q_proj k_proj v_proj o_proj") | {
    r"model\.layers\.(\d+)\.mlp\.gate_proj": "gate",
    r"model\.layers\.(\d+)\.mlp\.up_proj": "up",
    r"model\.layers\.(\d+)\.mlp\.down_proj": "down",
    "lm_head": "lm_head",
}
BERT_LINEARS = attention(
    r"encoder\.layer\.(\d+)\.attention\.", "self.query self.key self.value output.dense", "encoder"
) | {
    r"encoder\.layer\.(\d+)\.intermediate\.dense": "encoder/up",
    r"encoder\.layer\.(\d+)\.output\.dense": "encoder/down",
    r"pooler\.dense": "pooler.dense",
}


def bart_like(head: str) -> dict[str, str]:
    found = {head: head}
    names = "q_proj k_proj v_proj out_proj"
    for stack in ("encoder", "decoder"):
        layer = rf"model\.{stack}\.layers\.(\d+)\."
        found |= attention(layer + r"self_attn\.", names, stack)
        found |= {layer + "fc1": f"{stack}/up", layer + "fc2": f"{stack}/down"}
    return found | attention(
        r"model\.decoder\.layers\.(\d+)\.encoder_attn\.", names, "decoder", "cross_"
    )


def t5_linears(inner: Mapping[str, str]) -> dict[str, str]:
    found = {"lm_head": "lm_head"}
    for stack, feed_forward in (("encoder", 1), ("decoder", 2)):
        block = rf"{stack}\.block\.(\d+)\.layer\."
        found |= attention(block + r"0\.SelfAttention\.", "q k v o", stack)
        found |= {
            block + rf"{feed_forward}\.DenseReluDense\.{name}": f"{stack}/{role}"
            for name, role in inner.items()
        }
    return found | attention(
        r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.", "q k v o", "decoder", "cross_"
    )


def fused(layer: str, name: str, rest: Mapping[str, str]) -> dict[str, str]:
    return {layer + name: "query_key_value", "lm_head": "lm_head"} | {
        layer + re.escape(path): role for path, role in rest.items()
    }


BLOOM_REST = {
    "self_attention.dense": "output",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
}
FALCON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "vocab_size": 32,
}
MIXTRAL_LINEARS = {
    path: role for path, role in LLAMA_LINEARS.items() if ".mlp" not in path.replace("\\", "")
} | {
    r"model\.layers\.(\d+)\.mlp\.gate": "router",
    r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj\[\d\]": "expert_gate_up",
    r"model\.layers\.(\d+)\.mlp\.experts\.down_proj\[\d\]": "expert_down",
}


class Attention(nn.Module):
    """The attention of a Stable Diffusion UNet, with the names that diffusers gives it."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])


def unet() -> nn.Module:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(WIDTH, 2 * FFN)

    def blocks() -> nn.ModuleList:
        block = nn.ModuleDict({"attn1": Attention(WIDTH), "attn2": Attention(8)})
        block["ff"] = nn.ModuleDict(
            {"net": nn.ModuleList([Gate(), nn.Dropout(0.0), nn.Linear(FFN, WIDTH)])}
        )
        transformer = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})
        return nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([transformer])})])

    model = nn.Module()
    model.down_blocks, model.up_blocks = blocks(), blocks()
    model.mid_block = blocks()[0]
    return model


def unet_linears() -> dict[str, str]:
    found: dict[str, str] = {}
    for stack, path in (
        ("down", r"down_blocks\.(\d+)"), ("up", r"up_blocks\.(\d+)"), ("mid", "mid_block"),
    ):  # fmt: skip
        number = r"\d+" if "(" in path else r"(\d+)"
        block = path + rf"\.attentions\.\d+\.transformer_blocks\.{number}\."
        found |= attention(block + r"attn1\.", "to_q to_k to_v to_out.0", stack)
        found |= attention(block + r"attn2\.", "to_q to_k to_v to_out.0", stack, "cross_")
        found |= {
            block + r"ff\.net\.0\.proj": f"{stack}/gate_up",
            block + r"ff\.net\.2": f"{stack}/down",
        }
    return found


ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture(lambda: build("BertModel", "BertConfig", **BASIC), BERT_LINEARS, SEPARATE),
    "RoBERTa": Architecture(
        lambda: build("RobertaModel", "RobertaConfig", **BASIC), BERT_LINEARS, SEPARATE
    ),
    "DistilBERT": Architecture(
        lambda: build(
            "DistilBertModel", "DistilBertConfig",
            dim=WIDTH, hidden_dim=FFN, n_layers=2, n_heads=HEADS, vocab_size=32,
        ),
        attention(r"transformer\.layer\.(\d+)\.attention\.", "q_lin k_lin v_lin out_lin")
        | {
            r"transformer\.layer\.(\d+)\.ffn\.lin1": "up",
            r"transformer\.layer\.(\d+)\.ffn\.lin2": "down",
        },
        SEPARATE,
    ),
    "BART": Architecture(
        lambda: build("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ),
        bart_like("lm_head"),
        {"encoder/query": HEADS, "decoder/key": 2, "decoder/cross_value": 2},
    ),
    "T5": Architecture(
        lambda: build(
            "T5ForConditionalGeneration", "T5Config",
            d_model=WIDTH, d_kv=6, d_ff=FFN, num_layers=2, num_heads=HEADS, vocab_size=32,
        ),
        t5_linears({"wi": "up", "wo": "down"}),
        SEPARATE | {"decoder/cross_key": HEADS},
    ),
    "T5 v1.1": Architecture(
        lambda: build(
            "T5ForConditionalGeneration", "T5Config",
            d_model=WIDTH, d_kv=SIZE, d_ff=FFN, num_layers=2, num_heads=HEADS, vocab_size=32,
            feed_forward_proj="gated-gelu",
        ),
        t5_linears({"wi_0": "gate", "wi_1": "up", "wo": "down"}),
        SEPARATE,
    ),
    "GPT-2": Architecture(
        lambda: build(
            "GPT2LMHeadModel", "GPT2Config",
            n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=FFN, vocab_size=32, **IDS,
        ),
        fused(
            r"transformer\.h\.(\d+)\.", r"attn\.c_attn",
            {"attn.c_proj": "output", "mlp.c_fc": "up", "mlp.c_proj": "down"},
        ),
        SEPARATE,
        transposed=r"\.c_",
    ),
    "GPT-NeoX": Architecture(
        lambda: build("GPTNeoXForCausalLM", "GPTNeoXConfig", **BASIC),
        fused(
            r"gpt_neox\.layers\.(\d+)\.", r"attention\.query_key_value",
            {"attention.dense": "output", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
        ),
        SEPARATE,
    ),
    "OPT": Architecture(
        lambda: build(
            "OPTForCausalLM", "OPTConfig",
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, ffn_dim=FFN,
            vocab_size=32, word_embed_proj_dim=8,
        ),
        attention(
            r"model\.decoder\.layers\.(\d+)\.self_attn\.", "q_proj k_proj v_proj out_proj",
            "decoder",
        )
        | {
            r"model\.decoder\.layers\.(\d+)\.fc1": "decoder/up",
            r"model\.decoder\.layers\.(\d+)\.fc2": "decoder/down",
            r"model\.decoder\.project_in": "decoder/model.decoder.project_in",
            r"model\.decoder\.project_out": "decoder/model.decoder.project_out",
            "lm_head": "lm_head",
        },
        SEPARATE,
    ),
    "LLaMA": Architecture(
        lambda: build("LlamaForCausalLM", "LlamaConfig", **LLAMA), LLAMA_LINEARS, GROUPED
    ),
    "Mistral": Architecture(
        lambda: build("MistralForCausalLM", "MistralConfig", **LLAMA), LLAMA_LINEARS, GROUPED
    ),
    "Qwen2": Architecture(
        lambda: build("Qwen2ForCausalLM", "Qwen2Config", **LLAMA), LLAMA_LINEARS, GROUPED
    ),
    "Qwen3": Architecture(
        lambda: build("Qwen3ForCausalLM", "Qwen3Config", **LLAMA | {"head_dim": 6}),
        LLAMA_LINEARS,
        GROUPED,
    ),
    "Gemma": Architecture(
        lambda: build("GemmaForCausalLM", "GemmaConfig", **LLAMA), LLAMA_LINEARS, GROUPED
    ),
    "Phi": Architecture(
        lambda: build(
            "PhiForCausalLM", "PhiConfig", **{k: v for k, v in LLAMA.items() if k != "head_dim"}
        ),
        attention(r"model\.layers\.(\d+)\.self_attn\.", "q_proj k_proj v_proj dense")
        | {
            r"model\.layers\.(\d+)\.mlp\.fc1": "up",
            r"model\.layers\.(\d+)\.mlp\.fc2": "down",
            "lm_head": "lm_head",
        },
        GROUPED,
    ),
    "Phi-3": Architecture(
        lambda: build("Phi3ForCausalLM", "Phi3Config", **LLAMA),
        fused(
            r"model\.layers\.(\d+)\.", r"self_attn\.qkv_proj",
            {"self_attn.o_proj": "output", "mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
        ),
        GROUPED,
    ),
    "Falcon (new)": Architecture(
        lambda: build(
            "FalconForCausalLM", "FalconConfig",
            new_decoder_architecture=True, num_kv_heads=KV, **FALCON,
        ),
        fused(r"transformer\.h\.(\d+)\.", r"self_attention\.query_key_value", BLOOM_REST),
        GROUPED,
    ),
    "Falcon (multi-query)": Architecture(
        lambda: build("FalconForCausalLM", "FalconConfig", multi_query=True, **FALCON),
        fused(r"transformer\.h\.(\d+)\.", r"self_attention\.query_key_value", BLOOM_REST),
        {"query": HEADS, "key": 1, "value": 1},
    ),
    "Falcon (old)": Architecture(
        lambda: build("FalconForCausalLM", "FalconConfig", multi_query=False, **FALCON),
        fused(r"transformer\.h\.(\d+)\.", r"self_attention\.query_key_value", BLOOM_REST),
        SEPARATE,
    ),
    "BLOOM": Architecture(
        lambda: build(
            "BloomForCausalLM", "BloomConfig",
            hidden_size=WIDTH, n_layer=2, n_head=HEADS, vocab_size=32,
        ),
        fused(r"transformer\.h\.(\d+)\.", r"self_attention\.query_key_value", BLOOM_REST),
        SEPARATE,
    ),
    "GPT-J": Architecture(
        lambda: build(
            "GPTJForCausalLM", "GPTJConfig",
            n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=FFN, vocab_size=32, rotary_dim=2, **IDS,
        ),
        attention(r"transformer\.h\.(\d+)\.attn\.", "q_proj k_proj v_proj out_proj")
        | {
            r"transformer\.h\.(\d+)\.mlp\.fc_in": "up",
            r"transformer\.h\.(\d+)\.mlp\.fc_out": "down",
            "lm_head": "lm_head",
        },
        SEPARATE,
    ),
    "DeBERTa": Architecture(
        lambda: build("DebertaV2Model", "DebertaV2Config", **BASIC),
        attention(
            r"encoder\.layer\.(\d+)\.attention\.",
            "self.query_proj self.key_proj self.value_proj output.dense", "encoder",
        )
        | {
            r"encoder\.layer\.(\d+)\.intermediate\.dense": "encoder/up",
            r"encoder\.layer\.(\d+)\.output\.dense": "encoder/down",
        },
        SEPARATE,
    ),
    "ModernBERT": Architecture(
        lambda: build(
            "ModernBertModel", "ModernBertConfig", cls_token_id=1, sep_token_id=2, **BASIC | IDS,
        ),
        {
            r"layers\.(\d+)\.attn\.Wqkv": "query_key_value",
            r"layers\.(\d+)\.attn\.Wo": "output",
            r"layers\.(\d+)\.mlp\.Wi": "gate_up",
            r"layers\.(\d+)\.mlp\.Wo": "down",
        },
        SEPARATE,
    ),
    "ViT": Architecture(
        lambda: build("ViTForImageClassification", "ViTConfig", **VISION),
        attention(r"vit\.layers\.(\d+)\.attention\.", "q_proj k_proj v_proj o_proj")
        | {
            r"vit\.layers\.(\d+)\.mlp\.fc1": "up",
            r"vit\.layers\.(\d+)\.mlp\.fc2": "down",
            "classifier": "classifier",
        },
        SEPARATE,
    ),
    "CLIP": Architecture(
        lambda: build(
            "CLIPModel", "CLIPConfig",
            text_config=BASIC | IDS | {"num_attention_heads": 2}, vision_config=VISION,
        ),
        {
            path: role
            for stack in ("text", "vision")
            for path, role in (
                attention(
                    rf"{stack}_model\.encoder\.layers\.(\d+)\.self_attn\.",
                    "q_proj k_proj v_proj out_proj", stack,
                )
                | {
                    rf"{stack}_model\.encoder\.layers\.(\d+)\.mlp\.fc1": f"{stack}/up",
                    rf"{stack}_model\.encoder\.layers\.(\d+)\.mlp\.fc2": f"{stack}/down",
                }
            ).items()
        }
        | {"visual_projection": "visual_projection", "text_projection": "text_projection"},
        {"text/query": 2, "vision/query": HEADS, "text/value": 2, "vision/key": HEADS},
    ),
    "Whisper": Architecture(
        lambda: build(
            "WhisperForConditionalGeneration", "WhisperConfig",
            num_mel_bins=8, max_source_positions=8, max_target_positions=8, **SEQ2SEQ,
        ),
        bart_like("proj_out"),
        {"encoder/query": HEADS, "decoder/query": 2, "decoder/cross_value": 2},
    ),
    "Mamba": Architecture(
        lambda: build(
            "MambaForCausalLM", "MambaConfig",
            hidden_size=WIDTH, num_hidden_layers=2, state_size=4, vocab_size=32, expand=2,
            conv_kernel=2, time_step_rank=3,
        ),
        {
            rf"backbone\.layers\.(\d+)\.mixer\.{name}": name
            for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
        }
        | {"lm_head": "lm_head"},
    ),
    "Mixtral": Architecture(
        lambda: build(
            "MixtralForCausalLM", "MixtralConfig",
            num_local_experts=3, num_experts_per_tok=2, **LLAMA,
        ),
        MIXTRAL_LINEARS,
        GROUPED,
    ),
    "Qwen2-MoE": Architecture(
        lambda: build(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
            num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12,
            shared_expert_intermediate_size=10,
            **{k: v for k, v in LLAMA.items() if k != "head_dim"},
        ),
        MIXTRAL_LINEARS
        | {
            rf"model\.layers\.(\d+)\.mlp\.shared_expert\.{name}_proj": f"shared_{name}"
            for name in ("gate", "up", "down")
        }
        | {
            r"model\.layers\.(\d+)\.mlp\.shared_expert_gate":
                "model.layers.*.mlp.shared_expert_gate",
        },
        GROUPED,
    ),
    "gpt-oss": Architecture(
        lambda: build(
            "GptOssForCausalLM", "GptOssConfig",
            num_local_experts=3, num_experts_per_tok=2, **LLAMA,
        ),
        {
            path.replace(r"mlp\.gate", r"mlp\.router") if role == "router" else path: role
            for path, role in MIXTRAL_LINEARS.items()
        },
        GROUPED,
        transposed=r"\.experts\.",
    ),
    "Stable Diffusion UNet": Architecture(
        unet,
        unet_linears(),
        {"down/query": HEADS, "mid/cross_key": HEADS, "up/value": HEADS},
    ),
}  # fmt: skip
