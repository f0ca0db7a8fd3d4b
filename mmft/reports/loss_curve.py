"""loss_curve.png: training and evaluation loss over the steps, or the reward of sampled answers; the learning rate in a thin panel below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import read_jsonl
from .run_files import series

# Okabe and Ito's colours, which are distinct for all common types of colour vision; the lines also differ in their markers.
TRAIN, EVAL, RATE = "#0072B2", "#D55E00", "#009E73"
INK, GRID = "#3c4149", "#e3e6ea"

Series = tuple[list[int], list[float]]  # (steps, values)


def write_curve(run_dir: Path) -> Path | None:
    """Draw metrics.jsonl to loss_curve.png (1440 x 840 pixels, to be shown 720-900 wide); None without any loss."""
    rows = read_jsonl(Path(run_dir) / "metrics.jsonl")
    train, evals, rate, reward = series(rows, "loss"), held_out(rows), series(rows, "learning_rate"), series(rows, "reward")
    if not train[0] and not evals[0]:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which has global state and looks for a display

    figure = Figure(figsize=(9, 5.25), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    # room for the labels of the axes, and for what stands at their ends; a layout that is fitted would draw everything twice
    figure.subplots_adjust(left=0.1, right=0.955, top=0.95, bottom=0.1, hspace=0.13)
    panels: Any = figure.subplots(2 if rate[0] else 1, 1, sharex=True, squeeze=False, height_ratios=[4, 1] if rate[0] else [1])[:, 0]
    if reward[0]:  # the loss of a policy says nothing: it is a difference from the mean of a group
        _draw(panels[0], reward, ([], []), "reward of sampled answers", low=True)
    else:
        _draw(panels[0], train, evals, "loss")
    if rate[0]:
        panels[1].plot(*rate, color=RATE, linewidth=1.6, marker="o" if len(rate[0]) == 1 else "")
        panels[1].set_ylim(bottom=0)
        panels[1].set_ylabel("learning\nrate", color=INK)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        panels[1].yaxis.get_offset_text().set_fontsize(9)
    panels[-1].set_xlabel("step", color=INK)
    for panel in panels:
        style_panel(panel, 10)
        panel.margins(x=0.02)
    figure.align_ylabels(panels)

    path = Path(run_dir) / "loss_curve.png"
    partial = path.with_name("loss_curve.partial.png")
    figure.savefig(partial)
    os.replace(partial, path)
    return path


def held_out(rows: Sequence[dict[str, Any]]) -> Series:
    """The loss on held-out rows that is the same function as the training loss: a preference objective's own, or the cross entropy."""
    own = series(rows, "eval_preference_loss")
    return own if own[0] else series(rows, "eval_loss")


def style_panel(panel: Any, label_size: int) -> None:
    """The look of every plot: a light grid behind the data, no frame but the bottom line."""
    panel.grid(True, color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=label_size, length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(GRID)


def _draw(panel: Any, train: Series, evals: Series, what: str, low: bool = False) -> None:
    """low: the legend lies below, for values that rise."""
    steps, losses = train
    if steps:
        # many noisy points: faint points, with their running mean on top
        many = len(steps) > 60
        panel.plot(steps, losses, color=TRAIN, linewidth=1 if many else 1.8, alpha=0.3 if many else 1, label=None if many else "train",
                   marker="o" if len(steps) == 1 else "")  # fmt: skip
        if many:
            panel.plot(steps, smooth(losses, len(losses) // 30), color=TRAIN, linewidth=2, label="train (running mean)")
    if evals[0]:
        panel.plot(*evals, color=EVAL, linewidth=1.8, linestyle="--", marker="D", markersize=5, label="held out")
        best = min(range(len(evals[0])), key=evals[1].__getitem__)
        panel.annotate(f"best {evals[1][best]:.3g}", (evals[0][best], evals[1][best]), xytext=(0, 9), textcoords="offset points",
                       ha="center", fontsize=10, color=EVAL)  # fmt: skip
    values = losses + evals[1]
    if not low and min(values) > 0 and max(values) / min(values) > 30:
        panel.set_yscale("log")
        panel.set_ylabel(f"{what} (log scale)", color=INK)
    else:
        panel.set_ylabel(what, color=INK)
    panel.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower right" if low else "upper right")


def smooth(values: Sequence[float], radius: int) -> list[float]:
    """Means over a centred window that shrinks at both ends, so that the line neither lags nor starts late."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    result = []
    for i in range(len(values)):
        r = min(radius, i, len(values) - 1 - i)
        result.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return result
