"""report.html: one self-contained page with tables and plots (inline SVG, no scripts, no network)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, select_autoescape

from export.report.card import gate, number, source

STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
 h1 { margin-bottom: .2rem } .sub { color: #5b6675 }
 td.g, td.n { white-space: nowrap } th.n { text-align: right }
 table { border-collapse: collapse; width: 100%; margin: 1rem 0 } td, th { padding: .3rem .6rem; text-align: left;
 border-bottom: 1px solid #e3e7ec; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums }
 .PASS { color: #0a7d38; font-weight: 600 } .FAIL { color: #c0182b; font-weight: 600 } .RECORDED { color: #5b6675 }
 figure { margin: 1.5rem 0 } svg { max-width: 100%; height: auto } .reason { color: #5b6675; font-size: .85em }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ m.name }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style | safe }}</style></head><body>
<h1>{{ m.name }}</h1>
<p class="sub">Qwen3.5 {{ m.model.size }} ({{ m.model.variant }}), {{ m.target.runtime }} ≥ {{ m.target.min_version }},
 recipe {{ m.quantization.recipe }}, context {{ m.context_length }}.
 Verdict: <span class="{{ 'PASS' if r.passed else 'FAIL' }}">
 {{ 'every gate passed' if r.passed else 'rejected' }}</span></p>
{% for name, rung in r.rungs.items() %}
<h2>{{ name }} <span class="{{ rung.status }}">{{ rung.status }}</span>
{%- if source(r, name) %} <span class="sub">{{ source(r, name) }}</span>{% endif %}</h2>
<p class="sub">{{ meaning[name] }}{% if source(r, name) %} {{ origin[source(r, name)] }}{% endif %}</p>
<table><tr><th>check</th><th class="n">value</th><th>gate</th><th>status</th><th>why this gate</th></tr>
{% for c in rung.checks %}<tr><td>{{ c.name }}</td><td class="n">{{ number(c.value) }}</td>
<td class="g">{{ gate(c) }}</td><td class="{{ c.status }}">{{ c.status }}</td>
<td class="reason">{{ c.reason }}</td></tr>{% endfor %}</table>
{% for note in rung.get("notes", []) %}<p class="sub">{{ note }}</p>
{% endfor %}{% endfor %}
{% if r.lint is not none %}<h2>Linter</h2>
<p class="sub">{{ "What devices are known to object to. Errors stop a build." if r.lint else
"Nothing found that devices are known to object to." }}</p>{% endif %}
{% if r.lint %}<table><tr><th>rule</th><th></th><th class="n">findings</th><th>first</th><th>what</th>
<th>source</th></tr>
{% for f in r.lint %}<tr><td>{{ f.rule }}</td><td>{{ f.severity }}</td><td class="n">{{ f.count }}</td>
<td class="g">{{ f.where }}</td>
<td class="reason">{{ f.text }}</td><td class="reason">{{ f.source }}</td></tr>{% endfor %}</table>{% endif %}
{% for title, svg in plots %}<figure><h2>{{ title }}</h2>{{ svg | safe }}</figure>{% endfor %}
{% if r.latency %}{% set real = r.latency.bundle.decode.source == "host" %}
<h2>Latency {{ "on the host" if real else "of the emulation" }}</h2>
<table><tr><th></th><th class="n">prefill tokens/s</th><th class="n">decode tokens/s</th>
<th class="n">p90</th><th class="n">ms per token</th></tr>
{% for who in ("bundle", "reference") %}{% if r.latency[who] %}<tr><td>{{ who }}</td>
<td class="n">{{ speed(r.latency[who].prefill.tokens_per_s_median) }}</td>
<td class="n">{{ speed(r.latency[who].decode.tokens_per_s_median) }}</td>
<td class="n">{{ speed(r.latency[who].decode.tokens_per_s_p90) }}</td>
<td class="n">{{ number(1000 / r.latency[who].decode.tokens_per_s_median) }}</td></tr>{% endif %}{% endfor %}</table>
{{ bars | safe }}
<p class="sub">Median, {{ r.latency.bundle.decode.threads }} threads, wall clock of the machine that built
 the bundle.{% if not real %} The bundle was emulated: its speed here says nothing
 of a device.{% endif %}</p>
{% endif %}
</body></html>
"""

MEANING = {
    "L0": "Our modules in PyTorch fp32 against transformers fp32.",
    "L1": "The lowered program without quantisation against our modules.",
    "L2": "The weights stored in the artifact against the quantiser, bit for bit.",
    "L3": "The shipped artifact against transformers fp32.",
}
ORIGIN = {
    "host": "Numbers of the runtime itself, on the host.",
    "emulated": "Emulated numbers: a program on the host imitates the runtime. They are never those of a device.",
    "unknown": "The report does not say whether the runtime itself or an emulation gave the numbers.",
}
"""By `export.report.card.source`."""


def render(manifest: dict[str, Any], report: dict[str, Any]) -> str:
    return template(PAGE).render(
        style=STYLE,
        m=manifest,
        r={"latency": None, "lint": None, **report},
        number=number,
        speed=speed,
        gate=gate,
        source=source,
        meaning=MEANING,
        origin=ORIGIN,
        plots=plots(report),
        bars=_speeds(report["latency"]) if "latency" in report else "",
    )


def template(text: str) -> Template:
    """An HTML template that escapes what it is given and refuses unknown names."""
    return Environment(undefined=StrictUndefined, autoescape=select_autoescape(default=True)).from_string(text)


def speed(value: float) -> str:
    """Tokens/s in about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def plots(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, svg) for whatever series the rungs left."""
    found = []
    rungs = report["rungs"]
    errors = {name: rungs[name]["series"].get("states") for name in ("L0", "L1", "L3") if name in rungs}
    errors = {name: series for name, series in errors.items() if series}
    if errors:
        found.append(("Relative error of every state", states(errors)))
    if "L3" in rungs and rungs["L3"]["series"].get("kl"):
        places = rungs["L3"]["series"]["rows"]
        found.append(("KL over position (nats)", lines({"": (places, rungs["L3"]["series"]["kl"])})))
    if "L3" in rungs and rungs["L3"]["series"].get("drift_kl"):
        layouts = rungs["L3"]["series"].get("drift_kl_by_layout", {})
        kept = {"bundle": rungs["L3"]["series"]["drift_kl"], **{f"{name} states": kl for name, kl in layouts.items()}}
        curves = {name: (range(len(kl)), kl) for name, kl in kept.items()}
        steps = max(len(kl) for kl in kept.values())
        found.append((f"KL over {steps:,} decode steps: drift (nats)", lines(curves)))
    return found


def figure(panels: int = 1, height: float = 3) -> tuple[Any, Any]:
    """A figure of the page's width and its axes: an array of them for several panels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "report"
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(9, height), layout="constrained", sharey=True)


def svg(drawing: Any) -> str:
    """The figure as an <svg> element, the same bytes for the same numbers; closes it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(drawing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def states(errors: Mapping[str, Mapping[str, float]]) -> str:
    """For each label, here rungs, the relative error of every state; a gap where one has none, as L1 of few layers."""
    drawing, axes = figure()
    names = list(next(iter(errors.values())))
    for rung, series in errors.items():
        axes.plot(range(len(names)), [_positive(series.get(n, "nan")) for n in names], "o-", ms=3, label=rung)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.legend()
    axes.grid(alpha=0.3)
    return svg(drawing)


def _positive(value: float | str) -> float:
    """A number for a logarithmic axis; a gap where the report holds "inf" or "nan"."""
    number = float(value)
    return max(number, 1e-9) if math.isfinite(number) else math.nan


def lines(series: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    """For each label a curve over tokens; a legend where there are several."""
    drawing, axes = figure()
    for label, (x, y) in series.items():
        axes.plot(x, [_positive(v) for v in y], lw=1, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("token")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return svg(drawing)


def _speeds(latency: dict[str, Any]) -> str:
    """Tokens/s of the bundle beside the reference, prefill and decode."""
    drawing, axes = figure()
    runners = [who for who in ("reference", "bundle") if latency.get(who)]
    for place, phase in enumerate(("decode", "prefill")):
        speeds = [latency[who][phase]["tokens_per_s_median"] for who in runners]
        bars = axes.barh([f"{who}, {phase}" for who in runners], speeds, color=f"C{place}")
        axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3)
    axes.set_xscale("log")
    axes.set_xlabel("tokens/s (log scale)")
    axes.margins(x=0.1)
    return svg(drawing)
