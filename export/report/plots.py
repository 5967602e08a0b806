"""Plots as inline SVG: text stays text, colours are the page's (light, dark, print), every plot says in words what it
shows. The same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#010101", "#010102"
SERIES = tuple(f"#0102{place:02x}" for place in range(6))
"""Stand-ins while drawing; in the page they become the variables of `style`, which change with light and dark."""
VARIABLES = {INK: "--ink", LINE: "--line", **{colour: f"--c{place}" for place, colour in enumerate(SERIES)}}

WIDTH = 9.0
"""Inches of 72 px, the width that text of 10 px is drawn for; a narrower page scrolls the plot."""
KINDS = {
    "recurrent": "recurrent state (linear attention)",
    "conv": "last inputs of the convolution",
    "key": "keys (full attention)",
    "value": "values (full attention)",
}
POINTS = 96
"""Of a curve at most: more of them, of several bundles, cover each other."""
NAME = 28
"""Characters of a name in one line beside a bar."""
FLOOR = 1e-9
"""Zero, on a logarithmic axis."""


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its heading, what it shows in one or two sentences, the <svg> element."""

    title: str
    caption: str
    svg: str


def states(title: str, meaning: str, errors: Mapping[str, Mapping[str, float | str]]) -> Plot:
    """For each label, a rung or a bundle, the relative error of every state over the layer it belongs to.

    Args:
        errors: label -> state name (`kind_layer`, as in `export.validate.replay.canonical`) -> error. Where a label
            lacks a state, as L1 of few layers does, its curve has none there.
    """
    kinds = [kind for kind in KINDS if any(name.startswith(f"{kind}_") for each in errors.values() for name in each)]

    def paint(drawing: Figure) -> None:
        rows = math.ceil(len(kinds) / 2)
        grid = drawing.subplots(rows, min(2, len(kinds)), squeeze=False, sharex=True, sharey=True).flat
        for panel, kind in zip(grid, kinds, strict=False):
            panel.set_title(KINDS[kind], fontsize=10)
            for label, series, colour in _coloured(errors):
                places = _of_kind(series, kind)
                panel.plot(list(places), list(places.values()), "o-", ms=3, lw=1, label=label, color=colour)
            panel.grid(alpha=0.7)
            panel.set_xlabel("layer")
        for empty in list(grid)[len(kinds) :]:
            empty.set_axis_off()
        _whole_numbers(drawing.axes[0])
        _logarithmic(drawing.axes[0], [v for each in errors.values() for v in each.values()])
        _legend(drawing, errors)

    caption = [meaning]
    for label, series in errors.items():
        worst = max(series, key=lambda name: _finite(series[name], math.inf))
        kind, _, layer = worst.rpartition("_")
        value = float(series[worst])
        caption.append(f"{label}: the worst is {value:.2g}, in layer {layer} ({KINDS.get(kind, kind)}).")
    return _plot(title, " ".join(caption), paint, height=0.6 + 2.1 * math.ceil(len(kinds) / 2))


def _of_kind(series: Mapping[str, float | str], kind: str) -> dict[int, float]:
    """Layer -> error, in the order of the layers."""
    found = {int(n.rpartition("_")[2]): positive(v) for n, v in series.items() if n.rpartition("_")[0] == kind}
    return dict(sorted(found.items()))


def lines(
    title: str, meaning: str, axis: str, series: Mapping[str, tuple[Sequence[int], Sequence[float | str]]]
) -> Plot:
    """For each label a curve (x, y) over `axis`, of means over windows where there are many points; the caption gives
    each one's median and largest value.
    """
    window = math.ceil(max(len(x) for x, _ in series.values()) / POINTS)

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        for label, (x, y), colour in _coloured(series):
            axes.plot(*_means(x, y, window), lw=1.2, label=label, color=colour)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.7)
        _whole_numbers(axes)
        _logarithmic(axes, [v for x, y in series.values() for v in _means(x, y, window)[1]])
        _legend(drawing, series)

    caption = [meaning, *([f"The curve shows means of {window}."] if window > 1 else [])]
    for label, (x, y) in series.items():
        values = [_finite(v, math.inf) for v in y]
        worst = max(range(len(values)), key=values.__getitem__)
        name = f"{label}: m" if len(series) > 1 else "M"
        caption.append(
            f"{name}edian {statistics.median(values):.2g}, largest {values[worst]:.2g} at {axis} {x[worst]:,}."
        )
    return _plot(title, " ".join(caption), paint, height=3)


def _means(x: Sequence[int], y: Sequence[float | str], window: int) -> tuple[list[float], list[float]]:
    """Of every `window` points in a row; where one of them is not finite there is a gap."""
    places = range(0, len(x), window)
    means = [statistics.fmean(positive(v) for v in y[i : i + window]) for i in places]
    return [statistics.fmean(x[i : i + window]) for i in places], means


def bars(title: str, meaning: str, names: Sequence[str], panels: Mapping[str, Sequence[float]]) -> Plot:
    """A bar for each name in every panel (label -> values), the first name on top; the value stands beside it, or a
    dash where it is NaN: not measured.
    """

    def paint(drawing: Figure) -> None:
        grid = drawing.subplots(1, len(panels), squeeze=False, sharey=True).flat
        for panel, (label, values) in zip(grid, panels.items(), strict=True):
            colours = [SERIES[place % len(SERIES)] for place in range(len(names))]
            widths = [0 if math.isnan(value) else value for value in values]
            drawn = panel.barh(range(len(names)), widths, color=colours, height=0.6)
            panel.bar_label(drawn, [amount(value) for value in values], padding=3)
            panel.set_yticks(range(len(names)), [textwrap.fill(name, NAME) for name in names])
            panel.set_xlabel(label)
            panel.set_xticks([0])
            panel.margins(x=0.3)
            panel.spines[["top", "right", "bottom"]].set_visible(False)
        drawing.axes[0].invert_yaxis()

    said = [
        f"{label}: " + ", ".join(f"{name} {amount(value)}" for name, value in zip(names, values, strict=True))
        for label, values in panels.items()
    ]
    return _plot(title, f"{meaning} {'; '.join(said)}.", paint, height=0.7 + 0.4 * len(names))


def amount(value: float) -> str:
    """A positive number in about three digits; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def positive(value: float | str) -> float:
    """A number for a logarithmic axis; a gap where the report holds "inf" or "nan"."""
    return max(_finite(value, math.nan), FLOOR)


def _finite(value: float | str, otherwise: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else otherwise


def _coloured(series: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for place, (label, values) in enumerate(series.items()):
        yield label, values, SERIES[place % len(SERIES)]


def _legend(drawing: Figure, labels: Mapping[str, Any]) -> None:
    """Above the panels, where it covers no data; none for a single curve. Long names stand below each other."""
    if len(labels) > 1:
        columns = max(1, min(len(labels), 110 // (8 + max(map(len, labels)))))
        handles = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(*handles, loc="outside upper center", ncols=columns)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _logarithmic(axes: Axes, values: Sequence[float | str]) -> None:
    """Whole decades around the values, so that at least two of them are labelled, and not more than fit."""
    from matplotlib.ticker import LogLocator, NullLocator

    known = [x for x in map(positive, values) if not math.isnan(x)] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _plot(title: str, caption: str, paint: Callable[[Figure], None], height: float) -> Plot:
    """Draw without pyplot, whose figures and settings are global."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text as text: read aloud, found, and of the page's colour
        "svg.hashsalt": title,  # names inside one page differ from plot to plot
        "text.parse_math": False,  # names of bundles may hold dollars
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.edgecolor": INK,
        "axes.facecolor": "none",
        "grid.color": LINE,
        "legend.frameon": False,
    }
    with rc_context(settings):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        paint(drawing)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(buffer, format="svg", metadata=nothing)
    return Plot(title, caption, _inline(buffer.getvalue(), caption))


def _inline(text: str, caption: str) -> str:
    """matplotlib's file as an element of a page: no prologue, no unused names, colours of the page, words for it."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in text else "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
