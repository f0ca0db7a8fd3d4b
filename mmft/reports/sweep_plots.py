"""The plots of a leaderboard, as SVG inside the page: metric against rank, losses, cost with its Pareto front, heat map, parallel axes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..common.files import read_jsonl
from . import numbers
from .loss_curve import EVAL, INK, TRAIN, smooth, style_panel
from .numbers import is_number
from .ranking import Leaderboard, RankedRun
from .run_files import series

SOFT = "#8b939c"
MAX_CURVES = 24  # more losses than this cannot be told apart


class Plot(TypedDict):
    """uri: the SVG as a `data:` address."""

    title: str
    note: str
    uri: str


@dataclass
class Point:
    """A run, or the runs of one setting over seeds. values: of the swept keys. sd, scores: of the runs of a setting."""

    values: list[str]
    score: float
    sd: float | None
    scores: list[float]
    trainable: float | None
    seconds: float | None
    run: str


def draw(board: Leaderboard) -> list[Plot]:
    """The plots that these runs have enough values for."""
    rows = [r for r in board.finished if is_number(r.score)]
    if len(rows) < 2:
        return []
    if board.groups:
        points = [Point(g.values, g.mean, g.sd, g.scores, g.trainable, g.seconds, g.rows[0].run) for g in board.groups if g.mean is not None]
    else:
        points = [Point(r.values, r.score, None, [r.score], r.trainable, r.seconds, r.run) for r in rows if r.score is not None]
    keys = board.setting_keys if board.groups else board.keys
    varied = [k for i, k in enumerate(keys) if len({p.values[i] for p in points}) > 1]
    numeric = [k for k in varied if all(_number(p.values[keys.index(k)]) is not None for p in points)]
    plots: list[Plot | None] = []
    if numeric:
        plots.append(_against(board, points, keys, "lora.r" if "lora.r" in numeric else numeric[0]))
    plots += [_losses(board, rows), _cost(board, points, keys)]
    if len(varied) == 2:
        plots.append(_heat(board, points, keys, varied))
    elif len(varied) > 2:
        plots.append(_parallel(board, points, keys, varied))
    return [plot for plot in plots if plot]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _figure(width: float = 7.2, height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        style_panel(panel, 9)
    return figure, panels if columns > 1 else panels[0]


def _svg(figure: Any, title: str, note: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return {"title": title, "note": note, "uri": "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")}


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.08 + 0.78 * i / max(n - 1, 1)) for i in range(n)]


def _ordered(values: Iterable[str]) -> list[str]:
    return sorted(set(values), key=lambda v: (_number(v) is None, _number(v) or 0.0, str(v)))


def _logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 6


def _value_ticks(panel: Any, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each value where the values span more than a factor of six."""
    values = sorted(set(values))
    getattr(panel, f"set_{axis}scale")("log" if _logarithmic(values) else "linear")
    if len(values) <= 10:
        getattr(panel, f"set_{axis}ticks")(values, [f"{v:g}" for v in values])
        getattr(panel, f"set_{axis}ticks")([], minor=True)


def _spaced_labels(values: Sequence[float], share: float) -> list[float]:
    """The values whose labels do not overlap: at least `share` of the axis of `_value_ticks` apart, the smallest and the largest among them."""
    values = sorted(set(values))
    scale = math.log if _logarithmic(values) else float
    gap = share * (scale(values[-1]) - scale(values[0]))
    kept = values[:1]
    for value in values[1:-1]:
        if scale(value) - scale(kept[-1]) >= gap and scale(values[-1]) - scale(value) >= gap:
            kept.append(value)
    return kept + values[1:][-1:]


def _against(board: Leaderboard, points: Sequence[Point], keys: Sequence[str], main: str) -> Plot:
    place = keys.index(main)
    figure, panel = _figure()
    lines_by_setting: dict[tuple[str, ...], list[Point]] = {}
    for p in points:
        lines_by_setting.setdefault(tuple(v for i, v in enumerate(p.values) if i != place), []).append(p)
    rest = [k.rpartition(".")[2] for k in keys if k != main]
    lines = sorted(lines_by_setting.items(), key=lambda o: [(_number(v) is None, _number(v) or 0.0, v) for v in o[0]])
    colours = [TRAIN] if len(lines) == 1 else _colours(len(lines))
    for colour, (values, line) in zip(colours, lines, strict=True):
        line = sorted(line, key=lambda p: _number(p.values[place]) or 0.0)
        x, y = [_number(p.values[place]) or 0.0 for p in line], [p.score for p in line]
        label = ", ".join(f"{k} {v}" for k, v in zip(rest, values, strict=True)) if len(lines) <= 8 else None
        error = [p.sd or 0 for p in line]
        panel.errorbar(x, y, yerr=error if any(error) else None, color=colour, linewidth=1.8, marker="o", markersize=6, capsize=3, label=label or None)
        if any(error):
            panel.scatter([a for a, p in zip(x, line, strict=True) for _ in p.scores], [s for p in line for s in p.scores], s=12, color=colour, alpha=0.45, zorder=3)
    _value_ticks(panel, "x", [_number(p.values[place]) or 0.0 for p in points])
    panel.set_xlabel(main, color=INK)
    panel.set_ylabel(board.label, color=INK)
    if len(lines) > 1 and len(lines) <= 8:
        panel.legend(frameon=False, fontsize=9, labelcolor=INK)
    seeds = "Bars: one standard deviation over seeds; small dots: the runs." if board.groups else ""
    return _svg(figure, f"{board.label} against {main}", seeds)


def _losses(board: Leaderboard, rows: Sequence[RankedRun]) -> Plot | None:
    figure, panel = _figure(height=4.6)
    rows = [g.rows[0] for g in board.groups if g.n] if board.groups else rows
    first = [i for i, k in enumerate(board.keys) if k != "seed"]
    rows = sorted(rows[:MAX_CURVES], key=lambda r: [(_number(r.values[i]) is None, _number(r.values[i]) or 0.0, r.values[i]) for i in first])
    drawn = 0
    lows: list[float] = []
    for colour, row in zip(_colours(len(rows)), rows, strict=True):
        steps, losses = series(read_jsonl(row.path / "metrics.jsonl"), "loss")
        if not steps:
            continue
        label = ", ".join(f"{board.keys[i].rpartition('.')[2]} {row.values[i]}" for i in first) or row.run
        panel.plot(steps, smooth(losses, max(len(losses) // 30, 0)), color=colour, linewidth=1.6, label=label, marker="o" if len(steps) == 1 else "")
        lows += losses
        drawn += 1
    if not drawn:
        return None
    if min(lows) > 0 and max(lows) / min(lows) > 20:
        panel.set_yscale("log")
    panel.set_xlabel("step", color=INK)
    panel.set_ylabel("training loss", color=INK)
    panel.margins(x=0.02)
    if drawn <= 12:
        panel.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2 if drawn > 6 else 1)
    note = "The best seed of each setting. " if board.groups else ""
    return _svg(figure, "Losses over each other", note + "Dark to light: from the first value to the last.")


def _cost(board: Leaderboard, points: Sequence[Point], keys: Sequence[str]) -> Plot | None:
    figure, panels = _figure(10.4, 4.0, 2)
    columns = ("trained parameters", [(p.trainable, p) for p in points]), ("seconds", [(p.seconds, p) for p in points])
    empty = True
    for panel, (label, column) in zip(panels, columns, strict=True):
        costs = [(cost, p) for cost, p in column if is_number(cost) and cost > 0]
        if not costs:
            continue
        empty = False
        panel.scatter([cost for cost, _ in costs], [p.score for _, p in costs], s=34, color=TRAIN, zorder=3)
        front: list[tuple[float, Point]] = []
        for cost, p in sorted(costs, key=lambda c: (c[0], board.sign * c[1].score)):
            if not front or board.sign * p.score < board.sign * front[-1][1].score:
                front.append((cost, p))
        panel.plot([cost for cost, _ in front], [p.score for _, p in front], color=EVAL, linewidth=1.4, drawstyle="steps-post", linestyle="--", zorder=2)
        for cost, p in front[:8]:
            name = ", ".join(v for k, v in zip(keys, p.values, strict=True) if v) or p.run
            panel.annotate(name[:24], (cost, p.score), xytext=(5, 5), textcoords="offset points", fontsize=8.5, color=INK)
        ticks = sorted({cost for cost, _ in costs})
        if label == "trained parameters" and len(ticks) <= 8:
            _value_ticks(panel, "x", ticks)
            labelled = _spaced_labels(ticks, 0.16)
            panel.set_xticks(ticks, [numbers.count(v) if v in labelled else "" for v in ticks])
        panel.set_xlabel(label, color=INK)
        panel.set_ylabel(board.label, color=INK)
        panel.margins(0.12)
    if empty:
        return None
    return _svg(figure, f"{board.label} against its cost", "Dashed: the Pareto front; nothing beside it is both cheaper and better. Its points carry their swept values.")


def _heat(board: Leaderboard, points: Sequence[Point], keys: Sequence[str], varied: Sequence[str]) -> Plot:
    x, y = (keys.index(k) for k in varied)
    columns, lines = (_ordered(p.values[i] for p in points) for i in (x, y))
    cells: list[list[float]] = [[math.nan] * len(columns) for _ in lines]
    for p in points:
        cells[lines.index(p.values[y])][columns.index(p.values[x])] = p.score
    figure, panel = _figure(height=max(2.6, 1.1 + 0.62 * len(lines)))
    panel.grid(False)
    panel.imshow(cells, cmap="viridis" if board.sign < 0 else "viridis_r", aspect="auto")
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(lines)), lines)
    panel.set_xlabel(varied[0], color=INK)
    panel.set_ylabel(varied[1], color=INK)
    low, high = min(p.score for p in points), max(p.score for p in points)
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            if not math.isnan(value):
                share = (value - low) / ((high - low) or 1)
                light = share if board.sign < 0 else 1 - share
                panel.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=9.5, color="black" if light > 0.55 else "white")
    return _svg(figure, f"{board.label} over {varied[0]} and {varied[1]}", "Lighter is better." + (" Means over seeds." if board.groups else ""))


def _parallel(board: Leaderboard, points: Sequence[Point], keys: Sequence[str], varied: Sequence[str]) -> Plot:
    from matplotlib import colormaps

    figure, panel = _figure(10.4, 4.4)
    panel.grid(False)
    axes = [(k, _ordered(p.values[keys.index(k)] for p in points)) for k in varied]
    low, high = min(p.score for p in points), max(p.score for p in points)
    span = (high - low) or 1
    for p in sorted(points, key=lambda p: -board.sign * p.score):
        good = (high - p.score) / span if board.sign > 0 else (p.score - low) / span
        y = [order.index(p.values[keys.index(k)]) / max(len(order) - 1, 1) for k, order in axes] + [(p.score - low) / span]
        panel.plot(range(len(y)), y, color=colormaps["viridis_r"](0.1 + 0.85 * good), linewidth=1 + 1.8 * good, alpha=0.85)
    for i, (_, order) in enumerate(axes):
        for j, value in enumerate(order):
            panel.text(i - 0.03, j / max(len(order) - 1, 1), value, ha="right", va="center", fontsize=8.5, color=INK)
    for height, score in ((0, low), (1, high)):
        panel.text(len(axes) + 0.03, height, f"{score:.3f}", ha="left", va="center", fontsize=8.5, color=INK)
    for i in range(len(axes) + 1):
        panel.axvline(i, color=SOFT, linewidth=0.8, zorder=0)
    panel.set_xticks(range(len(axes) + 1), [*varied, board.label])
    panel.set_yticks([])
    panel.set_xlim(-0.5, len(axes) + 0.4)
    return _svg(figure, "Every point over all swept values", "One line a point; the darker and thicker, the better.")
