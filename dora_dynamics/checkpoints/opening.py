"""From a path to the contents of a checkpoint, whatever wrote it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from dora_dynamics.checkpoints.distributed import METADATA, read_distributed
from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    TORCH_SUFFIXES,
    WEIGHT_FILES,
    read_adapter_folder,
    read_json,
    read_tensors,
    read_weights_folder,
)
from dora_dynamics.checkpoints.lora_file import is_lora_file
from dora_dynamics.checkpoints.stored import Contents, StoredTensor, merge_tensors
from dora_dynamics.checkpoints.torch_file import read_torch

if TYPE_CHECKING:
    from pathlib import Path

TRAINER_STATE: Final = "trainer_state.json"
PIPELINE_INDEX: Final = "model_index.json"
LORA_WEIGHTS: Final = "pytorch_lora_weights.safetensors"
_FSDP_FOLDER: Final = "pytorch_model_fsdp_0"
_LONGEST_NAME: Final = 1000
LARGEST_STEP: Final = 2**53
_STEP: Final = re.compile(r"(?:^|[^a-z])(?:checkpoint|global_?step|steps?|ckpt|iter)[-_=]?(\d+)")
_NUMBER: Final = re.compile(r"^(?:.*[-_.])?(\d+)$")


def open_checkpoint(path: Path) -> Contents:
    """What the file or folder at `path` holds, from headers alone.

    Raises:
        CheckpointError: it is missing, damaged, unsafe or of no known kind.
    """
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not exists:
        raise CheckpointError(f"{path} does not exist.")
    contents = _open_folder(path) if is_folder else _open_file(path)
    for name in contents.tensors:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise CheckpointError(
                f"{path} holds a tensor of the name {name[:80]!r}, which no module has: save it "
                "again."
            )
    return contents


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is itself a checkpoint, and not one that holds checkpoints."""
    names = (*WEIGHT_FILES, ADAPTER_CONFIG, METADATA, PIPELINE_INDEX, LORA_WEIGHTS, _FSDP_FOLDER)
    return any((folder / name).exists() for name in names)


def step_of(path: Path, contents: Contents) -> int | None:
    """The optimizer step of a checkpoint: from the trainer's state, the file, or the name.

    A file whose name is that of any checkpoint's weights has the step of its folder.
    """
    if path.name in (*WEIGHT_FILES, *ADAPTER_FILES) and path.is_file():
        found = step_of(path.parent, contents) if _STEP.search(path.parent.name.lower()) else None
        return contents.step if found is None else found
    state_file = path / TRAINER_STATE
    if state_file.is_file():
        step = read_json(state_file).get("global_step")
        if type(step) is int and 0 <= step <= LARGEST_STEP:
            return step
    if contents.step is not None and 0 <= contents.step <= LARGEST_STEP:
        return contents.step
    return step_in_name(path)


def step_in_name(path: Path) -> int | None:
    """The step a name like `checkpoint-500`, `step=500.ckpt` or `model_500.pt` tells."""
    name = path.name.lower()
    found = _STEP.findall(name)
    if found:
        return int(found[-1][:15])
    stem = path.stem.lower() if path.suffix in (".safetensors", *TORCH_SUFFIXES) else name
    numbered = _NUMBER.match(stem)
    return int(numbered.group(1)[:15]) if numbered else None


def _open_file(path: Path) -> Contents:
    if path.name in ADAPTER_FILES and (path.parent / ADAPTER_CONFIG).is_file():
        return read_adapter_folder(path.parent)
    if path.name == METADATA:
        return read_distributed(path.parent)
    if path.name.endswith(".index.json"):
        return read_weights_folder(path.parent)
    step = None
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = read_torch(path)
        tensors, step = state.tensors, state.step
    else:
        raise CheckpointError(
            f"{path} is of no known kind: expected .safetensors, {', '.join(TORCH_SUFFIXES)} or a "
            "folder."
        )
    kind = "lora" if is_lora_file(tensors) else "weights"
    config_file = path.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    return Contents(path, kind, tensors, config, metadata=metadata, step=step)


def _open_folder(folder: Path) -> Contents:
    if (folder / ADAPTER_CONFIG).is_file():
        return read_adapter_folder(folder)
    if (folder / METADATA).is_file():
        return read_distributed(folder)
    if (folder / _FSDP_FOLDER / METADATA).is_file():
        return read_distributed(folder / _FSDP_FOLDER)
    if (folder / PIPELINE_INDEX).is_file():
        return _open_pipeline(folder)
    if (folder / LORA_WEIGHTS).is_file():
        return _open_file(folder / LORA_WEIGHTS)
    if any(folder.glob("*_model_states.pt")) or any(folder.glob("global_step*/*_states.pt")):
        raise CheckpointError(
            f"{folder} is a DeepSpeed checkpoint: gather its weights first with the "
            "zero_to_fp32.py that DeepSpeed left in it."
        )
    return read_weights_folder(folder)


def _open_pipeline(folder: Path) -> Contents:
    """A diffusers pipeline: the weights of its parts, each name behind its part's."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        if any((part / name).is_file() for name in WEIGHT_FILES):
            tensors = read_weights_folder(part).tensors
            parts[part.name] = {f"{part.name}.{name}": t for name, t in tensors.items()}
    if not parts:
        raise CheckpointError(f"{folder} holds no weights in any of its parts.")
    return Contents(folder, "weights", merge_tensors(parts))
