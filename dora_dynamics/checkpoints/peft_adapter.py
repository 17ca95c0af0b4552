"""PEFT adapters from their files: LoRA, DoRA and VeRA by their factors, the rest layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Final

import torch

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.lora_file import Adapted
from dora_dynamics.checkpoints.naming import align, plain
from dora_dynamics.checkpoints.peft_layer import (
    LAYERWISE,
    LayerRecipe,
    need_peft,
    refuse_absurd_sizes,
)
from dora_dynamics.checkpoints.updates import Built, Factors, Rebased, Replaced

if TYPE_CHECKING:
    from dora_dynamics.checkpoints.stored import Contents, StoredTensor
    from dora_dynamics.checkpoints.updates import Update

_PREFIX: Final = "base_model.model."
_LORA_PARTS: Final = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_LARGEST_ALPHA: Final = 1e30
"""Of `lora_alpha`: far beyond any, and still finite where it is multiplied."""
_REPEAT: Final = re.compile(r"(?<!\()[*+?{]")
_REPEATED_GROUP: Final = re.compile(r"\)[*+{]")
_MOST_REPEATS: Final = 4
_LONGEST_PATTERN: Final = 1000
_BELOW: Final = ".base_layer.weight"
_TRAINED_TOKENS: Final = "token_adapter.trainable_tokens_delta"
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_A_WEIGHT: Final = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "Arrow mixes adapters by the input",
    "layer_replication": "layer replication makes layers that the base does not have",
    "target_parameters": "adapters on bare parameters are not read from files",
}
_OTHER_FORMULA: Final = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
MERGE: Final = (
    "merge it (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and compare "
    "the merged checkpoint"
)


def read_peft_adapter(contents: Contents, base: Mapping[str, StoredTensor]) -> Adapted:
    """What a PEFT adapter does to the tensors of `base` (by their plain names).

    Raises:
        CheckpointError: the adapter is of a kind whose weight the files do not tell, or it does
            not fit this base.
    """
    config, where = contents.adapter_config, contents.path
    kind = str(config.get("peft_type", "")).upper()
    for key, reason in _NOT_A_WEIGHT.items():
        if config.get(key):
            raise CheckpointError(f"{where} has no weight of its own: {reason}; {MERGE}.")
    if kind not in LAYERWISE and kind != "LN_TUNING":
        raise CheckpointError(
            f"{where} is of the kind {kind or 'that its adapter_config.json leaves out'}, whose "
            f"weights its files alone do not give: {MERGE}, if PEFT can merge it."
        )
    found = _sorted_out(contents, base)
    if not found.layers and not found.saved:
        raise CheckpointError(
            f"{where} adapts no layer of this base (its first tensor is "
            f"{next(iter(contents.tensors), 'missing')!r}): it belongs to another base"
            f"{_named_base(config)}."
        )
    updates: dict[str, Update]
    unmatched = list(found.unmatched)
    if kind == "LORA":
        _refuse_changed_base(contents)
        _check_types(contents)
    if kind == "LN_TUNING":
        updates = _norms(found)
        method = "LN tuning"
    elif kind == "LORA" and not any(config.get(key) for key in _OTHER_FORMULA):
        updates = {}
        for module, parts in found.layers.items():
            read = _tokens if _TRAINED_TOKENS in parts else _lora
            weight = found.below.get(module, base[f"{module}.weight"])
            updates[f"{module}.weight"] = read(found.paths[module], parts, contents, weight)
        method = "DoRA" if config.get("use_dora") else "LoRA"
    else:
        updates = _built(kind, found, contents, base)
        method = _PLAIN_NAMES.get(kind, kind)
        unmatched = [] if found.layers else unmatched
    for module, start in found.below.items():
        update = updates.get(f"{module}.weight")
        if isinstance(update, (Factors, Built)):
            updates[f"{module}.weight"] = Rebased(start, update)
    updates.update(found.saved)
    return Adapted(updates, method, unmatched, [])


def _norms(found: _Found) -> dict[str, Update]:
    """LN tuning keeps the norms' own weights and biases, whole."""
    return {
        f"{module}.{part.rpartition('.')[2]}": Replaced(tensor)
        for module, parts in found.layers.items()
        for part, tensor in parts.items()
    }


def _built(
    kind: str, found: _Found, contents: Contents, base: Mapping[str, StoredTensor]
) -> dict[str, Update]:
    need_peft(contents)
    weights = {module: found.below.get(module, base[f"{module}.weight"]) for module in found.layers}
    shapes = [weight.shape for weight in weights.values()]
    refuse_absurd_sizes(contents, shapes)
    largest = (max((s[-1] for s in shapes), default=1), max((s[0] for s in shapes), default=1))
    shared = {found.unmatched[name]: contents.tensors[found.unmatched[name]]
              for name in found.unmatched}  # fmt: skip
    return {
        f"{module}.weight": LayerRecipe(
            contents,
            found.paths[module],
            {f"{found.prefixes[module]}.{part}": t for part, t in parts.items()},
            shared,
            largest,
        ).update()
        for module, parts in found.layers.items()
    }


@dataclass(frozen=True)
class _Found:
    """The tensors of an adapter by what they belong to.

    Attributes:
        layers: module of the base → the tensors of its adapter by the rest of their names.
        paths: module of the base → path of the module in the model that was adapted.
        prefixes: module of the base → what its tensors' names in the file start with.
        saved: weights that the adapter keeps whole (`modules_to_save`).
        below: module of the base → the weight below its adapter, where the adapter keeps it too.
        unmatched: tensors that belong to no module of the base: short name → name in the file.
    """

    layers: dict[str, dict[str, StoredTensor]]
    paths: dict[str, str]
    prefixes: dict[str, str]
    saved: dict[str, Update]
    below: dict[str, StoredTensor]
    unmatched: dict[str, str]


_PLAIN_NAMES: Final = {
    "ADALORA": "AdaLoRA",
    "LORA": "LoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "FOURIERFT": "FourierFT",
    "RANDLORA": "RandLoRA",
    "VBLORA": "VB-LoRA",
    "HIRA": "HiRA",
    "MISS": "MiSS",
}


def named_base(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's configuration names, if it does."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _named_base(config: Mapping[str, Any]) -> str:
    name = named_base(config)
    return f", {name!r} by its adapter_config.json" if name else ""


def _modules(base: Mapping[str, StoredTensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in base if name.endswith(".weight")]


def _sorted_out(contents: Contents, base: Mapping[str, StoredTensor]) -> _Found:
    """Which tensor of the adapter belongs to which module of the base, by name."""
    names = {name.removeprefix(_PREFIX): name for name in contents.tensors}
    known = {**dict.fromkeys(base), **dict.fromkeys(_modules(base))}
    heads = {head for name in names for head, _ in _cuts(name)}
    matched = align(known, {plain(head): None for head in (*names, *heads)}, contents.path)
    mine = {theirs: name for name, theirs in matched.pairs.items()}
    found = _Found({}, {}, {}, {}, {}, {})
    for name, original in names.items():
        tensor = contents.tensors[original]
        whole = mine.get(plain(name))
        if whole is not None and whole in base:
            _check_fit(contents, whole, tensor, base[whole])
            if name.endswith(_BELOW):
                found.below[whole.removesuffix(".weight")] = tensor
                continue
            found.saved[whole] = Replaced(tensor)
            continue
        cut = next((c for c in _cuts(name) if f"{mine.get(plain(c[0]))}.weight" in base), None)
        if cut is None:
            found.unmatched[name] = original
            continue
        module = mine[plain(cut[0])]
        found.layers.setdefault(module, {})[cut[1]] = tensor
        found.paths[module] = cut[0]
        found.prefixes[module] = original.removesuffix(f".{cut[1]}")
    for module in [module for module in found.below if module not in found.layers]:
        found.saved[f"{module}.weight"] = Replaced(found.below.pop(module))
    return found


def _cuts(name: str) -> list[tuple[str, str]]:
    """A tensor's name as (module, rest), the longest module first."""
    parts = name.split(".")
    return [
        (".".join(parts[:-length]), ".".join(parts[-length:]))
        for length in range(1, min(5, len(parts)))
    ]


def _check_fit(contents: Contents, name: str, mine: StoredTensor, base: StoredTensor) -> None:
    if mine.shape != base.shape and mine.shape[1:] != base.shape[1:]:
        raise CheckpointError(
            f"{contents.path} holds {name} of shape {mine.shape} and the base of shape "
            f"{base.shape}: the adapter belongs to another base"
            f"{_named_base(contents.adapter_config)}."
        )


def _refuse_changed_base(contents: Contents) -> None:
    init = contents.adapter_config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{contents.path} was initialised with {init!r}, which changes the base weight by "
            "factors that the adapter does not keep: save it with "
            "path_initial_model_for_weight_conversion=, or merge it from the training run and "
            "compare the merged checkpoint."
        )


def _lora(
    module: str, tensors: Mapping[str, StoredTensor], contents: Contents, base: StoredTensor
) -> Factors:
    config, where = contents.adapter_config, contents.path
    chosen = config.get("target_modules")
    if isinstance(chosen, list) and not any(f".{module}".endswith(f".{c}") for c in chosen):
        raise CheckpointError(
            f"{where} has factors of {module}, which the target_modules of its adapter_config.json "
            "do not name, so that PEFT would leave them out: the two files do not belong together."
        )
    parts = {_LORA_PARTS[name]: t for name, t in tensors.items() if name in _LORA_PARTS}
    embedding = "embedding_A" in parts
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if first not in parts or second not in parts:
        raise CheckpointError(f"{where} lacks a factor of {module}: save the adapter again.")
    A, B, m = parts[first], parts[second], parts.get("magnitude")
    if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise CheckpointError(f"{where}: the factors of {module} do not fit together.")
    if bool(config.get("use_dora")) != (m is not None):
        raise CheckpointError(
            f"{where}: use_dora is {bool(config.get('use_dora'))} but {module} "
            f"{'has a' if m is not None else 'has no'} magnitude: save the adapter again."
        )
    update = Factors(
        tuple(t for t in (A, B, m) if t is not None),
        _embedding_factors(A, B) if embedding else _linear_factors(A, B),
        _scaling(module, A.shape[0], contents),
        (lambda: m.load().flatten()) if m is not None else None,
        "input" if embedding else "output",
    )
    _check_factors(module, contents, base, A, B, m, embedding=embedding)
    return update


def _tokens(
    module: str, tensors: Mapping[str, StoredTensor], contents: Contents, base: StoredTensor
) -> Built:
    """A LoRA adapter's `trainable_token_indices`: some rows of an embedding are its own."""
    rows, indices = tensors[_TRAINED_TOKENS], contents.adapter_config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((i for key, i in indices.items() if f".{module}".endswith(f".{key}")), None)
    known = isinstance(indices, list) and all(type(i) is int for i in indices)
    if not known or not all(0 <= i < base.shape[0] for i in indices or ()):
        raise CheckpointError(
            f"{contents.path}: the trainable_token_indices of {module} are not tokens of this base."
        )
    if rows.shape != (len(indices or ()), *base.shape[1:]):
        raise CheckpointError(
            f"{contents.path}: the trained tokens of {module} do not fit its base."
        )
    where = torch.tensor(indices)
    return Built(
        (rows,), lambda weight, _: weight.index_copy(0, where, rows.load().to(torch.float64))
    )


def _linear_factors(A: StoredTensor, B: StoredTensor) -> Any:
    return lambda: (A.load().flatten(1), B.load().flatten(1))


def _embedding_factors(A: StoredTensor, B: StoredTensor) -> Any:
    """The table is (vocabulary, features) and the factors are those of its transpose."""
    return lambda: (B.load().T, A.load().T)


def _check_factors(
    module: str,
    contents: Contents,
    base: StoredTensor,
    A: StoredTensor,
    B: StoredTensor,
    m: StoredTensor | None,
    *,
    embedding: bool,
) -> None:
    rows, columns = B.shape[0], A.shape[1]
    fits: bool
    if len(base.shape) > 2:
        fits = (rows, *A.shape[1:]) == base.shape and all(n == 1 for n in B.shape[2:])
    else:
        fits = {(rows, columns), (columns, rows)} & {base.shape} != set() and len(A.shape) == 2
        if embedding:
            fits = (columns, rows) == base.shape
    if m is not None:
        count = 1
        for size in m.shape:
            count *= size
        fits = fits and count == rows
    if not fits:
        raise CheckpointError(
            f"{contents.path}: the factors of {module} are for a weight of shape {(rows, columns)} "
            f"and the base's is {base.shape}: the adapter belongs to another base"
            f"{_named_base(contents.adapter_config)}."
        )


def _check_types(contents: Contents) -> None:
    """Refuse what PEFT would take for something else: "false" is true to it."""
    config, where = contents.adapter_config, contents.path
    for name in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(name), (bool, type(None))):
            raise CheckpointError(f"{where}: its {name} is {config[name]!r}, not true or false.")
    for name in ("alpha_pattern", "rank_pattern"):
        if not isinstance(config.get(name), (Mapping, type(None))):
            raise CheckpointError(f"{where}: its {name} is {config[name]!r}, not an object.")


def _scaling(module: str, rank: int, contents: Contents) -> float:
    """The factor alpha / rank (alpha / √rank with rsLoRA), with the alpha that this layer has."""
    config, where = contents.adapter_config, contents.path
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"), where)
    declared = _by_pattern(config.get("rank_pattern"), module, config.get("r"), where)
    if (
        not isinstance(alpha, (int, float))
        or isinstance(alpha, bool)
        or not abs(alpha) <= _LARGEST_ALPHA
    ):
        raise CheckpointError(f"{contents.path}: its lora_alpha is {alpha!r}, not a number.")
    if type(declared) is not int or declared != rank:
        raise CheckpointError(
            f"{contents.path}: {module} has rank {rank} but adapter_config.json says {declared!r}: "
            "the two files do not belong together."
        )
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: object, module: str, default: object, where: object) -> object:
    """PEFT's rule: the first key that matches the end of the path, whole components only."""
    if isinstance(patterns, Mapping):
        for key, value in patterns.items():
            if (
                len(key) > _LONGEST_PATTERN
                or len(_REPEAT.findall(key)) > _MOST_REPEATS
                or _REPEATED_GROUP.search(key)
            ):
                raise CheckpointError(
                    f"{where}: the pattern {key[:80]!r} of its adapter_config.json could take "
                    "forever to match: name the modules by the ends of their paths."
                )
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return value
            except re.error:
                continue
    return default
