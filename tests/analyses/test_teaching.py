from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Annotation, Text
from PIL import Image

import dora_dynamics as dd
from analyses.teaching import __main__ as teaching
from analyses.teaching import (
    animation,
    gallery,
    gradient,
    orthogonal_update,
    simpson,
    small_model,
    vectors,
    weight_decay,
)
from dora_dynamics.paper import published_points
from tests.plotting.plotting_tables import trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analyses.teaching.picture import Picture
    from dora_dynamics.plotting import StyledFigure

PAGE = Path(gallery.__file__).parents[2] / "figures" / "README.md"
RESULTS = Path(gallery.__file__).parents[1] / "results" / "teaching.json"


def texts(figure: StyledFigure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


def numbers(text: str) -> list[float]:
    found = re.findall(r"(?<![\w.])[+−-]?\d+\.\d+", text)
    return [float(number.replace("−", "-")) for number in found]


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    return {name: make() for name, make in teaching.PICTURES.items()}


def test_the_gallery_and_the_results_say_what_the_code_says(pictures: dict[str, Picture]) -> None:
    results = gallery.Results.read(RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    assert gallery.filled(page, results) == page, "run python -m analyses.teaching"
    assert list(results.figures) == list(teaching.NAMES)
    for name, picture in pictures.items():
        stored = results.figures[name]
        assert (stored["caption"], stored["alt"]) == (picture.caption, picture.alt)
    for figure in results.figures.values():
        assert len(figure["alt"]) > 100
        assert len(figure["caption"]) > 200
        for name in figure["files"]:
            file = PAGE.parent / "teaching" / name
            assert 5_000 < file.stat().st_size < 2_000_000


def test_committed_drawings_have_words_and_plain_fonts() -> None:
    namespace = "{http://www.w3.org/2000/svg}"
    drawings = sorted((PAGE.parent / "teaching").glob("*.svg"))
    assert len(drawings) == 2 * len(teaching.NAMES)
    for drawing in drawings:
        text = drawing.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        assert all(root.find(f"{namespace}{name}") is not None for name in ("title", "desc"))
        # Symbols of a TeX font stand at other letters' places: without the font, ′ reads as 0.
        fonts = set(re.findall(r"font(?:-family)?: ([^;\"]*)", text))
        assert fonts
        assert all(font.endswith("sans-serif") for font in fonts), fonts
    for document in (PAGE.parent / "teaching").glob("*.pdf"):
        assert b"/Type3" not in document.read_bytes()


@pytest.mark.parametrize("style", ["slide", "column"])
@pytest.mark.parametrize("name", list(teaching.PICTURES))
def test_no_label_covers_another_or_leaves_the_page(
    pictures: dict[str, Picture], name: str, style: str
) -> None:
    figure = pictures[name].draw(style)  # type: ignore[arg-type]
    assert figure.get_figwidth() == (3.25 if style == "column" else 12.8)
    figure.draw_without_rendering()
    for axes in figure.axes:
        shown = [axes.title, axes._left_title, *axes.texts]  # type: ignore[attr-defined]
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in shown
            if text.get_text() and not isinstance(text, Annotation) and not text.get_rotation()
        ]
        for i, (one, box) in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0, one
            assert box.x1 <= figure.bbox.x1 + 1, one
            for other, another in boxes[i + 1 :]:
                assert not box.padded(-1).overlaps(another.padded(-1)), (one, other)
    smallest = min(float(text.get_fontsize()) for text in figure.findobj(Text))
    assert smallest >= (5 if style == "column" else 12)


def test_vectors_carry_the_measured_numbers(pictures: dict[str, Picture]) -> None:
    w, after = (each.numpy() for each in (vectors.BEFORE, vectors.AFTER))
    norms = np.linalg.norm(w, axis=1), np.linalg.norm(after, axis=1)
    moved = np.abs(norms[1] - norms[0])
    turned = 1 - (w * after).sum(1) / (norms[0] * norms[1])
    shown = " ".join(texts(pictures["vectors"].draw("slide")))
    assert f"= {moved[0]:.2f}" in shown
    assert f"= {turned[0]:.2f}" in shown
    assert f"= {moved.mean():.3f}" in shown
    assert f"= {turned.mean():.3f}" in shown
    assert all(f"{value:.3f}" in shown for value in turned)


def test_loras_points_lie_between_the_curves() -> None:
    table = orthogonal_update.measured()
    x, y, m = (
        table[name].to_numpy(dtype=float)
        for name in ("delta_direction", "delta_magnitude", "magnitude_before")
    )
    late = x > 0.02
    np.testing.assert_allclose(y[late], (m * x / (1 - x))[late], rtol=0.2)
    figure = orthogonal_update.draw("slide")
    drawn = np.asarray(figure.axes[1].collections[0].get_offsets())
    np.testing.assert_array_equal(drawn, np.c_[x, y])
    r = np.corrcoef(x, y)[0, 1]
    assert any(f"r = {r:+.2f}, n = 48" in text for text in texts(figure))


def test_decay_turns_the_sign_with_the_same_updates() -> None:
    without, decayed = weight_decay.measured()
    r = [
        np.corrcoef(table["delta_direction"], table["delta_magnitude"])[0, 1]
        for table in (without, decayed)
    ]
    assert r[0] > 0.8
    assert r[1] < -0.8
    assert (without["signed_delta_magnitude"] > 0).all()
    assert (decayed["signed_delta_magnitude"] < 0).all()
    assert decayed["total_decay"].to_numpy() == pytest.approx(weight_decay.TOTAL_DECAY)
    assert (without["total_decay"] == 0).all()
    # To first order decay takes Λ m_0 and nothing else.
    lost = without["signed_delta_magnitude"] - decayed["signed_delta_magnitude"]
    expected = weight_decay.TOTAL_DECAY * without["magnitude_before"]
    np.testing.assert_allclose(lost, expected, rtol=0.12)


def test_autograd_gives_equations_6_7_and_11() -> None:
    rng = np.random.default_rng(0)
    v = gradient.TURNED[0].numpy()
    norm, m = np.linalg.norm(v), gradient.MAGNITUDE_NOW
    for g in [gradient.GRADIENT, *map(tuple, rng.normal(size=(5, 2)))]:
        found = gradient.gradients(g)
        projected = m / norm * (np.eye(2) - np.outer(v, v) / norm**2) @ np.array(g)
        np.testing.assert_allclose(found.of_direction, projected, atol=1e-14)
        np.testing.assert_allclose(found.detached, m / norm * np.array(g), atol=1e-14)
        assert found.of_magnitude == pytest.approx(np.dot(g, v) / norm, abs=1e-14)
        np.testing.assert_allclose(found.weight, m * v / norm)


def test_the_papers_points_are_read_under_both_labels(pictures: dict[str, Picture]) -> None:
    def within(labels: str, by: str) -> list[float]:
        points = published_points(labels)  # type: ignore[arg-type]
        points = points[(points["method"] == "FT") & (points["role"] == "query")]
        return [
            np.corrcoef(part["delta_direction"], part["delta_magnitude"])[0, 1]
            for _, part in points.groupby(by)
        ]

    pooled, printed, reordered, paths, _ = pictures["simpson"].draw("slide").axes

    def said(axes: Axes) -> list[float]:
        return numbers(axes.texts[0].get_text())

    assert said(pooled) == [-0.31]
    assert printed.get_title(loc="left") == "(b) labels as printed"
    assert said(printed) == pytest.approx(within("printed", "step"), abs=0.005)
    assert said(printed) == pytest.approx([0.09, 0.01, 0.18, -0.51], abs=0.005)
    assert reordered.get_title(loc="left") == "(c) labels reordered"
    assert said(reordered) == pytest.approx(within("reordered", "step"), abs=0.005)
    assert "reordered" in paths.get_title(loc="left")
    assert min(within("reordered", "site")) > 0.99
    for axes in (pooled, printed, reordered, paths):
        assert sum(len(np.asarray(c.get_offsets())) for c in axes.collections) == 48
    rows = pictures["simpson"].draw("slide").axes[4]
    assert "printed" in rows.get_yticklabels()[1].get_text()
    assert "reordered" in rows.get_yticklabels()[2].get_text()
    assert simpson.r(simpson.points("DoRA")) == pytest.approx(-0.62, abs=0.005)


def test_frames_move_and_end_with_the_last_rows() -> None:
    table = trajectory(layers=3, steps=(0, 5, 10, 20), stacks=[""])
    motion = animation.Motion(table, "query")
    assert motion.shares == [0.25, 0.5, 1.0]
    limits = set()
    for share, step in zip(motion.shares, (5, 10, 20), strict=True):
        figure = animation.frame(motion, "slide", share)
        limits.add(figure.axes[0].get_xlim())
        assert figure.get_suptitle().startswith(f"step {step} ")
        for axes, method in zip(figure.axes, animation.METHODS, strict=True):
            rows = table[(table["method"] == method) & (table["step"] == step)]
            drawn = np.asarray(axes.collections[0].get_offsets())
            expected = rows[["delta_direction", "delta_magnitude"]].to_numpy()
            np.testing.assert_array_equal(drawn, expected)
            value = np.corrcoef(expected.T)[0, 1]
            assert numbers(axes.texts[-2].get_text()) == pytest.approx([value], abs=0.005)
    assert len(limits) == 1


def test_methods_recorded_at_other_steps_share_the_frames() -> None:
    tables = [trajectory(["FT"], layers=3, steps=(0, 10, 20), stacks=[""])]
    tables.append(trajectory(["LoRA", "DoRA"], layers=3, steps=(0, 100, 150, 200), stacks=[""]))
    motion = animation.Motion(pd.concat(tables), "query")
    assert motion.shares == [0.5, 0.75, 1.0]
    assert set(motion.at("FT", 0.75)["step"]) == {10}
    assert motion.step(0.75) == "steps FT 10, LoRA 150, DoRA 150"


def test_runs_that_lack_a_method_or_role_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"hold no query rows of LoRA, DoRA: .* --runs\.$"):
        animation.Motion(trajectory(["FT"]), "query")
    with pytest.raises(ValueError, match="hold no value rows of FT, LoRA, DoRA"):
        animation.Motion(trajectory(), "value")


def test_films_are_small_and_show_every_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = trajectory(layers=3, steps=(0, 10, 20), stacks=[""])
    motion = animation.Motion(table, "query")
    gif, *films = animation.write(motion, tmp_path / "film")
    assert [film.suffix in (".mp4", ".webm") for film in films] == [True] * len(films)
    assert bool(films) == bool(shutil.which("ffmpeg"))
    assert all(film.stat().st_size > 3_000 for film in films)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert animation._film([], [], tmp_path / "none") == []
    with Image.open(gif) as image:
        assert image.n_frames == 2  # type: ignore[attr-defined]
        assert image.width == animation.PIXELS
        assert image.height % 2 == 0
        first = np.asarray(image.convert("RGB"))
        assert tuple(first[2, 2]) == (255, 255, 255)
        image.seek(1)
        assert (np.asarray(image.convert("RGB")) != first).any()


def recorded(method: str, folder: Path) -> Path:
    """A run directory of the small model after two steps of a method."""
    model = small_model.SmallModel()
    if method != "FT":
        apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
        apply(model, ["query"], rank=2, alpha=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    recorder = dd.Recorder(model, ["query"], every=1, run_dir=folder, method=method)
    with recorder.attach(optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            torch.autograd.backward(model.loss(torch.randn(8, small_model.INPUTS)))
            optimizer.step()
    return folder


def test_the_recipe_from_recorded_runs(tmp_path: Path) -> None:
    runs = [recorded(method, tmp_path / "runs" / method) for method in animation.METHODS]
    arguments = ["--only", "animation", "--styles", "column", "--out", str(tmp_path)]
    teaching.main([*arguments, "--runs", *map(str, runs)])
    results = gallery.Results.read(tmp_path / "analyses" / "results" / "teaching.json")
    assert list(results.figures) == ["animation"]
    assert [run["method"] for run in results.about["runs"]] == list(animation.METHODS)
    page = (tmp_path / "figures" / "README.md").read_text(encoding="utf-8")
    for figure in results.figures.values():
        assert figure["caption"] in page
        assert f"![{figure['alt']}]" in page
        for name in figure["files"]:
            assert (tmp_path / "figures" / "teaching" / name).exists()
            assert f"(teaching/{name})" in page
