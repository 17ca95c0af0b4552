"""Mutated files: each ends in one clear sentence or in the numbers of what the file holds."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints
from tests.conftest import campaign
from tests.robustness.bad_files import damaged, soon

from .models import expected

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = campaign(25, 100)
Q = "layers.0.self_attn.q_proj.weight"


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        Q: torch.randn(6, 4, generator=generator),
        "layers.0.self_attn.v_proj.weight": torch.randn(6, 4, generator=generator),
    }


def attempt(base: Path, checkpoint: Path, out: Path) -> Any:
    """The table, or None where the files were refused in one sentence and left nothing behind."""
    try:
        with soon():
            return compare_checkpoints(base, checkpoint, ["query"], out=out, jobs=1)
    except CheckpointError as error:
        message = str(error)
    finally:
        left_behind = out.exists()
        shutil.rmtree(out, ignore_errors=True)
    assert 10 < len(message) < 2000
    assert "\n" not in message
    assert not left_behind
    return None


@pytest.fixture
def base(tmp_path: Path) -> Path:
    safetensors.torch.save_file(weights(0), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.campaign
def test_mutated_safetensors(tmp_path: Path, base: Path) -> None:
    safetensors.torch.save_file(weights(1), tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    rng, file, read = random.Random(0), tmp_path / "bad.safetensors", 0
    for _ in range(2 * ROUNDS):
        file.write_bytes(damaged(good, rng, head=260))
        table = attempt(base, file, tmp_path / "out")
        if table is None:
            continue
        read += 1
        held = safetensors.torch.load_file(file)  # the reference reader takes it, and agrees
        name = next(n for n in held if n.endswith("q_proj.weight"))
        wanted = expected(weights(0)[Q], held[name])
        assert table["delta_magnitude"][0] == pytest.approx(wanted[0], rel=1e-6)
        assert table["delta_direction"][0] == pytest.approx(wanted[1], rel=1e-6)
    assert 0 < read < 2 * ROUNDS


@pytest.mark.campaign
@pytest.mark.parametrize("old", [False, True])
def test_mutated_torch_files(tmp_path: Path, base: Path, *, old: bool) -> None:
    torch.save(weights(1), tmp_path / "good.pt", _use_new_zipfile_serialization=not old)
    good = (tmp_path / "good.pt").read_bytes()
    rng, file, refused = random.Random(1), tmp_path / "bad.pt", 0
    for _ in range(ROUNDS):
        file.write_bytes(damaged(good, rng))
        table = attempt(base, file, tmp_path / "out")
        if table is None:
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(file, weights_only=True, map_location="cpu")
        wanted = expected(weights(0)[Q], held[Q])
        assert table["delta_magnitude"][0] == pytest.approx(wanted[0], rel=1e-6)
    assert refused > 0


@pytest.mark.campaign
def test_mutated_distributed_checkpoints(tmp_path: Path, base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(weights(1)), checkpoint_id=tmp_path / "dcp")
    files = [tmp_path / "dcp" / ".metadata", next((tmp_path / "dcp").glob("*.distcp"))]
    good = [file.read_bytes() for file in files]
    rng, refused = random.Random(2), 0
    wanted = expected(weights(0)[Q], weights(1)[Q])[0]
    for i in range(ROUNDS):
        which = i % 2
        files[which].write_bytes(damaged(good[which], rng))
        table = attempt(base, tmp_path / "dcp", tmp_path / "out")
        refused += table is None
        if table is not None and which == 0:
            assert table["delta_magnitude"][0] == pytest.approx(wanted, rel=1e-6)
        files[which].write_bytes(good[which])
    assert refused > 0


@pytest.mark.campaign
def test_mutated_adapters_and_indexes(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model." + Q.removesuffix(".weight")
    factors = {f"{name}.lora_A.weight": torch.randn(2, 4), f"{name}.lora_B.weight":
               torch.randn(6, 2), f"{name}.lora_magnitude_vector": torch.rand(6)}  # fmt: skip
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True,
              "rank_pattern": {}, "alpha_pattern": {"q_proj": 8}, "fan_in_fan_out": False,
              "target_modules": ["q_proj"], "init_lora_weights": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for shard, (tensor, value) in enumerate(weights(1).items()):
        safetensors.torch.save_file({tensor: value}, sharded / f"{shard}.safetensors")
    index = {"weight_map": {n: f"{i}.safetensors" for i, n in enumerate(weights(1))}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    targets = [folder / "adapter_model.safetensors", folder / "adapter_config.json",
               sharded / "model.safetensors.index.json"]  # fmt: skip
    good = {file: file.read_bytes() for file in targets}
    rng, refused = random.Random(3), 0
    for i in range(2 * ROUNDS):
        file = targets[i % 3]
        file.write_bytes(damaged(good[file], rng, head=300))
        refused += attempt(base, file.parent, tmp_path / "out") is None
        file.write_bytes(good[file])
    assert refused > 0
    for parent in (folder, sharded):
        assert attempt(base, parent, tmp_path / "out") is not None


@pytest.mark.campaign
def test_both_sides_may_be_damaged(tmp_path: Path, base: Path) -> None:
    safetensors.torch.save_file(weights(1), tmp_path / "good.safetensors")
    good, rng = base.read_bytes(), random.Random(4)
    for _ in range(ROUNDS // 2):
        base.write_bytes(damaged(good, rng, head=260))
        attempt(base, tmp_path / "good.safetensors", tmp_path / "out")
