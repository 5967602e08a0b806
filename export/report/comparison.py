"""Bundles of one checkpoint side by side: a table for the terminal, and one self-contained HTML page with plots.

A column is a bundle with its manifest and what `validate` found; a row is one number of all of them, "–" where
a bundle has none: another target, other rungs, a checkpoint without a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.report import plots, style
from export.report import verdict as judgement
from export.report.card import gate, number, source
from export.report.facts import megabytes
from export.report.plots import Plot, amount
from export.report.verdict import FAIL, OPEN, PASS, Verdict, value
from export.report.words import GOLDEN, RUNGS, words

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

    @property
    def timed(self) -> bool:
        """Whether the times are those of the runtime, and not of an emulation."""
        return self.latency is not None and self.latency["decode"]["source"] == "host"

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
    meaning: str = ""


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
        rows = [Row(name, tuple(_check(c.check(rung, name)) for c in columns), words(name).measures) for name in names]
        if any(source(c.report, rung) for c in columns):
            rows.insert(0, Row(f"{rung} source", tuple(Cell(_origin(c, rung)) for c in columns)))
        found[rung] = rows
    return found


def speeds(columns: Sequence[Column]) -> list[Row]:
    """What was measured on this host; empty if nothing was. An emulation has work and memory, and no speed: its time
    says nothing of a device.
    """
    if all(c.latency is None for c in columns):
        return []

    def measured(show: Callable[[dict[str, Any]], str]) -> Callable[[Column], str]:
        return lambda column: NONE if column.latency is None else show(column.latency)

    def timed(show: Callable[[dict[str, Any]], str]) -> Callable[[Column], str]:
        return lambda column: show(column.latency) if column.latency is not None and column.timed else NONE

    return [
        _row("speed source", columns, measured(lambda e: str(e["decode"]["source"]))),
        _row("prefill, tokens/s", columns, timed(lambda e: amount(e["prefill"]["tokens_per_s_median"]))),
        _row("decode, tokens/s", columns, timed(lambda e: amount(e["decode"]["tokens_per_s_median"]))),
        _row("bytes a token reads", columns, measured(lambda e: f"{e['decode_bytes']:,}")),
        _row("peak memory, MiB", columns, timed(lambda e: f"{e['peak_memory_bytes'] / 2**20:,.1f}")),
        _row("load time, s", columns, timed(lambda e: f"{e['load_s']:.3f}")),
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


PAGE = """<header><h1>{{ title }}</h1>
<p class="verdict {{ verdict.status }}"><strong>{{ verdict.word }}:</strong> <span>{{ verdict.sentence }}</span></p>
<p class="sub">{{ columns | length }} bundle{{ "s" if columns | length > 1 }} of one checkpoint:
 Qwen3.5 {{ m.model.size }} ({{ m.model.variant }}) from {{ m.model.source.id }}.</p></header>
<main>
{% for heading, meaning, groups in sections %}
<section><h2>{{ heading }}</h2>
<p class="sub">{{ meaning }}</p>
{% for caption, rows in groups %}{% if rows %}<div class="wide" tabindex="0"><table class="compared">
{%- if caption %}<caption>{{ caption }}</caption>{% endif %}
<thead><tr><th scope="col">{{ "Check" if caption else "" }}</th>{% for c in columns %}
<th scope="col" class="n">{{ c.name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr><th scope="row">{{ row.label }}
{%- if row.meaning %}<div class="reason">{{ row.meaning }}</div>{% endif %}</th>{% for cell in row.cells %}
<td class="n"><span class="{{ cell.status }}">{{ cell.text }}</span>
{%- if cell.gate %}<div class="reason">{{ cell.gate }}</div>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}{% endfor %}</section>
{% endfor %}
<section><h2>Side by side</h2>{% for drawing in plots %}{{ plot(drawing, 3) }}{% endfor %}</section>
</main>
"""


def render(columns: Sequence[Column]) -> str:
    """The page; deterministic but for measured numbers."""
    return style.template(PAGE).render(
        title=columns[0].name if len(columns) == 1 else f"{len(columns)} bundles side by side",
        verdict=verdict(columns),
        columns=columns,
        m=columns[0].manifest,
        sections=list(_sections(columns)),
        plots=list(plotted(columns)),
    )


def verdict(columns: Sequence[Column]) -> Verdict:
    """On all bundles in one sentence: which passed, which is smallest and which closest to the original."""
    if len(columns) == 1:
        return judgement.verdict(columns[0].manifest, columns[0].report)
    bad = [c for c in columns if not c.report["passed"]]
    if bad:
        names = ", ".join(c.name for c in bad)
        said = f"{len(bad)} of {len(columns)} bundles failed a gate: {names}."
    else:
        said = f"all {len(columns)} bundles passed every gate they were held to."
    climbed = [rung for rung in RUNGS if all(rung in c.report["rungs"] for c in columns)]
    whole = len(climbed) == len(RUNGS)
    if not whole:
        said += f" Only {', '.join(climbed) or 'parts'} of the ladder was checked for all."
    good = [c for c in columns if c not in bad]
    small = min(good or columns, key=lambda c: c.size_bytes)
    said += f" The smallest {'of the others ' if bad and good else ''}is {small.name}"
    said += f" ({megabytes(small.size_bytes)} on disk)"
    known = {c.name: kl for c in good or columns if (kl := value(c.report, "L3", "L3.kl_mean")) is not None}
    if known:
        near = min(known, key=known.__getitem__)
        said += f", the closest to the original {near} (KL {known[near]:.2g} nats)"
    if bad:
        return Verdict(FAIL, "Rejected", f"{said}.")
    return Verdict(PASS, "Passed", f"{said}.") if whole else Verdict(OPEN, "Not judged as a whole", f"{said}.")


def _sections(columns: Sequence[Column]) -> Iterator[tuple[str, str, list[tuple[str, list[Row]]]]]:
    """(heading, meaning, tables by caption)."""
    meaning = "A check that failed is red; gates stand below the values, those of L3 follow the recipe."
    yield "The bundles", meaning, [("", facts(columns))]
    measured = next((c.latency for c in columns if c.latency is not None and c.timed), None)
    if measured is not None:
        yield (
            "On this host",
            f"Medians, {measured['decode']['threads']} thread(s), wall clock of the machine that ran the comparison, "
            "each bundle in a process of its own. Peak memory is what that process grew by. A phone differs.",
            [("", speeds(columns))],
        )
    elif any(c.latency is not None for c in columns):
        meaning = "Emulated: the time and the memory of an emulation say nothing of a device."
        yield "Work of a token", meaning, [("", speeds(columns))]
    for rung, rows in checks(columns).items():
        gated = [row for row in rows if any(cell.status in (PASS, FAIL) for cell in row.cells)]
        rest = [row for row in rows if row not in gated]
        question, how = {**RUNGS, "golden": GOLDEN}[rung]
        yield f"{rung}: {question}", how, [("Held to a gate", gated), ("Recorded, without a gate", rest)]


def plotted(columns: Sequence[Column]) -> Iterator[Plot]:
    """Of what there is: parity over tokens and states, sizes, speed, memory."""
    places = {c.name: (c.series("L3", "rows"), c.series("L3", "kl")) for c in columns if c.series("L3", "kl")}
    if places:
        meaning = "How far the probabilities of the next token are from the original's, after every call."
        yield plots.lines("KL over position (nats)", meaning, "token", places)
    drifts = {c.name: c.series("L3", "drift_kl") for c in columns}
    steps = {name: (range(len(kl)), kl) for name, kl in drifts.items() if kl}
    if steps:
        meaning = "The same while decoding token by token: it must not rise."
        yield plots.lines("KL over decode steps: drift (nats)", meaning, "step", steps)
    states = {c.name: c.series("L3", "states") for c in columns if c.series("L3", "states")}
    if states:
        meaning = "What each layer remembers after the text of the checks, against the original."
        yield plots.states("Relative error of every state, L3", meaning, states)
    names = [c.name for c in columns]
    sizes = {"MB": [c.size_bytes / 1e6 for c in columns]}
    yield plots.bars("Size on disk", "Shorter is smaller:", names, sizes)

    def timed(show: Callable[[dict[str, Any]], float]) -> list[float]:
        return [show(c.latency) if c.latency is not None and c.timed else math.nan for c in columns]

    if any(c.timed for c in columns):
        fast = {
            "prefill, tokens/s": timed(lambda e: e["prefill"]["tokens_per_s_median"]),
            "decode, tokens/s": timed(lambda e: e["decode"]["tokens_per_s_median"]),
        }
        yield plots.bars("Speed on this host", "Longer is faster:", names, fast)
        full = {
            "peak memory, MiB": timed(lambda e: e["peak_memory_bytes"] / 2**20),
            "a token reads, MB": [math.nan if c.latency is None else c.latency["decode_bytes"] / 1e6 for c in columns],
        }
        yield plots.bars("Memory on this host", "Shorter is less:", names, full)
