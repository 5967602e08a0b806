"""The model card of a bundle: README.md, with what was built and what was measured."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

from export.report.facts import speed
from export.report.verdict import in_order, verdict

TEMPLATE = """---
license: {{ m.model.license }}
{% if ":" not in m.model.source.id %}base_model: {{ m.model.source.id }}
{% endif %}library_name: {{ m.target.runtime }}
---

# {{ m.name }}

Qwen3.5 {{ m.model.size }} ({{ m.model.variant }}) for {{ m.target.runtime }} >= {{ m.target.min_version }}, \
recipe `{{ m.quantization.recipe }}`, context {{ m.context_length }}, prefill {{ m.prefill_lengths | join(", ") }}\
{% if m.image_sizes %}, images {% for s in m.image_sizes %}{{ s[0] }}×{{ s[1] }}{{ ", " if not loop.last }}\
{% endfor %}{% endif %}.

**{{ verdict.word }}:** {{ verdict.sentence }}

Read `manifest.json` to find out what is inside; it is the contract of this folder.

**To load it:** {{ loading }}


| role | bits | group |
|---|---|---|
{% for role, s in m.quantization.roles.items() -%}
| {{ role }} | {{ s.bits }} | {{ s.group_size or "channel" if s.bits < 16 else "–" }} |
{% endfor -%}
{% for table in m.quantization.get("layers", []) -%}
{% for role, s in table.roles.items() -%}
| {{ role }} in layers {{ table.first }} to {{ table.last }} | {{ s.bits }} | \
{{ s.group_size or "channel" if s.bits < 16 else "–" }} |
{% endfor -%}
{% endfor %}
{% if report -%}
## Checks

| rung | check | value | gate | status | source |
|---|---|---|---|---|---|
{% for name, rung in report.rungs.items() -%}
{% for c in in_order(rung.checks) | sum(start=[]) -%}{% set from = source(report, c.name) or "–" -%}
| {{ name }} | {{ c.name }} | {{ number(c.value) }} | {{ gate(c) }} | {{ c.status }} | {{ from }} |
{% endfor -%}
{% endfor %}
{% if source(report, "L3") == "emulated" -%}
Emulated numbers come from a program that imitates {{ m.target.runtime }} on the host: they are never those of a device.

{% endif -%}
{% for name, rung in report.rungs.items() -%}
{% for note in rung.get("notes", []) -%}
- {{ note }}
{% endfor -%}
{% endfor -%}
{% if speed %}
Measured on the host that built it, {{ speed.bundle.decode.threads }} threads: prefill \
{{ number(speed.bundle.prefill.tokens_per_s_median) }} and decode \
{{ number(speed.bundle.decode.tokens_per_s_median) }} tokens/s (median). A phone differs.
{% endif -%}
{%- endif %}
"""


def number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def gate(check: dict[str, Any]) -> str:
    if check["limit"] is None:
        return "–"
    limit = check["limit"]  # those that count roundings or noise have many digits
    return f"{'≥' if check['at_least'] else '≤'} {limit:{'.3g' if limit < 1 else 'g'}}"


def source(report: dict[str, Any], name: str) -> str:
    """Where the numbers of a rung or check that runs the bundle come from, host or emulated; "unknown" in reports that
    do not say so; empty for the other rungs, whose numbers no runtime changes.
    """
    if name.startswith("L1.exact"):  # no runtime reads float16 as float32
        return "emulated"
    return str(report.get("measured", "unknown")) if name.split(".")[0] in ("L1", "L3", "golden") else ""


def render(manifest: dict[str, Any], report: dict[str, Any] | None, loading: str) -> str:
    """Markdown of the card; deterministic but for measured numbers. `loading` is the target's."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        m=manifest,
        report=report,
        loading=loading,
        verdict=verdict(manifest, report),
        speed=speed(report),
        in_order=in_order,
        number=number,
        gate=gate,
        source=source,
    )
