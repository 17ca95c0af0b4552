"""Damaged, hostile and mistaken files: one sentence each, and nothing half-written."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints

from .models import check

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

Q, V = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.v_proj.weight"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6, 4, generator=generator) for name in (Q, V)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    safetensors.torch.save_file(tensors(0), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def raw(header: object, data: bytes = bytes(96), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**change: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96], **change}


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "shorter than its header"),
    "short": (b"1234", "shorter than its header"),
    "huge_header": (raw({}, length=1 << 60), "shorter than its header"),
    "not_json": (raw(b"{nope"), "not JSON"),
    "deep_json": (raw(b"[" * 100_000), "not JSON"),
    "not_utf8": (raw(b"\xff\xfe{}"), "not JSON"),
    "list": (raw([]), "not a JSON object"),
    "twice": (raw(b'{"a": {}, "a": {}}'), "two tensors are named 'a'"),
    "no_dtype": (raw({Q: {"shape": [1]}}), "does not describe"),
    "dtype": (raw({Q: entry(dtype="F33")}), "unknown dtype 'F33'"),
    "dtype_list": (raw({Q: entry(dtype=["F32"])}), "unknown dtype"),
    "negative": (raw({Q: entry(shape=[-6, 4])}), "whole numbers"),
    "fraction": (raw({Q: entry(shape=[6.0, 4])}), "whole numbers"),
    "overflow": (raw({Q: entry(shape=[1 << 40, 1 << 40])}), "takes 96 bytes"),
    "too_big": (raw({Q: entry(shape=[1 << 80, 0])}), "whole numbers"),
    "wrong_size": (raw({Q: entry(shape=[6, 5])}), "takes 96 bytes but needs 120"),
    "backwards": (raw({Q: entry(data_offsets=[96, 0])}), "takes -96 bytes"),
    "cut": (raw({Q: entry()}, bytes(95)), "cut short"),
    "overlap": (raw({Q: entry(), V: entry(data_offsets=[8, 104])}, bytes(104)), "overlap"),
    "gap": (raw({Q: entry(data_offsets=[4, 100])}, bytes(100)), "bytes between"),
    "more": (raw({Q: entry()}, bytes(99)), "take 96 bytes and it has 99"),
    "metadata": (raw({"__metadata__": {"a": 1}, Q: entry()}), "metadata is not text"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_safetensors(base: Path, tmp_path: Path, name: str) -> None:
    content, match = HEADERS[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        compare_checkpoints(base, tmp_path / "bad.safetensors", ["query"], out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({Q: "../outside.safetensors"}, "outside its folder"),
        ({Q: "/etc/passwd"}, "outside its folder"),
        ({Q: "a/../../outside.safetensors"}, "outside its folder"),
        ({Q: "..\\outside.safetensors"}, "outside its folder"),
        ({Q: "a\0b"}, "outside its folder"),
        ({Q: ""}, "outside its folder"),
        ({Q: "missing.safetensors"}, "not there"),
        ({Q: "one.safetensors", "ghost.weight": "one.safetensors"}, "does not hold it"),
        ({Q: "one.safetensors", V: "two.safetensors"}, "is both in"),
        ({Q: 3}, "names no file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_bad_indexes(base: Path, tmp_path: Path, weight_map: object, match: str) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    safetensors.torch.save_file(tensors(1), tmp_path / "outside.safetensors")
    for name in ("one", "two"):
        safetensors.torch.save_file(tensors(1), folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=match):
        compare_checkpoints(base, folder, ["query"])


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_pickles_that_run_code_are_refused(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    torch.save({**tensors(1), "bomb": Bomb(target)}, tmp_path / "bomb.pt")
    torch.save({**tensors(1), "a": argparse.Namespace(lr=1)}, tmp_path / "space.ckpt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb(target)))
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb(target)))
    for name, match in (
        ("bomb.pt", "can run code when opened"),
        ("space.ckpt", "argparse.Namespace"),
        ("plain.bin", "plain.bin"),
        ("dcp", "it needs posix.system"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            compare_checkpoints(base, tmp_path / name, ["query"])
        assert "\n" not in str(caught.value)
    assert not target.exists()


def _save(content: object, file: Path) -> None:
    torch.save(content, file)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no_tensors": (lambda: {"epoch": 3}, "no tensors by name"),
    "a_tensor": (lambda: torch.ones(3), "no tensors by name"),
    "other_names": (lambda: {"a.weight": torch.ones(6, 4)}, "holds none of the chosen weights"),
    "other_shape": (lambda: {Q: torch.ones(4, 6)}, "has shape .4, 6. and the base's has .6, 4."),
    "integers": (lambda: {Q: torch.ones(6, 4, dtype=torch.int8)}, "int8: save it dequantised"),
    "float8": (lambda: {Q: torch.ones(6, 4).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "nan": (lambda: {Q: torch.full((6, 4), torch.nan)}, "NaN or Inf in 6 of 6 units"),
    "inf": (lambda: {Q: torch.full((6, 4), torch.inf)}, "--keep-non-finite"),
    "huge_view": (lambda: {Q: torch.ones(1).expand(1 << 40, 4)}, "no tensors by name"),
    "twice": (lambda: {Q: torch.ones(6, 4), f"module.{Q}": torch.ones(6, 4)}, "are one weight"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(base: Path, tmp_path: Path, name: str) -> None:
    make, match = MISTAKES[name]
    _save(make(), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=match) as caught:
        compare_checkpoints(base, tmp_path / "bad.pt", ["query"], out=tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep").exists()


def test_non_finite_weights_can_be_kept(base: Path, tmp_path: Path) -> None:
    after = tensors(1)
    after[Q][2, 1] = torch.nan
    _save(after, tmp_path / "nan.pt")
    table = compare_checkpoints(base, tmp_path / "nan.pt", ["query", "value"], keep_non_finite=True)
    assert list(table["non_finite"]) == [1, 0]
    assert table["delta_magnitude"].isna().tolist() == [True, False]


def test_paths_that_are_not_there(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, match in (
        ("nowhere", "does not exist"),
        ("empty", "holds no weights"),
        ("*.nope", "no checkpoint matches"),
        ("x" * 5000, "not a usable path|does not exist"),
        ("a\0b", "not a usable path|does not exist"),
    ):
        with pytest.raises(CheckpointError, match=match):
            compare_checkpoints(base, str(tmp_path / path), ["query"])
    with pytest.raises(CheckpointError, match="named twice"):
        compare_checkpoints(base, [base, base], ["query"])
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="of no known kind"):
        compare_checkpoints(base, tmp_path / "notes.txt", ["query"])


def test_deepspeed_is_told_what_to_run(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    (folder / "global_step5").mkdir(parents=True)
    (folder / "global_step5" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        compare_checkpoints(base, folder, ["query"])


@pytest.mark.parametrize("rows", [4, 9])
def test_resized_vocabularies_compare_the_shared_rows(tmp_path: Path, rows: int) -> None:
    before = {"model.embed_tokens.weight": torch.randn(6, 4), "lm_head.weight": torch.randn(6, 4)}
    after = {name: torch.randn(rows, 4) for name in before}
    safetensors.torch.save_file(before, tmp_path / "a.safetensors")
    safetensors.torch.save_file(after, tmp_path / "b.safetensors")
    table = compare_checkpoints(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", ["embedding", "lm_head"]
    )
    shared = min(rows, 6)
    check(table, {n: t[:shared] for n, t in before.items()},
          {n: t[:shared] for n, t in after.items()})  # fmt: skip
    notes = table.attrs["summary"]["checkpoints"][0]["notes"]
    assert f"resized from 6 to {rows} rows: the first {shared} are compared" in notes[0]


def test_different_dtypes_are_compared_as_stored_and_said(tmp_path: Path) -> None:
    before = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(0).items()}
    after = {name: tensor + 1e-3 for name, tensor in tensors(0).items()}
    safetensors.torch.save_file(before, tmp_path / "a.safetensors")
    safetensors.torch.save_file(after, tmp_path / "b.safetensors")
    for axis in ("output", "input"):
        table = compare_checkpoints(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", ["query"], axis=axis
        )
        check(table, before, after, axis=axis)
    notes = table.attrs["summary"]["checkpoints"][0]["notes"]
    assert "the base is bfloat16 and the checkpoint float32" in notes[0]


def test_an_unaligned_header_still_reads_right(tmp_path: Path, base: Path) -> None:
    after = tensors(1)
    text = json.dumps({Q: entry()}).encode()
    text += b" " * (1 - len(text) % 2)
    content = struct.pack("<Q", len(text)) + text + after[Q].numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    check(compare_checkpoints(base, tmp_path / "odd.safetensors", ["query"]), tensors(0), after)


def test_steps_that_do_not_tell_or_clash(tmp_path: Path, base: Path) -> None:
    for name in ("a", "b", "step-3", "model_step3"):
        safetensors.torch.save_file(tensors(1), tmp_path / f"{name}.safetensors")
    paths = {n: tmp_path / f"{n}.safetensors" for n in ("a", "b", "step-3", "model_step3")}
    assert list(compare_checkpoints(base, [paths["b"], paths["a"]], ["query"])["step"]) == [1, 2]
    with pytest.raises(CheckpointError, match="does not tell its step"):
        compare_checkpoints(base, [paths["a"], paths["step-3"]], ["query"])
    with pytest.raises(CheckpointError, match="both of step 3"):
        compare_checkpoints(base, [paths["step-3"], paths["model_step3"]], ["query"])
    table = compare_checkpoints(base, [paths["a"], paths["step-3"]], ["query"], steps=[9, 3])
    assert list(table["step"]) == [3, 9]
    with pytest.raises(CheckpointError, match="1 steps were given for 2"):
        compare_checkpoints(base, [paths["a"], paths["b"]], ["query"], steps=[9])


def test_a_folder_of_lightnings_with_a_copy_of_the_last(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in (("epoch=0-step=20", 20), ("epoch=0-step=5", 5), ("last", 20)):
        _save({"state_dict": tensors(step), "global_step": step}, folder / f"{name}.ckpt")
    assert list(compare_checkpoints(base, folder, ["query"])["step"]) == [5, 20]
    with pytest.raises(CheckpointError, match="both of step 20"):
        compare_checkpoints(base, str(folder / "*.ckpt"), ["query"])
