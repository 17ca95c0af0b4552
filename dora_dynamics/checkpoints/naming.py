"""Names in one file against names in another: by name, never by position."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.sites.names import clean_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Alignment:
    """Which name of one file is which name of another.

    Attributes:
        pairs: name in the base → name in the other file.
        only_base: names that the base alone has.
        only_other: names that the other file alone has.
        added: what stands before the base's names in the other file, "" where nothing does.
        removed: what stands before the other file's names in the base.
    """

    pairs: dict[str, str]
    only_base: list[str]
    only_other: list[str]
    added: str = ""
    removed: str = ""


def plain(name: str) -> str:
    """`name` without what torch.compile, FSDP, DDP, checkpointing and PEFT put into it."""
    parts = clean_name(name).split(".")
    while len(parts) > 2 and parts[0] in ("module", "_forward_module"):
        parts = parts[1:]
    return ".".join(parts)


def plain_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Plain name → name in the file.

    Raises:
        CheckpointError: two names of the file are one without their wrappers.
    """
    found: dict[str, str] = {}
    for name in names:
        short = plain(name)
        if short in found:
            raise CheckpointError(
                f"{where} holds both {found[short]!r} and {name!r}, which are one weight: save one."
            )
        found[short] = name
    return found


def align(base: Mapping[str, object], other: Mapping[str, object], where: object) -> Alignment:
    """Match names that are equal, or equal but for one prefix that all of them share.

    A model saved inside a larger one ("bert." before every name, "model." in a Lightning module)
    still matches; the prefix that fits the most names is taken.

    Raises:
        CheckpointError: two prefixes fit equally well (an averaged copy beside the model, say).
    """
    votes: Counter[tuple[str, str]] = Counter()
    for name in other:
        for prefix, rest in _splits(name):
            if rest in base:
                votes[prefix, ""] += 1
    for name in base:
        for prefix, rest in _splits(name):
            if prefix and rest in other:
                votes["", prefix] += 1
    if not votes:
        return Alignment({}, list(base), list(other))
    most = max(votes.values())
    best = [prefixes for prefixes, count in votes.items() if count == most]
    if ("", "") in best:
        best = [("", "")]
    if len(best) > 1:
        shown = " and ".join(repr(added or removed) for added, removed in best[:2])
        raise CheckpointError(
            f"{where} holds this model's names twice, behind {shown}: save a state dict with one."
        )
    added, removed = best[0]
    pairs = {
        name: added + name.removeprefix(removed)
        for name in base
        if name.startswith(removed) and added + name.removeprefix(removed) in other
    }
    taken = set(pairs.values())
    return Alignment(
        pairs,
        [name for name in base if name not in pairs],
        [name for name in other if name not in taken],
        added,
        removed,
    )


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Each way to cut up to four leading components off a name, the name whole first."""
    parts = name.split(".")
    for cut in range(min(5, len(parts))):
        yield "".join(part + "." for part in parts[:cut]), ".".join(parts[cut:])
