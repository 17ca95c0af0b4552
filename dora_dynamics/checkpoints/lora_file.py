"""LoRA files of the image-generation world: Kohya, diffusers and LyCORIS, each one file.

A group of tensors `<module>.<part>` describes one layer. Module names are dotted (diffusers) or
flattened with underscores behind "lora_unet_" and the like (Kohya, LyCORIS). `dora_scale` keeps a
dimension of size 1 for every dimension its norm was taken over, which tells the axis: (out, 1) or
(1, in); LyCORIS writes the second unless told otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dora_dynamics import strict_json
from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.lycoris import Layer, layer_update

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dora_dynamics.checkpoints.stored import Contents, StoredTensor
    from dora_dynamics.checkpoints.updates import Update

_PARTS: Final = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{
        name: name
        for name in (
            *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
    },
}
_OTHER_LYCORIS: Final = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "on_input": "(IA)³",
}
"""How to tell LyCORIS's other kinds, whose formulas are not read from files."""
_MOST_RANK: Final = 1 << 20
_OLD_DIFFUSERS: Final = re.compile(r"^(.*)\.processor\.(to_\w+)_lora\.(down|up)\.weight$")
_COMPONENTS: Final = {
    "lora_unet_": "unet.",
    "lora_transformer_": "transformer.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
    "lora_prior_unet_": "prior.",
    "lycoris_": "",
}


@dataclass(frozen=True)
class Adapted:
    """What an adapter does to a base.

    Attributes:
        updates: plain name of a tensor of the base → what becomes of it.
        method: "LoRA", "DoRA" or the tuner's own name.
        unmatched: layers of the adapter that the base does not have.
        notes: what a reader of the result has to know.
    """

    updates: dict[str, Update]
    method: str
    unmatched: list[str]
    notes: list[str]


def is_lora_file(tensors: Iterable[str]) -> bool:
    """Whether the names are those of a LoRA file rather than of a model."""
    parts = [_split(name)[1] for name in tensors]
    if any(_other_kind(name) and name.startswith(tuple(_COMPONENTS)) for name in tensors):
        return True
    adapting = {part for part in parts if part is not None}
    full = bool(adapting) and None not in parts  # differences alone: LyCORIS's "full"
    return full or bool(adapting - {"alpha", "diff", "diff_b", "magnitude", "dora_scale"})


def _other_kind(name: str) -> str | None:
    return next((kind for end, kind in _OTHER_LYCORIS.items() if name.endswith(f".{end}")), None)


def read_lora_file(contents: Contents, base: Mapping[str, StoredTensor]) -> Adapted:
    """What a LoRA file does to the tensors of `base` (by their plain names).

    Raises:
        CheckpointError: a layer is incomplete, does not fit the base, or fits two places.
    """
    groups: dict[str, dict[str, StoredTensor]] = {}
    unread = []
    for name, tensor in contents.tensors.items():
        owner, part = _split(name)
        if part is None:
            unread.append(name)
        else:
            groups.setdefault(owner, {})[part] = tensor
    _refuse_unreadable(contents)
    scalings = _metadata_scalings(contents.metadata, contents.path)
    modules = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    finder = _Finder(modules)
    updates: dict[str, Update] = {}
    unmatched = []
    methods: set[str] = set()
    for name, parts in groups.items():
        if parts.keys() <= {"diff_b", "alpha"}:
            continue
        module = finder.find(name, contents.path)
        if module is None:
            unmatched.append(name)
            continue
        tensor_name = f"{module}.weight"
        if tensor_name in updates:
            raise CheckpointError(
                f"{contents.path} adapts {module} twice; keep one of the two layers."
            )
        layer = Layer(name, contents.path, parts, _scaling_of(name, scalings))
        updates[tensor_name] = layer_update(layer, base[tensor_name])
        methods.add(layer.method)
    if not updates:
        raise CheckpointError(
            f"{contents.path} adapts no layer of this base (its first layer is "
            f"{next(iter(groups), 'missing')!r}): it belongs to another base"
            f"{_in_diffusers_form(base)}."
        )
    notes = []
    if unread:
        notes.append(f"{contents.path.name}: {len(unread)} tensors were not read: {unread[0]}, …")
    method = methods.pop() if len(methods) == 1 else "LyCORIS"
    return Adapted(updates, method, unmatched, notes)


def _refuse_unreadable(contents: Contents) -> None:
    other = {kind for name in contents.tensors if (kind := _other_kind(name)) is not None}
    if other:
        raise CheckpointError(
            f"{contents.path} holds layers of LyCORIS's {', '.join(sorted(other))}, whose formulas "
            "are not read from files: merge it into its base and compare the merged checkpoint."
        )
    if any(name.startswith("base_model.model.") for name in contents.tensors):
        raise CheckpointError(
            f"{contents.path} holds the tensors of a PEFT adapter, whose scaling is in its "
            "adapter_config.json: put the two into one folder and give that."
        )


def _in_diffusers_form(base: Iterable[str]) -> str:
    if any(name.startswith("model.diffusion_model.") for name in base):
        return ", or its layers go by the names of diffusers: give the base in that form"
    return ""


def _split(name: str) -> tuple[str, str | None]:
    """The module a tensor belongs to and which part of its layer it is; None for no part."""
    old = _OLD_DIFFUSERS.match(name)
    if old:
        module = old.group(2) + (".0" if old.group(2) == "to_out" else "")
        return f"{old.group(1)}.{module}", old.group(3)
    pieces = name.split(".")
    for length in (3, 2, 1):
        part = _PARTS.get(".".join(pieces[-length:]))
        if part is not None and len(pieces) > length:
            return ".".join(pieces[:-length]), part
    return name, None


class _Finder:
    """Finds a base's module by the name a LoRA file has for it."""

    def __init__(self, modules: set[str]) -> None:
        self._modules = modules
        self._flat: dict[str, set[str]] = {}
        self._tails: dict[str, set[str]] = {}
        for module in modules:
            parts = module.split(".")
            for cut in range(min(4, len(parts))):
                tail = parts[cut:]
                self._flat.setdefault("_".join(tail), set()).add(module)
                self._tails.setdefault(".".join(tail), set()).add(module)

    def find(self, name: str, where: object) -> str | None:
        for prefix in ("base_model.model.", "diffusion_model."):
            name = name.removeprefix(prefix)
        if name in self._modules:
            return name
        for prefix, component in _COMPONENTS.items():
            if name.startswith(prefix):
                flat = name.removeprefix(prefix)
                found = self._flat.get(flat, set())
                own = {module for module in found if component and module.startswith(component)}
                return _only(own or found, name, where)
        found = self._tails.get(name, set())
        if not found and "." in name:  # the file names the component, the base is that component
            found = self._tails.get(name.partition(".")[2], set())
        return _only(found or self._flat.get(name, set()), name, where)


def _only(found: set[str], name: str, where: object) -> str | None:
    if len(found) > 1:
        shown = " and ".join(sorted(found)[:2])
        raise CheckpointError(f"{where}: the layer {name!r} could be {shown}; give the exact base.")
    return next(iter(found), None)


def _metadata_scalings(metadata: Mapping[str, str], where: object) -> dict[str, float]:
    """Scaling by component ("unet", "transformer", "") where diffusers wrote its LoraConfig."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        content = strict_json.parsed(text)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: its lora_adapter_metadata, which has the scaling, is not JSON of one "
            f"meaning ({error}): save it again."
        ) from error
    scalings: dict[str, float] = {}
    for key in content if isinstance(content, dict) else ():
        if key == "r" or key.endswith(".r"):
            component = key[:-1]
            rank, alpha = content[key], content.get(f"{component}lora_alpha")
            if type(rank) is int and type(alpha) in (int, float) and 0 < rank < _MOST_RANK:
                root = content.get(f"{component}use_rslora")
                scalings[component] = float(alpha) / (rank**0.5 if root else rank)
    return scalings


def _scaling_of(module: str, scalings: Mapping[str, float]) -> float | None:
    fitting = [c for c in scalings if module.startswith(c)]
    return scalings[max(fitting, key=len)] if fitting else None
