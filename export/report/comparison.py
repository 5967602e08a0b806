"""Bundles of one checkpoint side by side: a table for the terminal, and one self-contained HTML page with plots.

A column is a bundle with its manifest and what `validate` found; a row is one number of all of them, "–" where
a bundle has none: another target, other rungs, a checkpoint without a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.report import page
from export.report.card import gate, number, source

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One bundle: `name` tells it from the others, `report` is what `validate` returns."""

    name: str
    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """All files the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"])

    @property
    def latency(self) -> dict[str, Any] | None:
        """Speed, load time and memory, if they were measured."""
        found: dict[str, Any] | None = self.report.get("latency", {}).get("bundle")
        return found

    def check(self, rung: str, name: str) -> dict[str, Any] | None:
        checks = self.report["rungs"].get(rung, {"checks": []})["checks"]
        return next((c for c in checks if c["name"] == name), None)

    def series(self, rung: str, name: str) -> Any:
        """What a rung left for the plots; None if it left nothing."""
        return self.report["rungs"].get(rung, {"series": {}})["series"].get(name)


@dataclass(frozen=True)
class Cell:
    """One number as shown, with the verdict on it and the gate it was held to."""

    text: str
    status: str = ""
    gate: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    cells: tuple[Cell, ...]


def standing(column: Column) -> dict[str, Any]:
    """What a verdict is worth: the rungs it is of, and the status that the bundle itself bears."""
    return {"climbed": sorted(column.report["rungs"]), "status": column.manifest["status"]}


def facts(columns: Sequence[Column]) -> list[Row]:
    """What each bundle is, the verdict on it, and its size."""
    return [
        _row("target", columns, lambda c: c.manifest["target"]["name"]),
        _row("recipe", columns, lambda c: c.manifest["quantization"]["recipe"]),
        Row("verdict", tuple(_verdict(c.report["passed"]) for c in columns)),
        _row("of the rungs", columns, lambda c: ", ".join(standing(c)["climbed"])),
        _row("status of the bundle", columns, lambda c: standing(c)["status"]),
        _row("context", columns, lambda c: f"{c.manifest['context_length']:,}"),
        _row("prefill lengths", columns, lambda c: ", ".join(map(str, c.manifest["prefill_lengths"]))),
        _row("pictures", columns, lambda c: ", ".join(f"{h}×{w}" for h, w in c.manifest["image_sizes"]) or NONE),
        _row("bytes on disk", columns, lambda c: f"{c.size_bytes:,}"),
    ]


def checks(columns: Sequence[Column]) -> dict[str, list[Row]]:
    """For every rung that any bundle climbed, its checks in the order of the ladder; where a bundle was run, first
    where its numbers come from: host or emulated.
    """
    found: dict[str, list[Row]] = {}
    for rung in sorted({name for c in columns for name in c.report["rungs"]}):
        # The union, in order: a bundle without pictures has no L1.vision, another has.
        names = dict.fromkeys(
            check["name"] for c in columns for check in c.report["rungs"].get(rung, {"checks": []})["checks"]
        )
        rows = [Row(name, tuple(_check(c.check(rung, name)) for c in columns)) for name in names]
        if any(source(c.report, rung) for c in columns):
            rows.insert(0, Row(f"{rung} source", tuple(Cell(_origin(c, rung)) for c in columns)))
        found[rung] = rows
    return found


def speeds(columns: Sequence[Column]) -> list[Row]:
    """What was measured on this host; empty if nothing was."""
    if all(c.latency is None for c in columns):
        return []

    def measured(show: Callable[[dict[str, Any]], str]) -> Callable[[Column], str]:
        return lambda column: NONE if column.latency is None else show(column.latency)

    return [
        _row("speed source", columns, measured(lambda e: str(e["decode"]["source"]))),
        _row("prefill, tokens/s", columns, measured(lambda e: page.speed(e["prefill"]["tokens_per_s_median"]))),
        _row("decode, tokens/s", columns, measured(lambda e: page.speed(e["decode"]["tokens_per_s_median"]))),
        _row("bytes a token reads", columns, measured(lambda e: f"{e['decode_bytes']:,}")),
        _row("peak memory, MiB", columns, measured(lambda e: f"{e['peak_memory_bytes'] / 2**20:,.1f}")),
        _row("load time, s", columns, measured(lambda e: f"{e['load_s']:.3f}")),
    ]


def _row(label: str, columns: Sequence[Column], show: Callable[[Column], str]) -> Row:
    return Row(label, tuple(Cell(show(column)) for column in columns))


def _verdict(passed: bool) -> Cell:
    return Cell("passed", "PASS") if passed else Cell("rejected", "FAIL")


def _origin(column: Column, rung: str) -> str:
    return source(column.report, rung) if rung in column.report["rungs"] else NONE


def _check(check: dict[str, Any] | None) -> Cell:
    if check is None:
        return Cell(NONE)
    return Cell(number(check["value"]), check["status"], "" if check["limit"] is None else gate(check))


def table(columns: Sequence[Column]) -> str:
    """Plain text: one column per bundle, failed checks marked."""
    rows = [*facts(columns), *(row for rung in checks(columns).values() for row in rung), *speeds(columns)]
    lines = [["", *(c.name for c in columns)]]
    for row in rows:
        failed = [" FAIL" if cell.status == "FAIL" and cell.gate else "" for cell in row.cells]
        lines.append([row.label, *(cell.text + mark for cell, mark in zip(row.cells, failed, strict=True))])
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def as_json(columns: Sequence[Column]) -> dict[str, Any]:
    """The same for machines: one entry per bundle, in the order they were given."""
    return {
        "passed": all(c.report["passed"] for c in columns),
        "bundles": [
            {
                "name": c.name,
                "bundle": str(c.path),
                "target": c.manifest["target"]["name"],
                "recipe": c.manifest["quantization"]["recipe"],
                "bytes": c.size_bytes,
                **standing(c),
                "report": c.report,
            }
            for c in columns
        ],
    }


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style | safe }}
 th:first-child, td:first-child { width: 30% } th.n { overflow-wrap: anywhere }
</style></head><body>
<h1>{{ title }}</h1>
<p class="sub">{{ columns | length }} bundle{{ "s" if columns | length > 1 }} of one checkpoint:
 Qwen3.5 {{ m.model.size }} ({{ m.model.variant }}) from {{ m.model.source.id }}.</p>
{% for heading, meaning, rows in sections %}
<h2>{{ heading }}</h2>
<p class="sub">{{ meaning }}</p>
<table><tr><th></th>{% for c in columns %}<th class="n">{{ c.name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.label }}</td>{% for cell in row.cells %}
<td class="n"><span class="{{ cell.status }}">{{ cell.text }}</span>
{%- if cell.gate %} <span class="reason">{{ cell.gate }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% for heading, drawing in plots %}<figure><h2>{{ heading }}</h2>{{ drawing | safe }}</figure>
{% endfor %}
</body></html>
"""


def render(columns: Sequence[Column]) -> str:
    """The page; deterministic but for measured numbers."""
    return page.template(PAGE).render(
        style=page.STYLE,
        title=" · ".join(c.name for c in columns),
        columns=columns,
        m=columns[0].manifest,
        sections=list(_sections(columns)),
        plots=plots(columns),
    )


def _sections(columns: Sequence[Column]) -> Iterator[tuple[str, str, list[Row]]]:
    yield "Bundles", "A check that failed is red; gates stand beside the values, those of L3 follow the recipe.", facts(
        columns
    )
    for rung, rows in checks(columns).items():
        yield rung, page.MEANING[rung], rows
    measured = next((c.latency for c in columns if c.latency is not None), None)
    if measured is not None:
        yield (
            "On this host",
            f"Medians with {measured['decode']['threads']} threads, wall clock of the machine that ran the comparison, "
            "each bundle in a process of its own. Peak memory is what that process grew by. A phone differs.",
            speeds(columns),
        )


def plots(columns: Sequence[Column]) -> list[tuple[str, str]]:
    """(title, svg) of what there is: parity over tokens and states, sizes, speed, memory."""
    found = []
    places = {c.name: (c.series("L3", "rows"), c.series("L3", "kl")) for c in columns if c.series("L3", "kl")}
    if places:
        found.append(("KL over position (nats)", page.lines(places)))
    drifts = {c.name: c.series("L3", "drift_kl") for c in columns}
    steps = {name: (range(len(kl)), kl) for name, kl in drifts.items() if kl}
    if steps:
        found.append(("KL over decode steps: drift (nats)", page.lines(steps)))
    states = {c.name: c.series("L3", "states") for c in columns if c.series("L3", "states")}
    if states:
        found.append(("Relative error of every state, L3", page.states(states)))
    found.append(("Size on disk", _bars(columns, {"MB": [c.size_bytes / 1e6 for c in columns]})))
    known = [c for c in columns if c.latency is not None]
    entries = [c.latency for c in known if c.latency is not None]
    if entries:
        fast = {
            f"{phase}, tokens/s": [e[phase]["tokens_per_s_median"] for e in entries] for phase in ("prefill", "decode")
        }
        found.append(("Speed on this host", _bars(known, fast)))
        full = {
            "peak memory, MiB": [e["peak_memory_bytes"] / 2**20 for e in entries],
            "a token reads, MB": [e["decode_bytes"] / 1e6 for e in entries],
        }
        found.append(("Memory on this host", _bars(known, full)))
    return found


def _bars(columns: Sequence[Column], panels: dict[str, list[float]]) -> str:
    """A bar per bundle in each panel, the first bundle on top."""
    drawing, axes = page.figure(len(panels), height=0.9 + 0.4 * len(columns))
    colours = [f"C{place}" for place in range(len(columns))]
    for panel, (label, values) in zip(axes if len(panels) > 1 else [axes], panels.items(), strict=True):
        bars = panel.barh(range(len(columns)), values, color=colours)
        panel.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" for value in values], padding=3)
        panel.set_yticks(range(len(columns)), [c.name for c in columns])
        panel.set_xlabel(label)
        panel.margins(x=0.2)
    (axes[0] if len(panels) > 1 else axes).invert_yaxis()
    return page.svg(drawing)
