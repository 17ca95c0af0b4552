from __future__ import annotations

import itertools

import numpy as np
from matplotlib.colors import to_rgb

from dora_dynamics.plotting._style import LAYER_COLOURS, layer_colours, signed_number

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour: str, vision: object) -> np.ndarray:
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(vision) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_layer_colours_differ_with_any_colour_vision_and_from_white() -> None:
    for vision in VISIONS.values():
        for one, other in itertools.combinations([*LAYER_COLOURS, "#FFFFFF"], 2):
            assert np.linalg.norm(lab(one, vision) - lab(other, vision)) > 9, (one, other)


def test_few_layers_are_qualitative_and_many_come_from_a_map() -> None:
    assert layer_colours([0, 3]) == {0: LAYER_COLOURS[0], 3: LAYER_COLOURS[1]}
    assert len(set(layer_colours(range(48)).values())) == 48


def test_numbers_have_a_sign_and_a_true_minus() -> None:
    assert [signed_number(value) for value in (-0.305, 0.0, 12.0, -1141.12, -2e-5, 3e7)] == [
        "−0.30",
        "+0.00",
        "+12.00",
        "−1141",
        "−2.00e−05",
        "+3.00e+07",
    ]
