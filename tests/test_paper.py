from __future__ import annotations

import numpy as np
import pytest

from dora_dynamics.paper import published_correlations, published_points
from dora_dynamics.trajectory import COLUMN_NAMES

SLOPES = {
    ("query", "FT"): (-0.31, -1.22),
    ("query", "LoRA"): (0.96, 3.76),
    ("query", "DoRA"): (-0.62, -2.49),
    ("value", "FT"): (-0.54, -0.30),
    ("value", "LoRA"): (0.86, 3.10),
    ("value", "DoRA"): (-0.95, -2.04),
}


@pytest.mark.parametrize("labels", ["printed", "reordered"])
def test_points_are_a_full_trajectory_with_the_known_correlations(labels: str) -> None:
    points = published_points(labels)  # type: ignore[arg-type]
    assert set(points.columns) <= set(COLUMN_NAMES)
    assert len(points) == 288
    assert set(points["run"]) == {"paper"}
    assert set(points["step"]) == {1, 2, 3, 4}
    assert set(points["layer"]) == set(range(6))
    assert set(points["stack"]) == {"1", "2"}
    assert not points.duplicated(["method", "step", "site"]).any()
    assert points["site"].nunique() == 24
    assert points.notna().all(axis=None)
    for (role, method), (r, slope) in SLOPES.items():
        mine = points[(points["role"] == role) & (points["method"] == method)]
        x, y = mine["delta_direction"].to_numpy(), mine["delta_magnitude"].to_numpy()
        assert np.corrcoef(x, y)[0, 1] == pytest.approx(r, abs=0.005)
        assert np.polyfit(x, y, 1)[0] == pytest.approx(slope, abs=0.005)


def test_a_point_as_printed() -> None:
    points = published_points().set_index(["role", "method", "step", "layer", "stack"])
    place = ("value", "DoRA", 4, 5, "2")
    assert points["delta_direction"].to_dict()[place] == 0.18388
    assert points["delta_magnitude"].to_dict()[place] == 0.9478


def test_reordered_weights_of_ft_move_one_way() -> None:
    points = published_points("reordered")
    ft = points[points["method"] == "FT"]
    for measure in ("delta_direction", "delta_magnitude"):
        paths = ft.pivot(index="site", columns="step", values=measure).to_numpy()
        assert (np.diff(paths, axis=1) > 0).all()
    printed = published_points()
    ft = printed[printed["method"] == "FT"]
    paths = ft.pivot(index="site", columns="step", values="delta_direction").to_numpy()
    assert not (np.diff(paths, axis=1) > 0).all(axis=1).any()
    with pytest.raises(ValueError, match="choose 'printed' or 'reordered'"):
        published_points("sorted")  # type: ignore[arg-type]


def test_correlations_of_the_text() -> None:
    claims = published_correlations().set_index(["role", "method"])["paper"]
    assert claims.to_dict() == {
        ("query", "FT"): -0.62,
        ("query", "LoRA"): 0.83,
        ("query", "DoRA"): -0.31,
    }
