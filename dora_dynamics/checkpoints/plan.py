"""What will be compared: the base, its sites, and what each checkpoint holds of them.

Everything here comes from headers, so that a plan costs nothing and every mistake that headers
can show is found before anything is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dora_dynamics.checkpoints.catalogue import choose_sites, names_in_contents, tensor_name
from dora_dynamics.checkpoints.discover import expand, hub_name, locate
from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.lora_file import Adapted, read_lora_file
from dora_dynamics.checkpoints.naming import align, plain_names
from dora_dynamics.checkpoints.opening import LARGEST_STEP, open_checkpoint, step_of
from dora_dynamics.checkpoints.peft_adapter import named_base, read_peft_adapter
from dora_dynamics.checkpoints.updates import Rebased, Replaced, is_built

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dora_dynamics.checkpoints.stored import Contents, StoredTensor
    from dora_dynamics.checkpoints.updates import Update
    from dora_dynamics.sites import Granularity, Site
    from dora_dynamics.sites.select import Target

StrPath = str | os.PathLike[str]

_HEADS: Final = ("lm_head", "embed_out", "decoder", "output_embeddings")
"""Names of output layers, whose rows are the vocabulary as an embedding's are."""


@dataclass(frozen=True)
class Options:
    """How to compare; see `compare_checkpoints`."""

    targets: Sequence[Target] | None = None
    granularity: Granularity = "matrix"
    transposed: Sequence[str] = ()
    steps: Sequence[int] | None = None


@dataclass(frozen=True)
class Base:
    """The pre-trained checkpoint: its tensors by their plain names."""

    path: Path
    contents: Contents
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Planned:
    """One checkpoint of a plan.

    Attributes:
        path: of the checkpoint.
        step: optimizer steps done.
        method: "FT", "LoRA", "DoRA" or the tuner's name.
        sites: the sites it holds, in the plan's order.
        nbytes: bytes to read for them, those of the base included.
        only_base: sites that the base alone has: left out.
        only_checkpoint: names that the checkpoint alone has.
        notes: what a reader of the result has to know.
    """

    path: Path
    step: int
    method: str
    sites: tuple[Site, ...]
    nbytes: int
    only_base: tuple[str, ...]
    only_checkpoint: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that will be compared."""

    base: Base
    sites: tuple[Site, ...]
    targets: tuple[Target, ...]
    checkpoints: tuple[Planned, ...]
    options: Options = field(default_factory=Options)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(checkpoint.nbytes for checkpoint in self.checkpoints)


def make_plan(
    base: StrPath | None, checkpoints: StrPath | Sequence[StrPath], options: Options
) -> Plan:
    """Find the checkpoints, open every header and match the names.

    Raises:
        CheckpointError: anything that headers can show to be wrong.
    """
    if isinstance(checkpoints, (str, os.PathLike)):
        checkpoints = [checkpoints]
    paths = expand(list(checkpoints))
    if not paths:
        raise CheckpointError("no checkpoint was given.")
    opened_base = open_base(locate(base) if base is not None else _base_of(paths))
    first = open_checkpoint(paths[0])
    targets = _targets(opened_base, first, options)
    fan = first.adapter_config.get("fan_in_fan_out")
    sites = choose_sites(
        opened_base.tensors,
        opened_base.contents.config,
        targets,
        granularity=options.granularity,
        transposed=options.transposed,
        fan_in_fan_out=fan if isinstance(fan, bool) else None,
        names=names_in_contents(opened_base.contents),
    )
    steps = _steps(paths, options.steps)
    planned = [
        _planned(opened_base, sites, path, step) for path, step in zip(paths, steps, strict=True)
    ]
    planned.sort(key=lambda checkpoint: checkpoint.step)
    return Plan(opened_base, tuple(sites), tuple(targets), tuple(planned), options)


def open_base(path: Path) -> Base:
    """Open the pre-trained checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is itself an adapter.
    """
    contents = open_checkpoint(path)
    if contents.kind != "weights":
        raise CheckpointError(f"{path} is an adapter and cannot be the base: give its base model.")
    names = plain_names(contents.tensors, path)
    tensors = {short: contents.tensors[name] for short, name in names.items()}
    return Base(path, contents, tensors)


def read_updates(
    base: Base, sites: Sequence[Site], path: Path
) -> tuple[dict[Site, Update], Adapted]:
    """What a checkpoint makes of each site, where it holds it.

    Raises:
        CheckpointError: it cannot be read or does not fit the base.
    """
    contents = open_checkpoint(path)
    if contents.kind == "peft":
        adapted = read_peft_adapter(contents, base.tensors)
    elif contents.kind == "lora":
        adapted = read_lora_file(contents, base.tensors)
    else:
        adapted = _read_weights(base, sites, contents)
    updates = {
        site: adapted.updates[tensor_name(site)]
        for site in sites
        if tensor_name(site) in adapted.updates
    }
    notes = list(adapted.notes)
    for site, update in updates.items():
        mine = base.tensors[tensor_name(site)]
        own = () if is_built(update) else update.parts
        _check_dtypes(path, site, (mine, *own))
        if isinstance(update, Rebased):
            _check_dtypes(path, site, (update.start,))
            notes += _compare_shapes(path, site, mine, update.start)
        elif isinstance(update, Replaced):
            notes += _compare_headers(path, site, mine, update.tensor)
    return updates, replace(adapted, notes=list(dict.fromkeys(notes)))


def _read_weights(base: Base, sites: Sequence[Site], contents: Contents) -> Adapted:
    names = plain_names(contents.tensors, contents.path)
    found = align(base.tensors, names, contents.path)
    notes = []
    if found.added or found.removed:
        where = "the checkpoint" if found.added else "the base"
        notes.append(f"{where} has {found.added or found.removed!r} before every name")
    updates: dict[str, Update] = {}
    for site in sites:
        name = tensor_name(site)
        if name not in found.pairs or name in updates:
            continue
        other = contents.tensors[names[found.pairs[name]]]
        notes += _untied(contents, site, names, other)
        updates[name] = Replaced(other)
    return Adapted(updates, "FT", found.only_other, list(dict.fromkeys(notes)))


def _untied(
    contents: Contents, site: Site, names: Mapping[str, str], own: StoredTensor
) -> list[str]:
    """Other names of a weight of the base under which the checkpoint holds another tensor."""
    found = [f"{name.partition('[')[0]}.weight" for name in site.also_known_as]
    return [
        f"{name} is {site.name} in the base, and here it may be a weight of its own: it is left out"
        for name in found
        if name in names and (own.place is None or contents.tensors[names[name]].place != own.place)
    ]


def _compare_headers(path: Path, site: Site, mine: StoredTensor, other: StoredTensor) -> list[str]:
    notes = _compare_shapes(path, site, mine, other)
    if mine.dtype != other.dtype:
        notes.append(
            f"the base is {_short(mine)} and the checkpoint {_short(other)}: each is taken as it "
            "is stored, so that rounding from one to the other counts as change"
        )
    return notes


def _compare_shapes(path: Path, site: Site, mine: StoredTensor, other: StoredTensor) -> list[str]:
    notes = []
    if mine.shape != other.shape:
        resizable = site.kind == "embedding" or site.name.rpartition(".")[2] in _HEADS
        if not resizable or not mine.shape or mine.shape[1:] != other.shape[1:]:
            raise CheckpointError(
                f"{path}: {tensor_name(site)} has shape {other.shape} and the base's has "
                f"{mine.shape}: this checkpoint belongs to another base."
            )
        notes.append(
            f"{tensor_name(site)} was resized from {mine.shape[0]} to {other.shape[0]} rows: the "
            f"first {min(mine.shape[0], other.shape[0])} are compared"
        )
    return notes


def _check_dtypes(path: Path, site: Site, tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2:
            continue
        if len(tensor.shape) <= 1 and not tensor.dtype.is_floating_point:
            continue  # an alpha may be a whole number
        raise CheckpointError(
            f"{path}: {site.name} is stored as {_short(tensor)}: save it dequantised, in 16 bits "
            "or more."
        )


def _short(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _planned(base: Base, sites: Sequence[Site], path: Path, step: int) -> Planned:
    updates, adapted = read_updates(base, sites, path)
    if not updates:
        raise CheckpointError(
            f"{path} holds none of the chosen weights ({sites[0].name}, …): check that it belongs "
            f"to {base.path}, and the targets."
        )
    notes = list(adapted.notes)
    config = open_checkpoint(path).adapter_config if adapted.method != "FT" else {}
    named = named_base(config)
    if named is not None and Path(named).name != Path(hub_name(base.path)).name:
        notes.append(f"the adapter names {named} as its base; it is compared with {base.path}")
    return Planned(
        path,
        step,
        adapted.method,
        tuple(updates),
        sum(site_bytes(base, site, update) for site, update in updates.items()),
        tuple(site.name for site in sites if site not in updates),
        tuple(adapted.unmatched),
        tuple(notes),
    )


def site_bytes(base: Base, site: Site, update: Update) -> int:
    """Bytes that are read to measure a site."""
    stored = base.tensors[tensor_name(site)]
    whole = stored.nbytes + sum(part.nbytes for part in update.parts)
    if site.rows is None:
        return whole
    rows = stored.shape[1] if site.stored_transposed else stored.shape[0]
    return whole * sum(stop - start for start, stop in site.rows) // max(1, rows)


def _targets(base: Base, first: Contents, options: Options) -> list[Target]:
    if options.targets is not None:
        if isinstance(options.targets, str):
            raise TypeError(f"targets must be a list of strings: [{options.targets!r}].")
        return list(options.targets)
    if first.kind == "weights":
        return ["*"]
    read = read_peft_adapter if first.kind == "peft" else read_lora_file
    adapted = read(first, base.tensors)
    names = [name for name in base.tensors if name in adapted.updates]
    matrices = [name for name in names if len(base.tensors[name].shape) > 1]
    return [name.removesuffix(".weight") for name in matrices or names]


def _base_of(paths: Sequence[Path]) -> Path:
    """The base that the adapters name.

    Raises:
        CheckpointError: they are no adapters, name none or name several.
    """
    names = {named_base(open_checkpoint(path).adapter_config) for path in paths}
    if len(names) != 1 or None in names:
        raise CheckpointError(
            f"{paths[0]} does not name the base it was trained from: give the base "
            "(dora-dynamics compare BASE CKPT)."
        )
    name = str(names.pop())
    try:
        return locate(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{paths[0]} names {name} as its base, which cannot be opened: {error}"
        ) from error


def _steps(paths: Sequence[Path], given: Sequence[int] | None) -> list[int]:
    """The step of each checkpoint: as given, as it tells, or its place where none tells any."""
    if given is not None:
        if len(given) != len(paths):
            raise CheckpointError(
                f"{len(given)} steps were given for {len(paths)} checkpoints: give one for each."
            )
        wrong = next((step for step in given if not 0 <= step <= LARGEST_STEP), None)
        if wrong is not None:
            raise CheckpointError(f"a step cannot be {wrong}: it counts the optimizer's steps.")
        steps: list[int | None] = list(given)
    else:
        steps = [_step(path) for path in paths]
    if all(step is None for step in steps):
        return list(range(1, len(paths) + 1))
    for path, step in zip(paths, steps, strict=True):
        if step is None:
            raise CheckpointError(
                f"{path} does not tell its step while others do: give --steps for all of them."
            )
    known = [step for step in steps if step is not None]
    twice = next((step for step in known if known.count(step) > 1), None)
    if twice is not None:
        both = [str(p) for p, step in zip(paths, known, strict=True) if step == twice]
        raise CheckpointError(
            f"{both[0]} and {both[1]} are both of step {twice}: leave one out, or give --steps."
        )
    return known


def _step(path: Path) -> int | None:
    return step_of(path, open_checkpoint(path))


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for people and machines."""
    return {
        "base": str(plan.base.path),
        "targets": [t if isinstance(t, str) else t.pattern for t in plan.targets],
        "sites": len(plan.sites),
        "bytes": plan.nbytes,
        "checkpoints": [
            {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "method": checkpoint.method,
                "sites": len(checkpoint.sites),
                "bytes": checkpoint.nbytes,
                "only_in_base": list(checkpoint.only_base),
                "only_in_checkpoint": list(checkpoint.only_checkpoint),
                "notes": list(checkpoint.notes),
            }
            for checkpoint in plan.checkpoints
        ],
    }
