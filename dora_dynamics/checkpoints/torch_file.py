"""State dicts that `torch.save` wrote: .pt, .pth, .bin shards and Lightning's .ckpt.

Only `torch.load(weights_only=True)` opens them, so that no file can run code; what needs more
than tensors and plain containers is refused.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

import torch

from dora_dynamics.checkpoints.errors import CheckpointError, first_line, regular
from dora_dynamics.checkpoints.restricted_pickle import HeavyTupleError, Weigher
from dora_dynamics.checkpoints.stored import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

_NESTED: Final = ("state_dict", "model", "model_state_dict", "module", "ema_state_dict")
_PICKLES: Final = 5
"""Pickles before the values of a file of torch before 1.6: its kind, its tensors, its storages."""
_GLOBAL: Final = re.compile(r"(?:GLOBAL|class|function)\s+`?([\w.]+)")


@dataclass(frozen=True)
class StateDict:
    """The tensors of a pickled file and the step it tells, if it does."""

    tensors: dict[str, StoredTensor]
    step: int | None


def read_torch(path: Path) -> StateDict:
    """The state dict in a file that `torch.save` wrote, also one nested in a training state.

    A file in torch's zip format (torch 1.6 and later) is memory-mapped; an older one is read
    whole, which takes the memory it takes.

    Raises:
        CheckpointError: the file cannot be read safely or holds no tensors by name.
    """
    content = _load(path)
    step = None
    if isinstance(content, Mapping):
        for key in ("global_step", "step"):
            if type(content.get(key)) is int:
                step = content[key]
                break
        for key in _NESTED:
            inner = content.get(key)
            if isinstance(inner, Mapping) and _tensors(inner):
                content = inner
                break
    tensors = _tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors by name, neither at its top nor under "
            f"{', '.join(_NESTED)}: save model.state_dict()."
        )
    return StateDict(
        {
            name: StoredTensor(
                tuple(tensor.shape), tensor.dtype, tensor.detach, path, place=_place(tensor)
            )
            for name, tensor in tensors.items()
        },
        step,
    )


def _tensors(content: Mapping[object, object]) -> dict[str, torch.Tensor]:
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor) and _is_plain(value)
    }


def _place(tensor: torch.Tensor) -> object:
    if tensor.numel() == 0:
        return None
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is dense and every element of it is really in the file."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _load(path: Path) -> object:
    try:
        is_zip = zipfile.is_zipfile(regular(path))
        if is_zip:
            _check_archive(path)
        else:
            _check_pickles(path)
        if not is_zip and path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty: copy or save it again.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise _refusal(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that torch does not write, and cannot map, before anything is unpacked.

    Raises:
        CheckpointError: a record is compressed (a bomb can hide behind that), or records together
            are larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            if record.filename.endswith("data.pkl") and record.compress_type == zipfile.ZIP_STORED:
                _check_pickle(archive.open(record))
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a compressed archive, which torch does not write: save it again with "
            "torch.save."
        )


def _check_pickles(path: Path) -> None:
    """`_check_pickle` of the pickles that an old file begins with."""
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            if not _check_pickle(file):
                return


def _check_pickle(file: IO[bytes]) -> bool:
    """Refuse a pickle that keeps torch's reader busy for ever; whether it is a pickle at all.

    Raises:
        HeavyTupleError: it is one.
    """
    try:
        Weigher(file).load()
    except HeavyTupleError:
        raise
    except Exception:  # torch says what is wrong with it
        return False
    return True


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    if "weights_only" in text and ("Unsupported" in text or "global" in text.lower()):
        found = _GLOBAL.search(text)
        needs = f"it needs {found.group(1)}" if found else "it needs more than tensors"
        return CheckpointError(
            f"{path} is a pickle that can run code when opened ({needs}), so it is not opened: "
            "save the state dict alone, or as safetensors."
        )
    return CheckpointError(
        f"{path} is not a whole torch file ({first_line(error)}): copy or save it again."
    )
