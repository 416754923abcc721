"""Figures of the report as SVG text that stands in an HTML page, and one that stands alone.

Text stays text (it takes the page's font and can be searched), and colours become CSS variables, so
that one figure serves the light and the dark page: `--rule` for lines of the grid and `--run-0`,
`--run-1`, ... for the runs, whose values `RUN_COLOURS` gives. The bytes depend on the data alone.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

RUN_COLOURS = (
    ("#0068a8", "#5cb0f0"),
    ("#c44a00", "#f58d50"),
    ("#00805c", "#38c99d"),
    ("#9c3f86", "#e08fcc"),
    ("#8a6800", "#e0b83e"),
    ("#49505a", "#c2c8d0"),
    ("#a3323f", "#ee8890"),
    ("#1b7f93", "#72d2e6"),
)
"""(on white, on black) for each run: Okabe and Ito's hues, which colour-blind readers tell apart,
set darker and lighter until each has at least 4.5:1 contrast on its page."""

# As many that a run whose colour comes again has another dash and another marker.
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (9, 2)))
_MARKERS = "osD^vPX*<>h"
_WIDTH_IN = 5.4  # a phone shows it at about full size, half a desktop page a little enlarged
_MAX_POINTS = 1000  # of a curve: more than its pixels
_INK, _RULE = "#010101", "#020202"  # replaced by the page's own colours
_LOG_FROM = 5.0  # largest over smallest loss
_LEAST_SPAN = 0.02  # of a metric's axis, as a fraction
_PER_CENT = FuncFormatter(lambda fraction, _: f"{round(100 * fraction, 6):g}")
_STYLE = {
    "axes.edgecolor": _RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in a class name is a dollar sign
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "xtick.labelsize": 8.5,
    "ytick.color": _RULE,
    "ytick.labelcolor": _INK,
    "ytick.labelsize": 8.5,
}
_ON_PAPER = {_INK: "#1c1e21", _RULE: "#c9ced4"}
_PRINTED_STYLE = {
    **{key: _ON_PAPER.get(str(value), value) for key, value in _STYLE.items()},
    "figure.facecolor": "white",
}
"""The same for pictures that stand alone, on white."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of one run.

    Args:
        run: the run's name.
        index: its number on the page, which gives colour, dashes and marker.
        x: samples seen.
        y: values; None where nothing was measured.
    """

    run: str
    index: int
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Bars:
    """The scores of one run, fractions in the order of the classes; None for an absent class."""

    run: str
    index: int
    scores: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run costs and reaches: parameters, multiply-adds, metric (a fraction)."""

    run: str
    index: int
    params: int
    macs: int
    metric: float


@dataclass(frozen=True, slots=True)
class ProbeLine:
    """What the probes of one run reach at one stage.

    Args:
        run: the run's name.
        index: its number, which gives colour, dashes and marker.
        scores: after each iteration, fractions.
        blocks: how many of the iterations are blocks; the rest are top-down updates.
    """

    run: str
    index: int
    scores: Sequence[float]
    blocks: int


_Entry = Line | Bars | Cost | ProbeLine


def colour(index: int) -> str:
    """Return the light page's colour of the run with this number."""
    return RUN_COLOURS[index % len(RUN_COLOURS)][0]


def loss_curves(lines: Sequence[Line], figure_id: str, description: str) -> str:
    """Draw each run's training loss, as it was logged (thin) and smoothed."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.9 + _legend_in(lines))
        for line in lines:
            x, y = _measured(line)
            shown = slice(None, None, max(1, len(x) // _MAX_POINTS))
            axes.plot(x[shown], y[shown], color=colour(line.index), linewidth=0.6, alpha=0.35)
            axes.plot(x[shown], smoothed(y)[shown], linewidth=1.6, **_line_style(line.index))
        axes.set(xlabel="training samples seen", ylabel="loss")
        _widen_the_end(axes, lines)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _add_legend(figure, lines)
        return _inline_svg(figure, figure_id, description)


def _widen_the_end(axes: Any, lines: Sequence[Line]) -> None:
    """Take a logarithmic axis where a linear one would press the ends of the curves together."""
    values = [value for line in lines for value in _measured(line)[1]]
    if min(values) <= 0 or max(values) < _LOG_FROM * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def metric_curves(lines: Sequence[Line], metric: str, figure_id: str, description: str) -> str:
    """Draw each run's validation metric, a fraction, at the steps where it was measured."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.9 + _legend_in(lines))
        for line in lines:
            x, y = _measured(line)
            marker = _MARKERS[line.index % len(_MARKERS)]
            size = 4 if len(x) <= 40 else 0
            axes.plot(
                x, y, marker=marker, markersize=size, linewidth=1.4, **_line_style(line.index)
            )
        axes.set(xlabel="training samples seen", ylabel=f"validation {metric} [%]")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(_PER_CENT)
        _add_legend(figure, lines)
        return _inline_svg(figure, figure_id, description)


def class_bars(
    classes: Sequence[str], bars: Sequence[Bars], metric: str, figure_id: str, description: str
) -> list[str]:
    """Draw each class's score, runs side by side, in as many figures as keep it readable.

    Args:
        classes: names in the order to draw, from top to bottom.
        bars: one for each run, as long as `classes`.
        metric: words for the axis.
        figure_id: prefix of the ids inside.
        description: what a screen reader says.
    """
    per_figure = max(12, 120 // (len(bars) + 1))
    num_figures = max(1, math.ceil(len(classes) / per_figure))
    per_figure = math.ceil(len(classes) / num_figures)  # equally long columns
    figures = []
    for number in range(num_figures):
        part = slice(number * per_figure, (number + 1) * per_figure)
        with mpl.rc_context(_STYLE):
            figure = _draw_bars(classes[part], bars, part, metric)
            figures.append(_inline_svg(figure, f"{figure_id}-{number}", description))
    return figures


def cost_scatter(points: Sequence[Cost], metric: str, figure_id: str, description: str) -> str:
    """Draw the metric over parameters (left) and over multiply-adds (right)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 2.6 + _legend_in(points)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, axis, unit, label in (
            (panels[0], "params", 1e6, "parameters [million]"),
            (panels[1], "macs", 1e9, "MACs [billion]"),
        ):
            for point in points:
                marker = _MARKERS[point.index % len(_MARKERS)]
                x = getattr(point, axis) / unit
                axes.plot([x], [point.metric], marker=marker, ls="", color=colour(point.index))
            axes.set_xlabel(label)
            axes.margins(y=0.12)
            axes.set_xlim(0, 1.12 * max(getattr(point, axis) for point in points) / unit)
        low, high = panels[0].get_ylim()
        if high - low < _LEAST_SPAN:  # a hair's breadth must not look like a gulf
            middle = (low + high) / 2
            panels[0].set_ylim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)
        panels[0].set_ylabel(f"{metric} [%]")
        panels[0].yaxis.set_major_formatter(_PER_CENT)
        _add_legend(figure, points, lines=False)
        return _inline_svg(figure, figure_id, description)


def probe_curves(stages: Mapping[int, Sequence[ProbeLine]], metric: str) -> bytes:
    """Draw a panel a stage, the metric over the iterations, as a PNG on white.

    Marks of top-down updates are hollow.

    Args:
        stages: the runs' lines at each stage.
        metric: words for the axis.
    """
    lines = next(iter(stages.values()))
    rows = math.ceil(len(stages) / 2)
    with mpl.rc_context(_PRINTED_STYLE):
        height = 2.2 * rows + 0.3 + _legend_in(lines)
        figure = Figure(figsize=(_WIDTH_IN, height), dpi=200, layout="constrained")
        panels = figure.subplots(rows, 2, sharey=True, squeeze=False).flat
        for axes, (stage, members) in zip(panels, stages.items(), strict=False):
            for line in members:
                _draw_probes(axes, line)
            axes.set_title(f"stage {stage}", loc="left", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(_PER_CENT)
            axes.margins(x=0.08, y=0.1)
        for axes in panels[len(stages) :]:
            axes.remove()
        figure.supxlabel("iteration (hollow: after a top-down update)", fontsize=9)
        figure.supylabel(f"{metric} of a probe [%]", fontsize=9)
        _add_legend(figure, lines)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_probes(axes: Any, line: ProbeLine) -> None:
    x = range(1, len(line.scores) + 1)
    style = {"marker": _MARKERS[line.index % len(_MARKERS)], "markersize": 5}
    axes.plot(x, line.scores, linewidth=1.4, **style, **_line_style(line.index))
    hollow = {"markerfacecolor": "white", "markeredgecolor": colour(line.index), "linestyle": ""}
    axes.plot(x[line.blocks :], line.scores[line.blocks :], zorder=3, **style, **hollow)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the centred mean over a twentieth of the curve; at its ends, over what is there."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    means: list[float] = ((total[last] - total[first]) / (last - first)).tolist()
    return means


def _legend_columns(entries: Sequence[_Entry]) -> int:
    return 2 if len(entries) > 1 and max(len(entry.run) for entry in entries) <= 28 else 1


def _legend_in(entries: Sequence[_Entry]) -> float:
    """Return the height of a legend in inches."""
    return 0.19 * math.ceil(len(entries) / _legend_columns(entries))


def _figure(height_in: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _draw_bars(classes: Sequence[str], bars: Sequence[Bars], part: slice, metric: str) -> Any:
    """Draw one column of grouped horizontal bars."""
    thickness = 0.8 / len(bars)
    row_in = max(0.17, 0.075 * len(bars) + 0.05)
    figure, axes = _figure(row_in * len(classes) + 0.5 + _legend_in(bars))
    rows = np.arange(len(classes))
    for number, run in enumerate(bars):
        scores = [0.0 if score is None else score for score in run.scores[part]]
        place = rows - 0.4 + (number + 0.5) * thickness
        axes.barh(place, scores, height=thickness * 0.9, color=colour(run.index))
    axes.set_yticks(rows, [_shortened(name) for name in classes])
    axes.set(ylim=(len(classes) - 0.45, -0.55), xlim=(0, 1), xlabel=f"{metric} [%]")
    axes.xaxis.set_major_formatter(_PER_CENT)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _add_legend(figure, bars, lines=False, marker="s")
    return figure


def _measured(line: Line) -> tuple[list[float], list[float]]:
    """Return the points of a line that hold a number."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    return [x for x, _ in points], [y for _, y in points]


def _line_style(index: int) -> dict[str, Any]:
    return {"color": colour(index), "linestyle": _DASHES[index % len(_DASHES)]}


def _add_legend(
    figure: Any, entries: Sequence[_Entry], lines: bool = True, marker: str = ""
) -> None:
    """Put the runs' names above the axes, in one column when they are long."""
    handles = []
    for entry in entries:
        style = {**_line_style(entry.index), **({} if lines else {"linestyle": ""})}
        shape = marker or ("" if lines else _MARKERS[entry.index % len(_MARKERS)])
        handles.append(Line2D([], [], label=_shortened(entry.run, 58), marker=shape, **style))
    columns = _legend_columns(entries)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, borderpad=0)


def _shortened(text: str, letters: int = 24) -> str:
    return text if len(text) <= letters else text[: letters - 3].rstrip() + "..."


def _inline_svg(figure: Any, figure_id: str, description: str) -> str:
    """Return the figure as an svg element whose ids are its own and whose colours are the page's.

    Args:
        figure: what to draw.
        figure_id: unique on the page.
        description: what a screen reader says.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": figure_id}), warnings.catch_warnings():
        # The browser has the letters that matplotlib's own font, used for measuring only, lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<[^>]*)", lambda tag: _page_tag(tag[1], figure_id), text)
    label = f'role="img" aria-label="{escape(description)}"'
    return text.replace("<svg", f"<svg {label}", 1).strip()


def _page_tag(tag: str, figure_id: str) -> str:
    """Rewrite one tag of matplotlib's SVG for use inside HTML."""
    tag = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r'\s(width|height)="[^"]*"', "", tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{figure_id}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    return re.sub(r"#[0-9a-f]{6}\b", _page_colour, tag)


def _page_colour(found: re.Match[str]) -> str:
    """Return the CSS colour for one of matplotlib's."""
    value = found[0]
    if value == _INK:
        return "currentColor"
    if value == _RULE:
        return "var(--rule)"
    light = [pair[0] for pair in RUN_COLOURS]
    return f"var(--run-{light.index(value)}, {value})" if value in light else value
