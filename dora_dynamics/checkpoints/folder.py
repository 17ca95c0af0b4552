"""Folders of shards: transformers checkpoints, PEFT adapters, parts of a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Final

from dora_dynamics import strict_json
from dora_dynamics.checkpoints.errors import CheckpointError, first_line, regular
from dora_dynamics.checkpoints.safetensors_file import read_safetensors
from dora_dynamics.checkpoints.stored import Contents, StoredTensor, merge_tensors
from dora_dynamics.checkpoints.torch_file import read_torch

WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_FILES: Final = ("adapter_model.safetensors", "adapter_model.bin")
TORCH_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_JSON_LIMIT: Final = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read or is no object.
    """
    try:
        content = strict_json.parsed(regular(path, _JSON_LIMIT).read_bytes(), finite=False)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not JSON of one meaning ({first_line(error)}): copy or save it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: copy or save it again.")
    return content


def read_weights_folder(folder: Path) -> Contents:
    """The weights of a folder as `save_pretrained` writes it, one file or many.

    Raises:
        CheckpointError: no weights are there, or shards do not fit their index.
    """
    config_file = folder / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    for name in WEIGHT_FILES:
        file = folder / name
        if file.is_file():
            tensors = _indexed(file) if name.endswith(".json") else read_tensors(file)[0]
            return Contents(folder, "weights", tensors, config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights: expected model.safetensors, its index, or "
            "pytorch_model.bin."
        )
    parts = {file.name: read_safetensors(file)[0] for file in files}
    return Contents(folder, "weights", merge_tensors(parts), config)


def read_adapter_folder(folder: Path) -> Contents:
    """A PEFT adapter: its `adapter_config.json` and its tensors.

    Raises:
        CheckpointError: the adapter's tensors are missing or damaged.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            tensors, metadata = read_tensors(folder / name)
            return Contents(folder, "peft", tensors, adapter_config=config, metadata=metadata)
    raise CheckpointError(
        f"{folder} has an {ADAPTER_CONFIG} but no {ADAPTER_FILES[0]}: save the adapter again."
    )


def read_tensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one file of weights, by its suffix, and its text metadata."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    return read_torch(file).tensors, {}


def _indexed(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: copy or save it again.")
    files: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index} names no file for {tensor!r}.")
        files.setdefault(shard, []).append(tensor)
    parts = {}
    for shard, names in files.items():
        file = _inside(index, shard)
        if not file.is_file():
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not there: copy it too."
            )
        held = read_tensors(file)[0]
        missing = next((name for name in names if name not in held), None)
        if missing is not None:
            raise CheckpointError(
                f"{index} places {missing!r} in {shard}, which does not hold it: copy or save "
                "the checkpoint again."
            )
        parts[shard] = held
    return merge_tensors(parts)


def _inside(index: Path, shard: str) -> Path:
    """The path of a shard, refused where its name leads out of the index's folder."""
    parts = PurePosixPath(shard).parts
    unsafe = "\\" in shard or "\0" in shard or ":" in shard or len(shard) > 255
    if unsafe or not parts or ".." in parts or shard.startswith("/"):
        raise CheckpointError(
            f"{index} names the shard {shard[:80]!r}, which is outside its folder; such an index "
            "is not followed."
        )
    return index.parent / shard
