"""One tensor of a file, known by its header and read only when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dora_dynamics.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what its header says, and how to get at its values.

    Attributes:
        shape: its shape.
        dtype: its element type.
        load: gives the tensor, memory-mapped where the format allows it.
        file: the file that holds it.
        blocks: first row and loader of each block of whole rows that it is saved in, in order;
            () where it is saved in one, or otherwise. `load` puts blocks together in memory.
        place: tells tensors that lie in the same place of the file; None where no others can.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    file: Path
    blocks: tuple[tuple[int, Callable[[], Tensor]], ...] = ()
    place: object = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Contents:
    """What one checkpoint holds.

    Attributes:
        path: the folder or file the user named.
        kind: "weights" or the kind of adapter file: "peft", "lora".
        tensors: every tensor by its name in the file.
        config: the model's `config.json`, {} where there is none.
        adapter_config: the `adapter_config.json` of a PEFT adapter, else {}.
        metadata: the text metadata of a safetensors file.
        step: the optimizer step the file itself tells, None where it tells none.
    """

    path: Path
    kind: str
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter_config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None


def merge_tensors(
    parts: Mapping[str, Mapping[str, StoredTensor]],
) -> dict[str, StoredTensor]:
    """One mapping from several files'; a name that two of them hold is refused.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """
    merged: dict[str, StoredTensor] = {}
    for file, tensors in parts.items():
        for name, tensor in tensors.items():
            if name in merged:
                raise CheckpointError(
                    f"the tensor {name!r} is both in {merged[name].file.name} and in {file}: keep "
                    "the one file that belongs to this checkpoint."
                )
            merged[name] = tensor
    return merged
