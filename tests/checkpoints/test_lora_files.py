"""LoRA files as Kohya's scripts, diffusers and LyCORIS write them, made by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints

from .models import check

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
CONV = "down_blocks.0.resnets.0.conv1"
BASE = {f"{LINEAR}.weight": (12, 8), f"{SQUARE}.weight": (8, 8), f"{CONV}.weight": (6, 4, 3, 3)}


def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in BASE.items()}


def save(tensors: dict[str, Tensor], file: Path, **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, file, metadata or None)
    return file


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


@pytest.mark.parametrize("measured", ["output", "input"])
@pytest.mark.parametrize("dora", [None, "output", "input"])
@pytest.mark.parametrize("module", [LINEAR, SQUARE, CONV])
def test_kohya(tmp_path: Path, module: str, dora: str | None, measured: Any) -> None:
    weight = base()[f"{module}.weight"].double()
    rank, alpha = 2, 3.0
    down = torch.randn(rank, *weight.shape[1:])
    up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2))
    after = weight + alpha / rank * (up.flatten(1).double() @ down.flatten(1).double()).view(
        weight.shape
    )
    tensors = {
        f"{flat(module)}.lora_down.weight": down,
        f"{flat(module)}.lora_up.weight": up,
        f"{flat(module)}.alpha": torch.tensor(alpha),
    }
    if dora is not None:
        unit = 0 if dora == "output" else 1
        shape = [1] * weight.ndim
        shape[unit] = weight.shape[unit]
        scale = 1 + torch.rand(shape)
        tensors[f"{flat(module)}.dora_scale"] = scale
        over = [dim for dim in range(weight.ndim) if dim != unit]
        after = scale.double() * after / torch.linalg.vector_norm(after, dim=over, keepdim=True)
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "lora.safetensors")
    table = compare_checkpoints(tmp_path / "base.safetensors", file, axis=measured)
    assert list(table["site"]) == [module]
    assert list(table["method"]) == ["LoRA" if dora is None else "DoRA"]
    rows = {f"{module}.weight": weight.flatten(1)}
    check(table, rows, {f"{module}.weight": after.flatten(1)}, axis=measured)


def test_components_of_a_pipeline(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    save(base(), pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
    save(text, pipeline / "text_encoder" / "model.safetensors")
    save(text, pipeline / "text_encoder_2" / "model.safetensors")
    (pipeline / "model_index.json").write_text("{}")
    q_proj = "text_model_encoder_layers_0_self_attn_q_proj"
    names = [flat(LINEAR), f"lora_te1_{q_proj}", f"lora_te2_{q_proj}"]
    tensors: dict[str, Tensor] = {}
    for name, out in zip(names, (12, 8, 8), strict=True):
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, 8),
                    f"{name}.lora_up.weight": torch.randn(out, 2)}  # fmt: skip
    table = compare_checkpoints(pipeline, save(tensors, tmp_path / "lora.safetensors"))
    assert sorted(table["site"]) == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
        f"unet.{LINEAR}",
    ]
    alone = compare_checkpoints(pipeline / "unet", tmp_path / "lora.safetensors")
    assert len(alone) == 1
    listed = alone.attrs["summary"]["checkpoints"][0]["only_in_checkpoint"]
    assert sorted(listed) == sorted(names[1:])


@pytest.mark.parametrize("style", ["peft", "diffusers", "linear_layer", "processor"])
def test_dotted_names(tmp_path: Path, style: str) -> None:
    down, up = torch.randn(2, 8), torch.randn(12, 2)
    stem, leaf = LINEAR.rsplit(".", 1)
    first, second = {
        "peft": (f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight"),
        "diffusers": (f"unet.{LINEAR}.lora.down.weight", f"unet.{LINEAR}.lora.up.weight"),
        "linear_layer": (f"unet.{LINEAR}.lora_linear_layer.down.weight",
                         f"unet.{LINEAR}.lora_linear_layer.up.weight"),
        "processor": (f"unet.{stem}.processor.{leaf}_lora.down.weight",
                      f"unet.{stem}.processor.{leaf}_lora.up.weight"),
    }[style]  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})}
    scaling = 3.0 if style == "peft" else 1.0
    file = save({first: down, second: up}, tmp_path / "pytorch_lora_weights.safetensors",
                **(metadata if style == "peft" else {}))  # fmt: skip
    save(base(), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    table = compare_checkpoints(tmp_path / "unet", file)
    after = {f"{LINEAR}.weight": base()[f"{LINEAR}.weight"].double()
             + scaling * up.double() @ down.double()}  # fmt: skip
    check(table, base(), after)


def _layers() -> dict[str, tuple[dict[str, Tensor], Any]]:
    """LyCORIS layers of the linear and the convolution: their tensors and the update they make."""
    torch.manual_seed(3)
    r, alpha = 2, 5.0
    hada = {f"hada_{n}": torch.randn(s) for n, s in
            {"w1_a": (12, r), "w1_b": (r, 8), "w2_a": (12, r), "w2_b": (r, 8)}.items()}  # fmt: skip
    lokr = {"lokr_w1": torch.randn(3, 2), "lokr_w2_a": torch.randn(4, r),
            "lokr_w2_b": torch.randn(r, 4)}  # fmt: skip
    full = {"lokr_w1": torch.randn(3, 2), "lokr_w2": torch.randn(4, 4)}
    d = {n: t.double() for n, t in {**hada, **lokr}.items()}
    return {
        "loha": (hada, alpha / r * (d["hada_w1_a"] @ d["hada_w1_b"])
                 * (d["hada_w2_a"] @ d["hada_w2_b"])),
        "lokr": (lokr, alpha / r * torch.kron(d["lokr_w1"], d["lokr_w2_a"] @ d["lokr_w2_b"])),
        "lokr_full": (full, torch.kron(full["lokr_w1"].double(), full["lokr_w2"].double())),
        "diff": ({"diff": torch.ones(12, 8) / 9}, torch.ones(12, 8).double() / 9),
    }  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_full", "diff"])
def test_lycoris(tmp_path: Path, kind: str, *, dora: bool) -> None:
    parts, update = _layers()[kind]
    tensors = {f"{flat(LINEAR)}.{name}": tensor for name, tensor in parts.items()}
    tensors[f"{flat(LINEAR)}.alpha"] = torch.tensor(5.0)
    if kind == "diff":  # a difference alone is no sign of a LoRA file
        tensors[f"{flat(SQUARE)}.lora_down.weight"] = torch.zeros(1, 8)
        tensors[f"{flat(SQUARE)}.lora_up.weight"] = torch.zeros(8, 1)
    after = base()[f"{LINEAR}.weight"].double() + update
    if dora:
        scale = 1 + torch.rand(1, 8)
        tensors[f"{flat(LINEAR)}.dora_scale"] = scale
        after = scale.double() * after / after.norm(dim=0, keepdim=True)
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "lycoris.safetensors")
    table = compare_checkpoints(tmp_path / "base.safetensors", file, [LINEAR], method="x")
    check(table, base(), {f"{LINEAR}.weight": after}, tolerance=1e-7)


def test_tucker_convolution(tmp_path: Path) -> None:
    down, up, mid = torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1), torch.randn(2, 2, 3, 3)
    update = torch.einsum(
        "mnkl,im,nj->ijkl", mid.double(), up.flatten(1).double(), down.flatten(1).double()
    )
    tensors = {f"{flat(CONV)}.lora_down.weight": down, f"{flat(CONV)}.lora_up.weight": up,
               f"{flat(CONV)}.lora_mid.weight": mid,
               f"{flat(CONV)}.alpha": torch.tensor(1.0)}  # fmt: skip
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "lora.safetensors")
    table = compare_checkpoints(tmp_path / "base.safetensors", file)
    name = f"{CONV}.weight"
    after = {name: (base()[name].double() + 0.5 * update).flatten(1)}
    check(table, {name: base()[name].flatten(1)}, after)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dora_scale": torch.ones(8)}, "square weight"),
        ({"dora_scale": torch.ones(5, 1)}, "dora_scale has shape"),
        ({"lora_up.weight": torch.ones(9, 2)}, "do not fit the base"),
        ({"lora_up.weight": torch.ones(8)}, "have shapes"),
        ({"lora_up.weight": None}, "lacks up"),
        ({"alpha": torch.ones(2)}, "not one number"),
        ({"alpha": torch.tensor(float("nan"))}, "alpha is nan"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], match: str
) -> None:
    parts: dict[str, Tensor | None] = {
        "lora_down.weight": torch.ones(2, 8),
        "lora_up.weight": torch.ones(8, 2),
        **change,
    }
    tensors = {f"{flat(SQUARE)}.{n}": t for n, t in parts.items() if t is not None}
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=match):
        compare_checkpoints(tmp_path / "base.safetensors", file)


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = {"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 8),
               "lora_unet_mid_block_x.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="another base"):
        compare_checkpoints(tmp_path / "base.safetensors", file)


def test_differences_alone_are_lycoris_full(tmp_path: Path) -> None:
    update = 0.1 * torch.randn(12, 8)
    tensors = {f"lycoris_{LINEAR.replace('.', '_')}.diff": update}
    save(base(), tmp_path / "base.safetensors")
    table = compare_checkpoints(
        tmp_path / "base.safetensors", save(tensors, tmp_path / "full.safetensors")
    )
    after = {f"{LINEAR}.weight": base()[f"{LINEAR}.weight"].double() + update}
    check(table, base(), after)


@pytest.mark.parametrize(
    ("part", "kind"), [("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("on_input", r"\(IA\)³")]
)
def test_other_kinds_of_lycoris_are_refused(tmp_path: Path, part: str, kind: str) -> None:
    tensors = {f"{flat(LINEAR)}.{part}": torch.ones(2, 2), f"{flat(LINEAR)}.alpha": torch.ones(())}
    save(base(), tmp_path / "base.safetensors")
    file = save(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"LyCORIS's {kind}, .* compare the merged"):
        compare_checkpoints(tmp_path / "base.safetensors", file)


def test_a_base_in_another_form_is_said(tmp_path: Path) -> None:
    tensors = {f"{flat(LINEAR)}.lora_down.weight": torch.ones(2, 8),
               f"{flat(LINEAR)}.lora_up.weight": torch.ones(12, 2)}  # fmt: skip
    save({"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(8, 8)},
         tmp_path / "base.safetensors")  # fmt: skip
    file = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="names of diffusers: give the base in that form"):
        compare_checkpoints(tmp_path / "base.safetensors", file)
