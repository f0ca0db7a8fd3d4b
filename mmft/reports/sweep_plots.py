"""The plots of a leaderboard, as SVG inside the page: metric against rank, losses, cost with its Pareto front, heat map, parallel axes."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

from ..common.files import read_jsonl
from . import numbers
from .curve import EVAL, GRID, INK, TRAIN, smooth
from .files import is_number, series

SOFT = "#8b939c"
CURVES = 24  # more losses than this cannot be told apart


def draw(board: dict[str, Any]) -> list[dict[str, str]]:
    """[{"title", "note", "uri"}] of the plots that these runs have something to show in."""
    rows = [r for r in board["rows"] if r["status"] == "finished" and is_number(r["score"])]
    if len(rows) < 2:
        return []
    points = board["groups"] or rows
    points = [{"values": p["values"], "score": p.get("mean", p.get("score")), "error": p.get("sd"), "all": p["scores"] if "scores" in p else [p["score"]],
               "trainable": p["trainable"], "seconds": p["seconds"], "run": p.get("rows", [p])[0].get("run", "")} for p in points]  # fmt: skip
    points = [p for p in points if is_number(p["score"])]
    keys = [k for k in board["keys"] if k != "seed" or not board["groups"]]
    numeric = [k for i, k in enumerate(keys) if len({p["values"][i] for p in points}) > 1 and all(_number(p["values"][i]) is not None for p in points)]
    made: list[dict[str, str] | None] = []
    if numeric:
        main = "lora.r" if "lora.r" in numeric else numeric[0]
        made.append(_against(board, points, keys, main))
    made += [_losses(board, rows), _cost(board, points, keys)]
    varied = [k for i, k in enumerate(keys) if len({p["values"][i] for p in points}) > 1]
    if len(varied) == 2:
        made.append(_heat(board, points, keys, varied))
    elif len(varied) > 2:
        made.append(_parallel(board, points, keys, varied))
    return [m for m in made if m]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _figure(width: float = 7.2, height: float = 4.2, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        panel.grid(True, color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9, length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(GRID)
    return figure, panels if columns > 1 else panels[0]


def _done(figure: Any, title: str, note: str) -> dict[str, str]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return {"title": title, "note": note, "uri": "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")}


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.08 + 0.78 * i / max(n - 1, 1)) for i in range(n)]


def _ordered(values: Any) -> list[str]:
    return sorted(set(values), key=lambda v: (_number(v) is None, _number(v) or 0.0, str(v)))


def _logarithmic(values: list[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 6


def _steps(panel: Any, axis: str, values: list[float]) -> None:
    """A logarithmic axis with a tick at each value where the values span more than a factor of six."""
    values = sorted(set(values))
    getattr(panel, f"set_{axis}scale")("log" if _logarithmic(values) else "linear")
    if len(values) <= 10:
        getattr(panel, f"set_{axis}ticks")(values, [f"{v:g}" for v in values])
        getattr(panel, f"set_{axis}ticks")([], minor=True)


def _apart(values: list[float], share: float) -> list[float]:
    """Those whose labels do not run into each other: `share` of the axis of `_steps` apart, the smallest and the largest among them."""
    values = sorted(set(values))
    scale = math.log if _logarithmic(values) else float
    gap = share * (scale(values[-1]) - scale(values[0]))
    kept = values[:1]
    for value in values[1:-1]:
        if scale(value) - scale(kept[-1]) >= gap and scale(values[-1]) - scale(value) >= gap:
            kept.append(value)
    return kept + values[1:][-1:]


def _against(board: dict[str, Any], points: list[dict[str, Any]], keys: list[str], main: str) -> dict[str, str]:
    place = keys.index(main)
    figure, panel = _figure()
    others: dict[tuple, list[dict[str, Any]]] = {}
    for p in points:
        others.setdefault(tuple(v for i, v in enumerate(p["values"]) if i != place), []).append(p)
    rest = [k.rpartition(".")[2] for k in keys if k != main]
    lines = sorted(others.items(), key=lambda o: [(_number(v) is None, _number(v) or 0.0, v) for v in o[0]])
    colours = [TRAIN] if len(lines) == 1 else _colours(len(lines))
    for colour, (values, own) in zip(colours, lines, strict=True):
        own = sorted(own, key=lambda p: _number(p["values"][place]) or 0.0)
        x, y = [_number(p["values"][place]) or 0.0 for p in own], [p["score"] for p in own]
        label = ", ".join(f"{k} {v}" for k, v in zip(rest, values, strict=True)) if len(lines) <= 8 else None
        error = [p["error"] or 0 for p in own]
        panel.errorbar(x, y, yerr=error if any(error) else None, color=colour, linewidth=1.8, marker="o", markersize=6, capsize=3, label=label or None)
        if any(error):
            panel.scatter([a for a, p in zip(x, own, strict=True) for _ in p["all"]], [s for p in own for s in p["all"]], s=12, color=colour, alpha=0.45, zorder=3)
    _steps(panel, "x", [_number(p["values"][place]) or 0.0 for p in points])
    panel.set_xlabel(main, color=INK)
    panel.set_ylabel(board["label"], color=INK)
    if len(lines) > 1 and len(lines) <= 8:
        panel.legend(frameon=False, fontsize=9, labelcolor=INK)
    seeds = "Bars: one standard deviation over seeds; small dots: the runs." if board["groups"] else ""
    return _done(figure, f"{board['label']} against {main}", seeds)


def _losses(board: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str] | None:
    figure, panel = _figure(height=4.6)
    rows = [g["rows"][0] for g in board["groups"] if g["n"]] if board["groups"] else rows
    first = [i for i, k in enumerate(board["keys"]) if k != "seed"]
    rows = sorted(rows[:CURVES], key=lambda r: [(_number(r["values"][i]) is None, _number(r["values"][i]) or 0.0, r["values"][i]) for i in first])
    drawn, lows = 0, []
    for colour, row in zip(_colours(len(rows)), rows, strict=True):
        steps, losses = series(read_jsonl(row["path"] / "metrics.jsonl"), "loss")
        if not steps:
            continue
        label = ", ".join(f"{board['keys'][i].rpartition('.')[2]} {row['values'][i]}" for i in first) or row["run"]
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
    note = "The best seed of each setting. " if board["groups"] else ""
    return _done(figure, "Losses over each other", note + "Dark to light: from the first value to the last.")


def _cost(board: dict[str, Any], points: list[dict[str, Any]], keys: list[str]) -> dict[str, str] | None:
    figure, panels = _figure(10.4, 4.0, 2)
    seen = False
    for panel, key, label in zip(panels, ("trainable", "seconds"), ("trained parameters", "seconds"), strict=True):
        own = [p for p in points if is_number(p[key]) and p[key] > 0]
        if not own:
            continue
        seen = True
        panel.scatter([p[key] for p in own], [p["score"] for p in own], s=34, color=TRAIN, zorder=3)
        edge, best = [], None
        for p in sorted(own, key=lambda p: (p[key], board["sign"] * p["score"])):
            if best is None or board["sign"] * p["score"] < best:
                best = board["sign"] * p["score"]
                edge.append(p)
        panel.plot([p[key] for p in edge], [p["score"] for p in edge], color=EVAL, linewidth=1.4, drawstyle="steps-post", linestyle="--", zorder=2)
        for p in edge[:8]:
            name = ", ".join(v for k, v in zip(keys, p["values"], strict=True) if v) or p["run"]
            panel.annotate(name[:24], (p[key], p["score"]), xytext=(5, 5), textcoords="offset points", fontsize=8.5, color=INK)
        values = sorted({p[key] for p in own})
        if key == "trainable" and len(values) <= 8:
            _steps(panel, "x", values)
            said = _apart(values, 0.16)
            panel.set_xticks(values, [numbers.count(v) if v in said else "" for v in values])
        panel.set_xlabel(label, color=INK)
        panel.set_ylabel(board["label"], color=INK)
        panel.margins(0.12)
    if not seen:
        return None
    return _done(figure, f"{board['label']} against its cost", "Dashed: the Pareto front; nothing beside it is both cheaper and better. Its points carry their swept values.")


def _heat(board: dict[str, Any], points: list[dict[str, Any]], keys: list[str], varied: list[str]) -> dict[str, str]:
    x, y = (keys.index(k) for k in varied)
    columns, lines = (_ordered(p["values"][i] for p in points) for i in (x, y))
    cells: list[list[float]] = [[math.nan] * len(columns) for _ in lines]
    for p in points:
        cells[lines.index(p["values"][y])][columns.index(p["values"][x])] = p["score"]
    figure, panel = _figure(height=max(2.6, 1.1 + 0.62 * len(lines)))
    panel.grid(False)
    panel.imshow(cells, cmap="viridis" if board["sign"] < 0 else "viridis_r", aspect="auto")
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(lines)), lines)
    panel.set_xlabel(varied[0], color=INK)
    panel.set_ylabel(varied[1], color=INK)
    low, high = min(p["score"] for p in points), max(p["score"] for p in points)
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            if not math.isnan(value):
                share = (value - low) / ((high - low) or 1)
                light = share if board["sign"] < 0 else 1 - share
                panel.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=9.5, color="black" if light > 0.55 else "white")
    return _done(figure, f"{board['label']} over {varied[0]} and {varied[1]}", "Lighter is better." + (" Means over seeds." if board["groups"] else ""))


def _parallel(board: dict[str, Any], points: list[dict[str, Any]], keys: list[str], varied: list[str]) -> dict[str, str]:
    from matplotlib import colormaps

    figure, panel = _figure(10.4, 4.4)
    panel.grid(False)
    axes = [(k, _ordered(p["values"][keys.index(k)] for p in points)) for k in varied]
    low, high = min(p["score"] for p in points), max(p["score"] for p in points)
    span = (high - low) or 1
    for p in sorted(points, key=lambda p: -board["sign"] * p["score"]):
        good = (high - p["score"]) / span if board["sign"] > 0 else (p["score"] - low) / span
        y = [order.index(p["values"][keys.index(k)]) / max(len(order) - 1, 1) for k, order in axes] + [(p["score"] - low) / span]
        panel.plot(range(len(y)), y, color=colormaps["viridis_r"](0.1 + 0.85 * good), linewidth=1 + 1.8 * good, alpha=0.85)
    for i, (_, order) in enumerate(axes):
        for j, value in enumerate(order):
            panel.text(i - 0.03, j / max(len(order) - 1, 1), value, ha="right", va="center", fontsize=8.5, color=INK)
    for height, value in ((0, low), (1, high)):
        panel.text(len(axes) + 0.03, height, f"{value:.3f}", ha="left", va="center", fontsize=8.5, color=INK)
    for i in range(len(axes) + 1):
        panel.axvline(i, color=SOFT, linewidth=0.8, zorder=0)
    panel.set_xticks(range(len(axes) + 1), [*varied, board["label"]])
    panel.set_yticks([])
    panel.set_xlim(-0.5, len(axes) + 0.4)
    return _done(figure, "Every point over all swept values", "One line a point; the darker and thicker, the better.")
