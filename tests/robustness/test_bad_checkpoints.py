"""Checkpoints from strangers, through `compare` and `sites`: refused, or measured right."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tests.checkpoints.models import expected
from tests.conftest import IS_CAMPAIGN, campaign
from tests.robustness.bad_files import answer, damaged, misplaced, other_json, soon

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

State = dict[str, "Tensor"]
NAMES = [f"layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qv"]
Q = NAMES[0]

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 4, generator=generator) for name in NAMES}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = (nn.Linear(4, 6, bias=False) for _ in range(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()}) for _ in range(2)])


def safetensors_file(folder: Path) -> Path:
    safetensors.torch.save_file(weights(1), folder / "model-7.safetensors")
    return folder / "model-7.safetensors"


def shards(folder: Path) -> Path:
    index = {}
    for number, (name, tensor) in enumerate(weights(1).items()):
        index[name] = f"{number % 2}.safetensors"
        file = folder / index[name]
        held = safetensors.torch.load_file(file) if file.exists() else {}
        safetensors.torch.save_file({**held, name: tensor}, file)
    content = {"metadata": {"total_size": 384}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Llama"]}')
    (folder / "trainer_state.json").write_text('{"global_step": 7, "log_history": [{"loss": 1}]}')
    return folder


def torch_file(folder: Path) -> Path:
    torch.save({"state_dict": weights(1), "global_step": 7, "lr": [1e-3]}, folder / "a.ckpt")
    return folder / "a.ckpt"


def old_torch_file(folder: Path) -> Path:
    torch.save(weights(1), folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def distributed(folder: Path) -> Path:
    save(dict(weights(1)), checkpoint_id=folder)
    return folder


def peft_adapter(folder: Path, *, use_dora: bool = False) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in NAMES:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, 4, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
        if use_dora:
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(6, generator=generator) + 0.5
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": use_dora, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {"q_proj": 8}, "fan_in_fan_out": False, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True, "lora_dropout": 0.0,
        "base_model_name_or_path": "somewhere", "modules_to_save": None, "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dora_adapter(folder: Path) -> Path:
    return peft_adapter(folder, use_dora=True)


def told_by_safetensors(path: Path) -> State:
    return safetensors.torch.load_file(path)


def told_by_shards(path: Path) -> State:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_bytes() if file.is_file() else "{}")["weight_map"]
    return {name: safetensors.torch.load_file(path / file)[name] for name, file in index.items()}


def told_by_torch(path: Path) -> State:
    content = torch.load(path, weights_only=True, map_location="cpu")
    inner: State = content.get("state_dict", content)
    return inner


def told_by_distributed(path: Path) -> State:
    good = path.parent.parent / "good" / ".metadata"
    if path.name != "good" and (path / ".metadata").read_bytes() != good.read_bytes():
        raise ValueError("torch would unpickle it")
    found = {name: torch.full((6, 4), torch.nan) for name in NAMES}
    load(found, checkpoint_id=path)
    return found


def told_by_peft(path: Path) -> State:
    import peft

    model = Model()
    model.load_state_dict(weights(0))
    adapted = peft.PeftModel.from_pretrained(model.to(torch.float64), str(path))
    merged: State = adapted.to(torch.float64).merge_and_unload().state_dict()
    return merged


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], State]]] = {
    "safetensors": (safetensors_file, told_by_safetensors),
    "shards": (shards, told_by_shards),
    "torch": (torch_file, told_by_torch),
    "old torch": (old_torch_file, told_by_torch),
    "distributed": (distributed, told_by_distributed),
    "peft": (peft_adapter, told_by_peft),
    "dora": (dora_adapter, told_by_peft),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(weights(0), tmp_path / "base" / "base.safetensors")
    return tmp_path / "base" / "base.safetensors"


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_generated_bad_checkpoints(kind: str, tmp_path: Path, base: Path) -> None:
    build, told = KINDS[kind]
    if told is told_by_peft:
        pytest.importorskip("peft")
    (tmp_path / "good").mkdir()
    good = build(tmp_path / "good")
    right = {name: of_change(weights(0)[name], after) for name, after in told(good).items()}
    rng, read = random.Random(kind), 0
    tries = campaign(6, 90)
    for number in range(tries):
        place = tmp_path / "bad" / str(number)
        shutil.copytree(tmp_path / "good", place)
        path = place / good.relative_to(tmp_path / "good")
        file = rng.choice([file for file in sorted(place.rglob("*")) if file.is_file()])
        if rng.random() < 0.1:
            misplaced(file, rng)
        elif file.suffix == ".json" and rng.random() < 0.7:
            file.write_bytes(other_json(file.read_bytes(), rng))
        else:
            file.write_bytes(damaged(file.read_bytes(), rng, head=rng.choice((300, 700, None))))
        done = answer("compare", base, path, "--targets", "query,value", "--json")
        if rng.random() < 0.3:
            answer("sites", path, *rng.choice(([], ["--json"], ["--all"])))
        if done is None:
            continue
        read += 1
        try:
            with soon():
                known = {name: after for name, after in told(path).items() if name in NAMES}
            wanted = {n: of_change(weights(0)[n], after) for n, after in known.items()}
        except (
            Exception,
            CheckpointException,
        ):  # it is stricter about what we do not read
            wanted = right
        check(json.loads(done)["rows"], wanted, f"{kind} {number} {file.name}")
    assert read < tries
    assert read or not IS_CAMPAIGN


def of_change(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """What a row must say: a unit that shrinks a billionfold is left out of ΔD."""
    magnitude, direction, norm = expected(before, after)
    left = after.double().norm(dim=1) / before.double().norm(dim=1)
    if ((left > 0) & (left < 1e-9)).any():
        some = left > 1e-9
        direction = expected(before[some], after[some])[1]
    return {"delta_magnitude": magnitude, "delta_direction": direction, "update_norm": norm}


def check(rows: list[dict[str, Any]], wanted: dict[str, dict[str, float]], what: str) -> None:
    assert rows
    for row in rows:
        for name, value in wanted[f"{row['site']}.weight"].items():
            np.testing.assert_allclose(
                row[name], value, rtol=1e-5, atol=1e-12, err_msg=f"{what}, {name}"
            )
