"""The points of FT, LoRA and DoRA moving as training goes on, from recorded runs."""

from __future__ import annotations

import io
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from analyses.teaching import look
from analyses.teaching.look import QUIET, signed
from analyses.teaching.picture import Picture
from dora_dynamics.correlation import pearson
from dora_dynamics.plotting import METHOD_COLOURS, METHOD_MARKERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

    from dora_dynamics.plotting import StyledFigure, StyleName

METHODS: Final = ("FT", "LoRA", "DoRA")
MOST_FRAMES: Final = 24
PIXELS: Final = 960
SECONDS: Final = 0.3
"""How long a frame is shown; the last stays for two seconds more."""
_TOO_NEAR: Final = 0.05
"""Share of the axes within which points cover each other."""
_ENCODERS: Final = {
    "mp4": ["-c:v", "libx264", "-crf", "20", "-movflags", "+faststart"],
    "webm": ["-c:v", "libvpx-vp9", "-crf", "28", "-b:v", "0"],
}


class Motion:
    """The rows of recorded runs, frame by frame.

    Methods may have been recorded at different steps: a frame shows every run at the same share of
    its training, at the last row taken by then.

    Attributes:
        rows: one role's rows after step 0, of runs of FT, LoRA and DoRA.
        role: the role shown.
        shares: of training, one for each frame.
    """

    def __init__(self, trajectory: pd.DataFrame, role: str) -> None:
        rows = trajectory[(trajectory["step"] > 0) & (trajectory["role"] == role)]
        rows = rows[rows["method"].isin(METHODS)]
        missing = [name for name in METHODS if name not in set(rows["method"])]
        if missing:
            raise ValueError(
                f"the runs hold no {role} rows of {', '.join(missing)}: the animation shows FT, "
                "LoRA and DoRA side by side; name a run directory of each with --runs."
            )
        last = rows.groupby("run")["step"].transform("max")
        self.rows = rows.assign(share=rows["step"] / last)
        self.role = role
        shares = np.unique(self.rows["share"].round(6))
        count = min(MOST_FRAMES, len(shares))
        self.shares: list[float] = [
            float(shares[i]) for i in np.linspace(0, len(shares) - 1, count).round().astype(int)
        ]

    def at(self, method: str, share: float) -> pd.DataFrame:
        """The newest row of every weight of a method at a share of its training."""
        rows = self.rows[self.rows["method"] == method]
        rows = rows[rows["share"] <= share + 1e-6].sort_values("step")
        return rows.groupby(["run", "site"], sort=False).tail(1)

    def step(self, share: float) -> str:
        """The steps of the methods at this share, as one where they agree."""
        steps = {method: self.at(method, share)["step"].max() for method in METHODS}
        if len(set(steps.values())) == 1:
            return f"step {steps['FT']:,.0f}"
        return "steps " + ", ".join(f"{name} {step:,.0f}" for name, step in steps.items())


def r(points: pd.DataFrame) -> float:
    """Pearson's r of ΔD and ΔM across the weights of a frame."""
    return pearson(points["delta_direction"].to_numpy(), points["delta_magnitude"].to_numpy())


def picture(motion: Motion, source: str) -> Picture:
    """The last frame, with the words of the whole; `source` says what was trained."""
    found = {method: motion.at(method, 1.0) for method in METHODS}
    ends = ", ".join(f"{method} {signed(r(points))}" for method, points in found.items())
    signs = ", ".join(
        f"{method} {int((points['signed_delta_magnitude'] < 0).sum())} of {len(points)}"
        for method, points in found.items()
    )
    caption = (
        f"ΔM against ΔD of the {motion.role} matrices as training goes on, {source}; one point a "
        "weight, the line behind it is its path so far, the number its layer, where there is room; "
        "each panel has scales of its own. Every path starts at the origin, so that all of them "
        "rise at first: what tells the methods apart is how the points lie to each other at one "
        f"time. At the end r across the weights is {ends}, and the magnitudes that shrank are "
        f"{signs}."
    )
    alt = (
        "Three panels, FT, LoRA and DoRA, in which points move away from the origin as the step "
        f"counts up to {motion.step(1.0).removeprefix('step ')}, each drawing its path behind it. "
        f"At the end r across the weights is {ends}."
    )
    title = "FT, LoRA and DoRA as training goes on"
    return Picture("animation", title, caption, alt, lambda style: frame(motion, style, 1.0))


def frame(motion: Motion, style: StyleName, share: float) -> StyledFigure:
    """One frame: the points at a share of the training, with their paths so far."""
    figure, _ = look.figure(style, slide=5.4, column=6.6)
    with figure.drawing():
        axes = figure.subplots(*((1, 3) if style == "slide" else (3, 1)), squeeze=False).ravel()
        for one, method in zip(axes, METHODS, strict=True):
            _points(one, motion, method, share)
            one.set_title(f"{method}, {motion.role}")
            if style == "slide" or method == METHODS[-1]:
                one.set_xlabel(r"$\Delta D$")
            if style == "column" or method == METHODS[0]:
                one.set_ylabel(r"$\Delta M$")
        figure.suptitle(f"{motion.step(share)} ({100 * share:.0f}% of training)")
    return figure


def _points(axes: Axes, motion: Motion, method: str, share: float) -> None:
    whole = motion.rows[motion.rows["method"] == method]
    past = whole[whole["share"] <= share + 1e-6]
    now = motion.at(method, share)
    for _, path in past.groupby(["run", "site"], sort=False):
        path = path.sort_values("step")
        axes.plot(
            [0, *path["delta_direction"]],
            [0, *path["delta_magnitude"]],
            color=METHOD_COLOURS[method],
            alpha=0.35,
            linewidth=0.6 * look.weight(axes),
        )
    small = 0.72 * float(axes.title.get_fontsize())
    axes.scatter(
        now["delta_direction"],
        now["delta_magnitude"],
        marker=METHOD_MARKERS[method],
        color=METHOD_COLOURS[method],
        s=(1.15 * small) ** 2,
        edgecolors="white",
        linewidths=0.4,
        zorder=3,
    )
    x, y = whole["delta_direction"].max(), whole["delta_magnitude"].max()
    if now["run"].nunique() == 1:
        _numbers(axes, now, (x, y), small)
    axes.set_xlim(-0.05 * x, 1.1 * x)
    axes.set_ylim(-0.05 * y, 1.3 * y)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(scilimits=(-2, 4))
    value = r(now) if len(now) > 2 else float("nan")
    text = f"r = {signed(value)}" if np.isfinite(value) else "r not defined"
    look.words(axes, text)
    axes.text(0.97, 0.03, f"n = {len(now)}", transform=axes.transAxes, ha="right", color=QUIET)


def _numbers(axes: Axes, now: pd.DataFrame, spans: tuple[float, float], size: float) -> None:
    """The layer inside each point that no other point covers."""
    places = now[["delta_direction", "delta_magnitude"]].to_numpy(dtype=np.float64)
    apart = np.linalg.norm((places[:, None] - places) / np.asarray(spans), axis=-1)
    free = (apart < _TOO_NEAR).sum(axis=1) == 1
    layers = now["layer"].to_numpy(dtype=np.float64, na_value=np.nan)
    for (x, y), layer, alone in zip(places, layers, free, strict=True):
        if alone and np.isfinite(layer):
            look.label(
                axes, (x, y), f"{layer:.0f}", "white", fontsize=size, va="center_baseline", zorder=4
            )


def write(motion: Motion, stem: Path) -> list[Path]:
    """Writes the animation as GIF, and as MP4 or else WebM where ffmpeg is found.

    Returns:
        The written files; the GIF first.
    """
    images = [_image(frame(motion, "slide", share)) for share in motion.shares]
    times = [round(1000 * SECONDS)] * len(images)
    times[-1] += 2000
    # One palette for all frames: colours do not flicker, and unchanged pixels cost nothing.
    sheet = Image.new("RGB", (images[0].width, 2 * images[0].height))
    sheet.paste(images[0], (0, 0))
    sheet.paste(images[-1], (0, images[0].height))
    palette = sheet.quantize(64, dither=Image.Dither.NONE)
    colours = np.asarray(palette.getpalette()).reshape(-1, 3)
    colours[(colours >= 248).all(axis=1)] = 255
    palette.putpalette(colours.ravel().tolist())
    drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    stem.parent.mkdir(parents=True, exist_ok=True)
    gif = stem.with_suffix(".gif")
    drawn[0].save(
        gif, save_all=True, append_images=drawn[1:], duration=times, loop=0, optimize=True
    )
    return [gif, *_film(images, times, stem)]


def _image(figure: StyledFigure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PIXELS / figure.get_figwidth())
    image = Image.open(file).convert("RGB")
    even = (image.width // 2 * 2, image.height // 2 * 2)  # as H.264 needs it
    return image.crop((0, 0, *even))


def _film(images: Sequence[Image.Image], times: Sequence[int], stem: Path) -> list[Path]:
    program = shutil.which("ffmpeg")
    if program is None:
        return []
    beat = 100
    raw = b"".join(
        image.tobytes() * round(time / beat) for image, time in zip(images, times, strict=True)
    )
    size = f"{images[0].width}x{images[0].height}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(1000 // beat), "-i", "-"]
    for ending, encoder in _ENCODERS.items():
        file = stem.with_suffix(f".{ending}")
        done = subprocess.run(
            [program, "-y", "-v", "error", *source, *encoder, "-pix_fmt", "yuv420p", str(file)],
            input=raw,
            check=False,
            capture_output=True,
        )
        if done.returncode == 0:
            return [file]
        file.unlink(missing_ok=True)
    return []
