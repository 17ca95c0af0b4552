"""Every PEFT method in the variants that are tested, and what is expected of each.

`CASES` is keyed by the value of `peft.PeftType`. `all_cases` follows PEFT's own registry: a method
that is there and not here is tested with the settings that it comes with.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners import lora
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable

LINEAR = ("query", "value", "down")


class Block(nn.Module):
    """Linear layers that are not square, and nothing else a tuner could stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 24)
        self.value = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.query(x)) * torch.sigmoid(self.value(x))
        y: torch.Tensor = self.norm(x + self.down(hidden))
        return y


class Linears(nn.Module):
    """Two blocks and a head; the input is real-valued."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        y: torch.Tensor = self.head(x)
        return y

    @staticmethod
    def batch(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(4, 3, 16, generator=generator)


class Conv1Ds(Linears):
    """GPT-2's linear layers, stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            make: Any = Conv1D
            layer.query, layer.value = make(24, 16), make(24, 16)
            layer.down = make(16, 24)


class Tokens(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 16)
        self.query = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.query(self.embed_tokens(x))))
        return y

    @staticmethod
    def batch(generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, 11, (4, 3), generator=generator)


class Images(nn.Module):
    """Convolutions, one with a stride, one of kernel size one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        z: torch.Tensor = self.head(y.mean((2, 3)))
        return z

    @staticmethod
    def batch(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(4, 3, 6, 7, generator=generator)


class Llama(nn.Module):
    """A small language model, for methods that need one."""

    def __new__(cls) -> nn.Module:  # type: ignore[misc]
        config = LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Case:
    """One variant of one method.

    Attributes:
        name: what is special about it.
        config: makes its PEFT configuration.
        how: "direct", "merge on a copy" or "probed"; "" where the method is refused, or where
            nothing is expected of it yet.
        model: class of the model it is put on.
        followed: ends of the paths of the followed modules.
        targets: the argument that selects the modules; None leaves it out.
        refused: what the refusal says.
    """

    name: str
    config: Callable[..., Any]
    how: str
    model: type[nn.Module] = Linears
    followed: tuple[str, ...] = LINEAR
    targets: tuple[str, ...] | None = LINEAR
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """The model before the adapter."""
        torch.manual_seed(seed)
        return self.model()

    def adapt(self, model: nn.Module) -> Any:
        """The adapted model."""
        options = dict(self.options)
        if self.targets is not None:
            options.setdefault("target_modules", list(self.targets))
        if self.config in (mixture, arrow, qalora):
            return self.config(model)
        if options.get("init_lora_weights") in ("corda", "lora_ga"):
            return _prepared(self, model, options)
        if options.get("init_lora_weights") == "eva":
            return _with_data(self, peft.get_peft_model(model, self.config(**options)))
        if options.get("init_lora_weights") == "loftq":
            with OnCpu():
                return peft.get_peft_model(model, self.config(**options))
        return peft.get_peft_model(model, self.config(**options))


class OnCpu(TorchFunctionMode):
    """LoftQ asks for a GPU by name and computes nothing that needs one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: "cpu" if isinstance(x, str) and x == "cuda" else x,
                                (args, kwargs or {}))  # fmt: skip
        return func(*args, **kwargs)


def _with_data(case: Case, adapted: Any) -> Any:
    """EVA takes its A from what the layers are given."""
    generator = torch.Generator().manual_seed(1)
    batches = [case.model.batch(generator).flatten(0, 1) for _ in range(4)]  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA reports that you have")  # where there are several
        peft.initialize_lora_eva_weights(
            adapted, batches, forward_fn=lambda model, batch: model(batch),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
    return adapted


def _prepared(case: Case, model: nn.Module, options: dict[str, Any]) -> Any:
    """CorDA and LoRA-GA look at some batches first."""
    config = case.config(**options)
    generator = torch.Generator().manual_seed(1)
    batch = case.model.batch(generator)  # type: ignore[attr-defined]
    if options["init_lora_weights"] == "corda":
        preprocess_corda(model, config, run_model=lambda: model(batch.flatten(0, 1)))
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, lambda: model(batch).square().mean().backward())
    return peft.get_peft_model(model, config)


def _lora(name: str, how: str = "direct", **options: Any) -> Case:
    fields = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
    options = {"r": 4, "lora_alpha": 6, **options}
    return Case(name, peft.LoraConfig, how, options=options, **fields)


ABSENT: Any = object()
"""Stands for a setting that an older PEFT does not have."""


def _setting(name: str, **options: Any) -> Any:
    make = getattr(lora, name, None) or getattr(lora.config, name, None)
    return ABSENT if make is None else make(**options)


def _is_there(case: Case) -> bool:
    """Whether this PEFT, which may be an older one, has what the case is about, and its needs."""
    if case.config is arrow:
        return hasattr(lora, "create_arrow_model")
    if case.config in (mixture, qalora):
        return True
    start = case.options.get("init_lora_weights")
    known = str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type)
    if ABSENT in case.options.values() or (start in _STARTS and start not in known):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.config(**case.options)
    except (TypeError, ImportError):
        return False
    return True


_STARTS = ("orthogonal", "corda", "mica")


def _case(kind: str, name: str, how: str = "merge on a copy", **options: Any) -> Case:
    fields = {key: options.pop(key) for key in list(options) if key in Case.__dataclass_fields__}
    return Case(name, lambda **o: _configuration(kind, o), how, options=options, **fields)


def _configuration(kind: str, options: dict[str, Any]) -> Any:
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)


def _prompts(kind: str, refused: str = "trains prompts", **options: Any) -> Case:
    options = {"task_type": "CAUSAL_LM", **options}
    if kind not in ("ADAPTION_PROMPT", "SHADOW"):
        options.setdefault("num_virtual_tokens", 2)
    return _case(kind, "plain", "", model=Llama, targets=None, refused=refused, **options)


def mixture(model: nn.Module) -> Any:
    """X-LoRA: two saved LoRA adapters, mixed by a classifier."""
    with TemporaryDirectory() as folder:
        for name in ("one", "two"):
            adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            peft.get_peft_model(copy.deepcopy(model), adapter).save_pretrained(f"{folder}/{name}")
        adapters = {name: f"{folder}/{name}" for name in ("one", "two")}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters)
        return peft.get_peft_model(model, config)


def arrow(model: Any) -> Any:
    """Arrow: saved LoRA adapters, of which a router picks some for every token."""
    with TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("one", "two")]
        for path in paths:
            adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
            peft.get_peft_model(copy.deepcopy(model), adapter).save_pretrained(path)
        return lora.create_arrow_model(model, paths, lora.ArrowConfig(top_k=1))


def qalora(model: Any) -> Any:
    """QALoRA: PEFT puts it on the layers of GPTQ only, which need a GPU; here on one like them."""
    config = peft.LoraConfig(use_qalora=True, qalora_group_size=4, init_lora_weights=False)
    model.query = GPTQLoraLinear(model.query, "default", config, r=2, lora_alpha=3)
    return model


class PackedLinear(nn.Module):
    """As GPTQ's layers: `qweight` is packed, and the layer itself unpacks it, (in, out)."""

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().T
        scale = weight.abs().amax(0, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def dequantize_weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.qweight * self.scale
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x @ self.dequantize_weight() + self.bias
        return y


class Packed(nn.Module):
    """One layer whose weight is packed, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query: Any = PackedLinear(nn.Linear(16, 24)).requires_grad_(False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.query(x)))
        return y


def all_cases() -> list[tuple[Any, Case]]:
    """Every method of PEFT's own registry with each of its cases."""
    return [
        (kind, case)
        for kind in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        for case in CASES.get(kind.value) or [_as_it_comes(kind.value)]
        if _is_there(case)
    ]


def _as_it_comes(kind: str) -> Case:
    """A method that a newer PEFT brought: all that is known is its configuration class."""
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    if issubclass(config, peft.PromptLearningConfig):
        return _prompts(kind)
    return _case(kind, "as it comes", "")


LOFTQ = [
    _lora("loftq", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
][: find_spec("bitsandbytes") is not None]
"""Its start is computed by bitsandbytes."""

CASES: dict[str, list[Case]] = {
    "LORA": [
        _lora("plain"),
        _lora("rslora", use_rslora=True),
        _lora("patterns", rank_pattern={"query": 2}, alpha_pattern={"down": 3}),
        _lora("dora", use_dora=True),
        _lora("dora dropout", use_dora=True, lora_dropout=0.2),
        _lora("conv1d", model=Conv1Ds, fan_in_fan_out=True),
        _lora("conv1d dora", model=Conv1Ds, fan_in_fan_out=True, use_dora=True),
        _lora("gaussian", init_lora_weights="gaussian"),
        _lora("not zero", init_lora_weights=False),
        _lora("orthogonal", init_lora_weights="orthogonal"),
        _lora("pissa", init_lora_weights="pissa"),
        _lora("pissa niter", init_lora_weights="pissa_niter_4"),
        _lora("pissa dora", init_lora_weights="pissa", use_dora=True),
        _lora("olora", init_lora_weights="olora"),
        _lora("eva", init_lora_weights="eva", eva_config=EvaConfig()),
        _lora("corda", init_lora_weights="corda",
              corda_config=CordaConfig()),
        _lora("lora_ga", init_lora_weights="lora_ga",
              lora_ga_config=_setting("LoraGAConfig")),
        *LOFTQ,
        _lora("mica", init_lora_weights="mica", how="merge on a copy"),
        _lora("bias", lora_bias=True, followed=("query", "down"), targets=("query", "down")),
        _lora("bias on none", lora_bias=True, followed=("value",), targets=("value",)),
        _lora("kasa", kasa_config=_setting("KasaConfig"), how="merge on a copy"),
        _lora("velora", velora_config=_setting("VeloraConfig", num_groups=4),
              how="merge on a copy"),
        _lora("monteclora", monteclora_config=_setting("MontecloraConfig"), how="merge on a copy"),
        _lora("bdlora", use_bdlora=_setting("BdLoraConfig", nblocks=2,
              target_modules_bd_b=["query", "value"], target_modules_bd_a=["down"]),
              how="merge on a copy"),
        Case("arrow", arrow, "", model=Llama, followed=("q_proj",), refused="Arrow"),
        _lora("alora", alora_invocation_tokens=[1], how="", refused="aLoRA"),
        _lora("embedding", model=Tokens, followed=("embed_tokens", "query"),
              targets=("embed_tokens", "query")),
        _lora("embedding dora", model=Tokens, how="merge on a copy", use_dora=True,
              followed=("embed_tokens",), targets=("embed_tokens",)),
        _lora("conv", model=Images, how="merge on a copy", followed=("conv1", "conv2"),
              targets=("conv1", "conv2")),
        _lora("conv dora", model=Images, how="merge on a copy", use_dora=True,
              followed=("conv1", "conv2"), targets=("conv1", "conv2")),
        _lora("trainable tokens", model=Tokens, trainable_token_indices=[1, 3],
              followed=("query",), targets=("query",)),
        _lora("modules_to_save", modules_to_save=["head"]),
    ],
    "ADALORA": [_case("ADALORA", "plain", init_r=4, target_r=2, total_step=20, tinit=1, tfinal=1),
                _case("ADALORA", "conv1d", init_r=4, target_r=2, total_step=20, tinit=1, tfinal=1,
                      model=Conv1Ds, fan_in_fan_out=True)],
    "ADAPTION_PROMPT": [_prompts("ADAPTION_PROMPT", adapter_len=2, adapter_layers=1,
                                 refused="adaption prompt")],
    "ADAMSS": [_case("ADAMSS", "plain", r=8, num_subspaces=2, subspace_rank=1),
               _case("ADAMSS", "dynamic", r=8, num_subspaces=2, subspace_rank=1,
                     use_dynamic_rank=True)],
    "BEFT": [_case("BEFT", "plain", followed=("query", "down"), targets=("query", "down"))],
    "BOFT": [_case("BOFT", "plain", boft_block_size=4),
             _case("BOFT", "butterfly", boft_block_size=4, boft_n_butterfly_factor=2),
             _case("BOFT", "conv", boft_block_size=3, model=Images, followed=("conv1",),
                   targets=("conv1",))],
    "C3A": [_case("C3A", "plain", block_size=4),
            _case("C3A", "zeros", block_size=8, init_weights=True)],
    "CARTRIDGE": [_prompts("CARTRIDGE", num_frozen_tokens=1)],
    "CPT": [_prompts("CPT", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])],
    "DEFT": [_case("DEFT", "plain", r=4), _case("DEFT", "qr", r=4, decomposition_method="qr"),
             _case("DEFT", "para", r=4, para=True)],
    "DELORA": [_case("DELORA", "plain", r=4), _case("DELORA", "random", r=4, init_weights=False)],
    "FOURIERFT": [_case("FOURIERFT", "plain", n_frequency=20)],
    "FROD": [_case("FROD", "plain", progressbar=False)],
    "GLORA": [_case("GLORA", "plain", r=4)],
    "GRALORA": [_case("GRALORA", "plain", r=4, gralora_k=2),
                _case("GRALORA", "hybrid", r=4, gralora_k=2, hybrid_r=2)],
    "HIRA": [_case("HIRA", "plain", r=4)],
    "HRA": [_case("HRA", "plain", r=4), _case("HRA", "gs", r=4, apply_GS=True,
            init_weights=False)],
    "IA3": [_case("IA3", "plain", feedforward_modules=[]),
            _case("IA3", "feedforward", feedforward_modules=["down"])],
    "LILY": [_case("LILY", "plain", "", r=4, num_B=2, stride_A=1, refused="Lily")],
    "LN_TUNING": [_case("LN_TUNING", "plain", followed=("norm",), targets=("norm",))],
    "LOHA": [_case("LOHA", "plain", r=4), _case("LOHA", "conv", r=2, model=Images,
             use_effective_conv2d=True, followed=("conv1", "conv2"), targets=("conv1", "conv2"))],
    "LOKR": [_case("LOKR", "plain", r=4), _case("LOKR", "both", r=2, decompose_both=True,
                                                decompose_factor=4)],
    "MISS": [_case("MISS", "plain", r=4), _case("MISS", "bat", r=4, init_weights="bat"),
             _case("MISS", "mini", r=4, mini_r=2, init_weights="mini")],
    "MULTITASK_PROMPT_TUNING": [_prompts("MULTITASK_PROMPT_TUNING", num_tasks=2)],
    "OFT": [_case("OFT", "plain", oft_block_size=4, r=0), _case("OFT", "coft", oft_block_size=4,
            r=0, coft=True, eps=1e-2), _case("OFT", "shared", oft_block_size=4, r=0,
            block_share=True), _case("OFT", "exact", oft_block_size=4, r=0,
            use_cayley_neumann=False)],
    "OSF": [_case("OSF", "plain", effective_rank=4)],
    "P_TUNING": [_prompts("P_TUNING", encoder_hidden_size=8)],
    "PEANUT": [_case("PEANUT", "plain", r=4), _case("PEANUT", "deep", r=4, depth=2)],
    "POLY": [_case("POLY", "plain", "", r=4, n_tasks=2, n_skills=2, refused="Poly")],
    "PREFIX_TUNING": [_prompts("PREFIX_TUNING")],
    "PROMPT_TUNING": [_prompts("PROMPT_TUNING")],
    "PSOFT": [_case("PSOFT", "plain", r=4), _case("PSOFT", "pissa", r=4,
              ab_svd_init="pissa_init")],
    "PVERA": [_case("PVERA", "plain", r=4)],
    "RANDLORA": [_case("RANDLORA", "plain", r=4)],
    "ROAD": [_case("ROAD", "1", group_size=8), _case("ROAD", "2", group_size=8, variant="road_2"),
             _case("ROAD", "4", group_size=8, variant="road_4")],
    "SHADOW": [_prompts("SHADOW", refused="ShadowPEFT", shadow_num_hidden_layers=1)],
    "SHIRA": [_case("SHIRA", "plain", r=2)],
    "SUPERTUNING": [_case("SUPERTUNING", "plain", sparsity=0.9),
                    _case("SUPERTUNING", "lora", sparsity=0.9, r=2, lora_alpha=2.0)],
    "TINYLORA": [_case("TINYLORA", "plain", r=2, u=4)],
    "TRAINABLE_TOKENS": [_case("TRAINABLE_TOKENS", "plain", model=Tokens, token_indices=[1, 4],
                               followed=("embed_tokens",), targets=("embed_tokens",))],
    "UNILORA": [_case("UNILORA", "plain", r=4, theta_d_length=32)],
    "VBLORA": [_case("VBLORA", "plain", r=4, num_vectors=8, vector_length=8)],
    "VERA": [_case("VERA", "plain", r=4)],
    "XLORA": [Case("plain", mixture, "", model=Llama, refused="X-LoRA")],
    "WAVEFT": [_case("WAVEFT", "plain", n_frequency=20)],
}  # fmt: skip

QALORA = Case("qalora on a stand-in for GPTQ", qalora, "probed", Packed, followed=("query",))
"""Not built by PEFT on a CPU, and so not among the others; see `test_quantized.py`."""
