"""report.html: one self-contained page, from the verdict to every check (inline SVG, no scripts, no network)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from export.report import plots, style
from export.report.card import gate, source
from export.report.facts import emulated, facts, speed
from export.report.plots import Plot, amount
from export.report.verdict import failed, in_order, shown, verdict
from export.report.words import RUNGS, words

WORST = 10
"""Tensors shown of those that quantisation changed most."""
ORIGIN = {
    "host": "Numbers of the runtime itself, on the host.",
    "emulated": "Emulated numbers: a program on the host imitates the runtime. They are never those of a device.",
    "unknown": "The report does not say whether the runtime itself or an emulation gave the numbers.",
}
"""By `export.report.card.source`."""

CHECKS = """{% macro table(checks, caption) %}<div class="wide" tabindex="0"><table><caption>{{ caption }}</caption>
<thead><tr><th scope="col">Check</th><th scope="col" class="n">Value</th><th scope="col">Gate</th></tr></thead><tbody>
{% for c in checks %}{% set said = words(c.name) %}<tr><th scope="row"><code>{{ c.name }}</code>
<div>{{ said.measures }}</div><div class="reason">If bad: {{ said.bad }}</div>
{%- if c.reason %}<div class="reason">Why {{ "this" if c.limit is not none else "no" }} gate: {{ c.reason }}.</div>
{%- endif %}</th>
<td class="n">{{ shown(c) }}</td><td class="g"><span class="{{ c.status }}">{{ status[c.status] }}</span>
{%- if c.limit is not none %}<div class="reason">{{ gate(c) }}</div>{% endif %}</td></tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro quote(answer) %}<h3>Question{% if answer.picture %}, about a picture{% endif %}</h3>
<blockquote>{{ answer.question }}</blockquote>
<h3>The original answers</h3><blockquote>{{ answer.reference }}</blockquote>
<h3>The bundle answers{% if answer.reference == answer.bundle %} the same{% endif %}</h3>
<blockquote>{{ answer.bundle }}</blockquote>{% endmacro %}
"""
PAGE = """<header><h1>{{ title }}</h1>
<p class="verdict {{ verdict.status }}"><strong>{{ verdict.word }}:</strong> <span>{{ verdict.sentence }}</span></p>
</header>
<main>
{% if bad %}<h2>What failed</h2><ul>{% for c in bad %}{% set said = words(c.name) %}
<li><code>{{ c.name }}</code> is <strong class="FAIL">{{ shown(c) }}</strong> and must be {{ gate(c) }}.
{{ said.measures }} If bad: {{ said.bad }}</li>{% endfor %}</ul>{% endif %}
<section><h2>The bundle</h2><div class="wide"><table class="facts"><tbody>
{% for what, value in facts %}<tr><th scope="row">{{ what }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div></section>
{% if speed or untimed %}<section><h2>Speed</h2>
{% if speed %}<div class="wide" tabindex="0"><table>
<thead><tr><th scope="col">tokens/s, median</th><th scope="col" class="n">reading a prompt</th>
<th scope="col" class="n">answering</th><th scope="col" class="n">answering, slow end (p90)</th>
<th scope="col" class="n">ms per new token</th></tr></thead><tbody>
{% for who, name in (("bundle", "This bundle"), ("reference", "PyTorch, float32")) %}{% if speed[who] %}
<tr><th scope="row">{{ name }}</th><td class="n">{{ amount(speed[who].prefill.tokens_per_s_median) }}</td>
<td class="n">{{ amount(speed[who].decode.tokens_per_s_median) }}</td>
<td class="n">{{ amount(speed[who].decode.tokens_per_s_p90) }}</td>
<td class="n">{{ amount(1000 / speed[who].decode.tokens_per_s_median) }}</td></tr>{% endif %}{% endfor %}
</tbody></table></div>
<p class="sub">Wall clock of the host that built the bundle, {{ speed.bundle.decode.threads }}
thread{{ "s" if speed.bundle.decode.threads != 1 }}, a prompt of {{ speed.bundle.prefill.prompt_tokens }} tokens.
{% if not speed.reference %}PyTorch was not timed beside it: the model has no full attention, or its float32 weights
do not fit in half of the free memory. {% endif %}A phone differs.</p>
{% if speed.reference %}{{ plot(bars, 3) }}{% endif %}
{% else %}<p>Not measured: the bundle ran on an emulation, and its time says nothing of a device. What a token must
read and compute stands above; memory and arithmetic of the device decide how fast that is.</p>{% endif %}</section>
{% endif %}
{% if answers %}<section><h2>One question</h2>{{ quote(answers[0]) }}
{% if answers | length > 1 %}<details><summary>{{ answers | length - 1 }} more</summary>
{% for answer in answers[1:] %}{{ quote(answer) }}{% endfor %}</details>{% endif %}</section>
{% endif %}
{% if r %}<section><h2>Checks</h2>
<p>A ladder: each rung compares one step of the way with the one before, so that the first rung with a bad number is
where an error entered.</p>
{% for name, rung in r.rungs.items() %}{% set gated, recorded = in_order(rung.checks) %}
<h3>{{ name }}: {{ rungs[name][0] }} <span class="{{ rung.status }}">{{ status[rung.status] }}</span>
{%- if source(r, name) %} <span class="sub">{{ source(r, name) }}</span>{% endif %}</h3>
<p class="sub">{{ rungs[name][1] }}{% if source(r, name) %} {{ origin[source(r, name)] }}{% endif %}</p>
{% if gated %}{{ table(gated, "Held to a gate") }}{% endif %}
{% if recorded %}{{ table(recorded, "Recorded, without a verdict") }}{% endif %}
{% for note in rung.get("notes", []) %}<p class="sub">{{ note }}</p>
{% endfor %}{% endfor %}</section>
{% endif %}
{% if tensors %}<section><h2>Tensors that rounding changed most</h2>
<p class="sub">Root of the mean squared error over that of the weights, the worst {{ tensors | length }} of
{{ r.rungs.L2.series.tensor_errors | length }}. At 1 a tensor is no better than zeros.</p>
<div class="wide" tabindex="0"><table><thead><tr><th scope="col">Tensor</th><th scope="col" class="n">Error</th>
<th scope="col" aria-label="bar"></th></tr></thead><tbody>
{% for name, error, share in tensors %}<tr><th scope="row"><code>{{ name }}</code></th>
<td class="n">{{ error }}</td><td style="width: 30%"><span class="bar" style="width: {{ share }}%"></span></td></tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if talks %}<section><h2>Conversations that came out worst</h2>
<p class="sub">KL divergence from the original, mean over each answer, in nats: along what the bundle says itself and,
where the original answered too, along what that says. The worst {{ talks | length }} of
{{ r.rungs.L3.series.chats | length }}.</p>
<div class="wide" tabindex="0"><table><thead><tr><th scope="col">Conversation</th>
<th scope="col" class="n">own answer</th><th scope="col" class="n">original's answer</th>
<th scope="col" aria-label="bar"></th></tr></thead><tbody>
{% for name, own, given, share in talks %}<tr><th scope="row">{{ name }}</th><td class="n">{{ own }}</td>
<td class="n">{{ given }}</td>
<td style="width: 30%"><span class="bar" style="width: {{ share }}%"></span></td></tr>
{% endfor %}</tbody></table></div></section>
{% endif %}
{% if lint is not none %}<section><h2>Linter</h2>
<p class="sub">{{ "What devices are known to object to. Errors stop a build." if lint else
"Nothing found that devices are known to object to." }}</p>
{% if lint %}<div class="wide" tabindex="0"><table><thead><tr><th scope="col">Rule</th><th scope="col">Severity</th>
<th scope="col" class="n">Findings</th><th scope="col">First</th><th scope="col">What, and who says so</th></tr></thead>
<tbody>{% for f in lint %}<tr><th scope="row">{{ f.rule }}</th>
<td class="{{ 'FAIL' if f.severity == 'error' }}">{{ f.severity }}</td><td class="n">{{ f.count }}</td>
<td class="reason">{{ f.where }}</td>
<td>{{ f.text }} <span class="reason">{{ f.source }}</span></td></tr>{% endfor %}</tbody></table></div>{% endif %}
</section>
{% endif %}
{% if plots %}<section><h2>Where it differs</h2>{% for drawing in plots %}{{ plot(drawing, 3) }}{% endfor %}</section>
{% endif %}
</main>
"""
STATUS = {"PASS": "passed", "FAIL": "failed", "RECORDED": "recorded"}


def render(manifest: dict[str, Any], report: dict[str, Any] | None) -> str:
    """The page; deterministic but for measured numbers.

    Args:
        manifest: its `files` give the sizes; without any the page says none.
        report: as `export.validate.judge.judge` returns it; None for a bundle that was not validated.
    """
    found = speed(report)
    rungs = (report or {"rungs": {}})["rungs"]
    return style.template(CHECKS + PAGE).render(
        title=manifest["name"],
        verdict=verdict(manifest, report),
        bad=failed(report) if report else [],
        facts=list(facts(manifest, report)),
        speed=found,
        untimed=emulated(report),
        bars=_speeds(found) if found and found["reference"] else None,
        answers=rungs["L3"]["series"].get("answers", []) if "L3" in rungs else [],
        r=report,
        lint=(report or {}).get("lint"),
        tensors=list(_tensors(rungs)),
        talks=list(_talks(rungs)),
        plots=list(_plots(rungs)),
        rungs=RUNGS,
        status=STATUS,
        origin=ORIGIN,
        amount=amount,
        gate=gate,
        in_order=in_order,
        shown=shown,
        source=source,
        words=words,
    )


def _tensors(rungs: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(name, relative error, its share of the worst in %) of the tensors that rounding changed most."""
    errors = rungs["L2"]["series"].get("tensor_errors", {}) if "L2" in rungs else {}
    worst = sorted(errors.items(), key=lambda item: float(item[1]), reverse=True)[:WORST]
    most = max((float(error) for _, error in worst if math.isfinite(float(error))), default=1.0)
    for name, error in worst:
        share = float(error) / most if math.isfinite(float(error)) and most else 1.0
        yield name, f"{float(error):.3g}", round(100 * share, 1)


def _talks(rungs: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """(name, KL of the bundle's answer, of the original's, the former's share of the worst in %) of conversations."""
    series = rungs["L3"]["series"] if "L3" in rungs else {}
    own = [float(kl) if math.isfinite(float(kl)) else math.inf for kl in series.get("own_kl", ())]
    given = [f"{float(kl):.3g}" for kl in series.get("given_kl", ())] or ["–"] * len(own)
    found = sorted(zip(series.get("chats", ()), own, given, strict=True), key=lambda each: -each[1])[:WORST]
    most = max((kl for _, kl, _ in found if math.isfinite(kl)), default=1.0)
    for name, kl, other in found:
        yield name, f"{kl:.3g}", other, round(100 * kl / most, 1) if math.isfinite(kl) and most else 100.0


def _plots(rungs: dict[str, Any]) -> Iterator[Plot]:
    """Of whatever series the rungs left."""
    errors = {name: found for name, rung in rungs.items() if (found := rung["series"].get("states"))}
    if errors:
        meaning = "What each layer remembers after the text of the checks, against the original, by rung."
        yield plots.states("Relative error of every state", meaning, errors)
    series = rungs["L3"]["series"] if "L3" in rungs else {}
    if series.get("kl"):
        meaning = "How far the probabilities of the next token are from the original's, after every call."
        yield plots.lines("KL over position (nats)", meaning, "token", {"bundle": (series["rows"], series["kl"])})
    streams = {"text": series.get("text_stream"), "pictures": series.get("vision_stream")}
    if drawn := {name: (range(len(values)), values) for name, values in streams.items() if values}:
        meaning = "Of the values that layers hand on, as the files hold them; float16 ends at 65,504."
        yield plots.lines("Largest value over layers", meaning, "layer", drawn)
    if series.get("drift_kl"):
        layouts = series.get("drift_kl_by_layout", {})
        kept = {"bundle": series["drift_kl"], **{f"{name} states": kl for name, kl in layouts.items()}}
        curves = {name: (range(len(kl)), kl) for name, kl in kept.items()}
        steps = max(len(kl) for kl in kept.values())
        meaning = "The same while decoding token by token: it must not rise."
        yield plots.lines(f"KL over {steps:,} decode steps: drift (nats)", meaning, "step", curves)


def _speeds(latency: dict[str, Any]) -> Plot:
    """Tokens/s of the bundle beside the reference."""
    runners = {"This bundle": latency["bundle"], "PyTorch, float32": latency["reference"]}
    panels = {
        f"{label}, tokens/s": [each[phase]["tokens_per_s_median"] for each in runners.values()]
        for phase, label in (("prefill", "reading a prompt"), ("decode", "answering"))
    }
    return plots.bars("Tokens a second beside PyTorch", "Longer is faster:", list(runners), panels)
