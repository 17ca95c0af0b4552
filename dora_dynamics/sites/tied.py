"""One tensor under several names: tied weights, and modules that are used in several places."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dora_dynamics.sites.catalogue import Weight
    from dora_dynamics.sites.site import Site

_WITH_A_HEAD: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in"})
_HEADS: Final = frozenset({"lm_head", "embed_out", "output_embeddings"})


def names_in_file(
    places: Mapping[str, object], metadata: Mapping[str, str], config: Mapping[str, Any]
) -> list[list[str]]:
    """The names of each tensor of a checkpoint that has several, by `Site.tensor`.

    Told by tensors that lie in the same place of a file, by safetensors' notes of the names that
    it left out, and by the architecture: a language model without a head of its own has the
    embedding's.

    Args:
        places: of each tensor, by its plain name, where it lies; None where nothing else can be.
        metadata: of the file.
        config: the model's `config.json`.
    """
    by_place: dict[object, list[str]] = defaultdict(list)
    for name, place in places.items():
        by_place[name if place is None else place].append(name)
    for removed, kept in metadata.items():
        if kept in places and removed not in places:
            by_place[kept if places[kept] is None else places[kept]].append(removed)
    groups = [[_of_tensor(name) for name in names] for names in by_place.values()]
    leaves = {name: name.rpartition(".")[2] for (name, *_) in groups}
    embeddings = [group for group in groups if leaves[group[0]] in _EMBEDDINGS]
    named = any(name.rpartition(".")[2] in _HEADS for group in groups for name in group)
    architectures = [str(name) for name in config.get("architectures") or []]
    if (
        any(name.endswith(_WITH_A_HEAD) for name in architectures)
        and config.get("tie_word_embeddings", True)
        and len(embeddings) == 1
        and not named
    ):
        embeddings[0].append("lm_head")
    return [names for names in groups if len(names) > 1]


def with_names(weights: Iterable[Weight], groups: Sequence[Sequence[str]]) -> list[Weight]:
    """The weights, whose sites know all names of their tensors."""
    others = {
        name: tuple(other for other in names if other != name) for names in groups for name in names
    }
    return [
        replace(weight, wholes=tuple(_known(whole, others) for whole in weight.wholes))
        for weight in weights
    ]


def _known(site: Site, others: Mapping[str, tuple[str, ...]]) -> Site:
    own = site.name.removeprefix(site.tensor)
    return replace(site, also_known_as=tuple(name + own for name in others.get(site.tensor, ())))


def once(sites: Iterable[Site]) -> list[Site]:
    """The sites without those that an earlier one is under another name."""
    found: list[Site] = []
    known: set[tuple[str, int | None, bool]] = set()
    for site in sites:
        if (site.name, site.head, site.stored_transposed) not in known:
            found.append(site)
            known |= {(name, site.head, site.stored_transposed) for name in site.also_known_as}
    return found


def other_names(sites: Iterable[Site]) -> dict[str, list[str]]:
    """Of each site that has several names, by `Site.key`, the others."""
    return {site.key: list(site.also_known_as) for site in sites if site.also_known_as}


def check_ties(sites: Iterable[Site], groups: Iterable[Sequence[str]], *, stacklevel: int) -> None:
    """Warn of sites that were one weight when they were found, and no longer are.

    Args:
        sites: as they were found.
        groups: the names that each tensor has now, of those that have several.
        stacklevel: of the warning, from here.
    """
    together = [set(names) for names in groups]
    for site in sites:
        group = next((names for names in together if site.tensor in names), set())
        for other in site.also_known_as:
            if other.partition("[")[0] not in group:
                warnings.warn(
                    f"{other} and {site.name} were one weight when the recorder was made and are "
                    f"two now (untied, or an adapter on one of them): {site.name} is recorded.",
                    stacklevel=stacklevel,
                )


def _of_tensor(name: str) -> str:
    return name.removesuffix(".weight")
