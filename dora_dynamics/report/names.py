"""The names of a report, once each, and the colours of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.colors import Normalize, to_hex

from dora_dynamics.plotting._rows import in_order
from dora_dynamics.plotting._style import (
    LAYER_COLOURS,
    LAYER_MAP,
    NO_LAYER_COLOUR,
    layer_colours,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_dynamics.report.series import RunSeries

_ON_DARK: Final = {"#000000": "#F2F2F2", "#0072B2": "#3D9BD6"}
"""Colours of the palette that a dark page would swallow, and what stands for them there."""


@dataclass(frozen=True)
class LayerKey:
    """One entry of the legend of layers: its name, and its colour on a light and a dark page."""

    name: str
    light: str
    dark: str


@dataclass(frozen=True)
class Names:
    """The names of a report, in the order in which its numbers refer to them."""

    methods: list[str]
    roles: list[str]
    sites: list[str]
    layers: list[LayerKey]
    rows: list[str]


def names_of(series: Sequence[RunSeries]) -> tuple[Names, list[pd.DataFrame]]:
    """All names, and for each run the numbers by which its lines refer to them."""
    keys = pd.concat([one.keys for one in series], ignore_index=True)
    layers = sorted({int(layer) for layer in keys["layer"].dropna()})
    stacks = in_order(keys["stack"])
    places = (
        keys.assign(order=keys["stack"].map(stacks.index))[["order", "stack", "layer"]]
        .drop_duplicates()
        .sort_values(["order", "layer"], na_position="last")
    )
    row_of = {place: number for number, place in enumerate(_places(places))}
    rows = [
        f"{stack} {_layer_name(layer)}" if len(stacks) > 1 else _layer_name(layer)
        for stack, layer in row_of
    ]
    unnumbered = bool(keys["layer"].isna().any())
    names = Names(
        methods=in_order(one.method for one in series),
        roles=list(dict.fromkeys(keys["role"])),
        sites=list(dict.fromkeys(keys["site"])),
        layers=_layer_keys(layers, unnumbered=unnumbered),
        rows=rows,
    )
    site_of = {name: number for number, name in enumerate(names.sites)}
    role_of = {name: number for number, name in enumerate(names.roles)}
    numbered = []
    for one in series:
        layer = one.keys["layer"]
        numbered.append(
            pd.DataFrame(
                {
                    "site": one.keys["site"].map(site_of),
                    "role": one.keys["role"].map(role_of),
                    "layer": [
                        len(layers) if pd.isna(number) else layers.index(int(number))
                        for number in layer
                    ],
                    "row": [row_of[place] for place in _places(one.keys)],
                    "head": one.keys["head"].fillna(-1),
                }
            ).astype("int64")
        )
    return names, numbered


def _places(keys: pd.DataFrame) -> list[tuple[str, int | None]]:
    """Stack and layer of each line."""
    layers = [None if pd.isna(layer) else int(layer) for layer in keys["layer"]]
    return list(zip(keys["stack"].astype(str), layers, strict=True))


def _layer_name(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def _layer_keys(layers: Sequence[int], *, unnumbered: bool) -> list[LayerKey]:
    few = len(layers) <= len(LAYER_COLOURS)
    scale = Normalize(layers[0], max(layers[-1], layers[0] + 1)) if layers else Normalize(0, 1)
    colour_map = mpl.colormaps[LAYER_MAP]
    keys = []
    for layer, light in layer_colours(layers).items():
        # The dark end of the colour map is lost on a dark page, its bright end on a light one.
        at = float(scale(layer))
        dark = _ON_DARK.get(light, light) if few else to_hex(colour_map(0.25 + 0.75 * at))
        keys.append(LayerKey(f"{layer}", light if few else to_hex(colour_map(0.92 * at)), dark))
    if unnumbered:
        keys.append(LayerKey("none", NO_LAYER_COLOUR, "#A0A0A0"))
    return keys
