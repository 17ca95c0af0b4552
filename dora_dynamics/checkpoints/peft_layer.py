"""Any other PEFT tuner: one layer is built at a time, by PEFT itself, merged and let go.

The layer stands at its own path in an otherwise empty model, in float64, so that patterns, seeds
and shapes are the tuner's own. Tensors that all layers share (VeRA's projections) are given to
each.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from dora_dynamics.checkpoints.errors import CheckpointError, first_line
from dora_dynamics.checkpoints.updates import Built

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from dora_dynamics.checkpoints.stored import Contents, StoredTensor
    from dora_dynamics.sites import Site

LAYERWISE: Final = frozenset(
    {
        "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3",
        "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PVERA", "RANDLORA", "ROAD",
        "SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
"""Tuners for which one layer, built alone, merges to what it merges to in its model."""

_SHARED_SIZES: Final = frozenset({"VERA", "RANDLORA", "PVERA"})
"""Tuners whose shared projections are as large as the largest layer they adapt."""

_LARGEST: Final = "dora_dynamics_largest"
_WHOLE_MODEL: Final = (
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "task_type",
)
_IMPORTS: Final = ("megatron_config",)
"""Settings with which PEFT imports a module that the adapter names."""
_SIZE: Final = re.compile(
    r"r|\w+_r|(\w+_)?rank|\w*(block|factor|num|length|frequency|size|depth)\w*"
)
_AT_LEAST: Final = 4096
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class LayerRecipe:
    """What is needed to build one adapted layer.

    Attributes:
        contents: the adapter.
        path: of the layer in the model that was adapted.
        names: tensors of the layer: name in the file → tensor.
        shared: tensors that belong to no layer.
        largest: (in, out) of the largest layers that are adapted.
    """

    contents: Contents
    path: str
    names: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]
    largest: tuple[int, int]

    def update(self) -> Built:
        """The update that builds this layer when it is measured."""
        return Built((*self.names.values(), *self.shared.values()), self.merged)

    def merged(self, weight: Tensor, site: Site) -> Tensor:
        """The effective weight, from the base weight in float64, as the module stores it."""
        where = self.contents.path
        with _one_at_a_time, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                return self._merged(weight, site)
            except CheckpointError:
                raise
            except Exception as error:  # PEFT refuses in many ways
                kind = self.contents.adapter_config.get("peft_type")
                raise CheckpointError(
                    f"{where}: PEFT cannot build {self.path} with {kind} ({first_line(error)}): "
                    "check that adapter and base belong together, or compare the merged model."
                ) from error

    def _merged(self, weight: Tensor, site: Site) -> Tensor:
        import peft

        shell = nn.Module()
        _place(shell, self.path, _leaf(weight, site))
        targets = [self.path]
        config = layer_config(self.contents, targets)
        if str(config.peft_type.value) in _SHARED_SIZES:
            shell.add_module(_LARGEST, nn.Linear(*self.largest, bias=False, dtype=torch.float64))
            targets.append(_LARGEST)
        config.target_modules = targets
        model = peft.get_peft_model(shell, config, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                parameter.data = parameter.data.to(torch.float64)
        state = {name: t.load() for name, t in {**self.shared, **self.names}.items()}
        expected = peft.get_peft_model_state_dict(model)
        missing = [name for name in expected if name not in state and _LARGEST not in name]
        result: Any = peft.set_peft_model_state_dict(model, state)
        if missing or result.unexpected_keys:
            wrong = (missing or result.unexpected_keys)[0]
            raise CheckpointError(
                f"{self.contents.path} does not fit its own adapter_config.json (at {wrong}): save "
                "the adapter again."
            )
        merged = model.merge_and_unload()
        after: Tensor = merged.get_submodule(self.path).weight.detach()
        return after


def layer_config(contents: Contents, targets: list[str]) -> Any:
    """The adapter's own configuration, restricted to the given layers."""
    from peft import PeftConfig

    config = copy.deepcopy(
        PeftConfig.from_peft_type(**contents.adapter_config)  # type: ignore[no-untyped-call]
    )
    for name in (*_WHOLE_MODEL, *_IMPORTS):
        if hasattr(config, name):
            setattr(config, name, None)
    config.target_modules = targets
    config.inference_mode = False
    return config


def refuse_absurd_sizes(contents: Contents, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse settings that would build layers far larger than the tensors there are.

    Args:
        contents: the adapter.
        shapes: of the weights that it adapts.

    Raises:
        CheckpointError: there is such a setting.
    """
    stored = (tensor.shape for tensor in contents.tensors.values())
    largest = max((size for shape in (*shapes, *stored) for size in shape), default=1)
    for name, value in contents.adapter_config.items():
        values = list(value.values()) if isinstance(value, dict) else [value]
        sizes = [v for v in values if type(v) is int]
        if (name == "rank_pattern" or _SIZE.fullmatch(name)) and any(
            abs(size) > max(_AT_LEAST, 16 * largest) for size in sizes
        ):
            raise CheckpointError(
                f"{contents.path}: the {name} of its adapter_config.json is far beyond the size of "
                "its tensors: the two files do not belong together."
            )


def need_peft(contents: Contents) -> None:
    """Refuse where PEFT is not installed.

    Raises:
        CheckpointError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        kind = contents.adapter_config.get("peft_type")
        raise CheckpointError(
            f"{contents.path} is of the kind {kind}, which PEFT has to build layer by layer: "
            "pip install 'dora-dynamics[hf]'."
        ) from error


def _leaf(weight: Tensor, site: Site) -> nn.Module:
    leaf: nn.Module
    if site.kind == "embedding":
        leaf = nn.Embedding(1, 1)
    elif site.kind == "filters":
        kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        leaf = kinds[weight.ndim](weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
        leaf.register_parameter("bias", None)
    elif site.stored_transposed:
        from transformers.pytorch_utils import Conv1D

        leaf = Conv1D(weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
    else:
        leaf = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if isinstance(leaf, nn.Embedding):
        leaf = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    leaf.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return leaf


def _place(shell: nn.Module, path: str, leaf: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        child = nn.Module()
        shell.add_module(name, child)
        shell = child
    shell.add_module(last, leaf)
