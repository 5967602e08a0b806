"""The verdict on a bundle in one sentence, and its checks in the order a reader wants them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from export.report.words import RUNGS, words

PASS, FAIL, OPEN = "PASS", "FAIL", "OPEN"
ORIGIN = {
    "host": "",
    "emulated": " on an emulation of the runtime",
    "unknown": " on the runtime or an emulation, which the report does not say",
}
"""By what ran the bundle."""


@dataclass(frozen=True)
class Verdict:
    """`status`: PASS, FAIL, or OPEN where nothing was decided. `word` names it, `sentence` says why."""

    status: str
    word: str
    sentence: str


def verdict(manifest: dict[str, Any], report: dict[str, Any] | None) -> Verdict:
    """On a bundle; without a report, or with a part of the ladder, it stays open."""
    if report is None:
        return Verdict(
            OPEN, "Not validated", "the bundle was written without checks: nothing is known about its answers."
        )
    gated = [c for c in _checks(report) if c["status"] != "RECORDED"]
    bad = failed(report)
    errors = sum(found["severity"] == "error" for found in report.get("lint") or ())
    if bad or errors or not report["passed"]:
        named = f" ({', '.join(c['name'] for c in bad[:4])}{', …' if len(bad) > 4 else ''})" if bad else ""
        reasons = [f"{len(bad)} of {len(gated)} gates failed{named}"] if bad else []
        reasons += [f"the linter found {errors} kind{'s' * (errors > 1)} of errors"] if errors else []
        return Verdict(FAIL, "Rejected", f"{' and '.join(reasons or ['a rung failed'])}. Do not ship this bundle.")
    passed = f"all {len(gated)} gates passed" if len(gated) != 1 else "the only gate passed"
    where = ORIGIN[report.get("measured", "unknown")]
    missing = [rung for rung in RUNGS if rung not in report["rungs"]]
    if missing:
        climbed = ", ".join(report["rungs"]) or "no rung"
        return Verdict(
            OPEN, "Not judged as a whole", f"only {climbed} was checked, and {passed}{where}; without "
            f"{', '.join(missing)} there is no verdict."
        )
    if manifest["model"]["source"]["kind"] == "random":
        return Verdict(
            PASS, "The program is right", f"{passed}{where}. The weights are random, so that nothing is known about "
            "answers: how close they come to the original is recorded without a gate."
        )
    agree = value(report, "L3", "L3.top1")
    close = f" It prefers the same next token as the original in {100 * agree:.1f} % of the places." if agree else ""
    recipe = manifest["quantization"]["recipe"]
    return Verdict(
        PASS, "Accepted", f"{passed}{where}; the bundle answers like the original, as closely as {recipe} is held "
        f"to.{close}"
    )




def failed(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in _checks(report) if c["status"] == FAIL]


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for rung in report["rungs"].values() for c in rung["checks"]]


def value(report: dict[str, Any], rung: str, name: str) -> float | None:
    """Of one check, where it was made and is finite."""
    for check in report["rungs"].get(rung, {"checks": []})["checks"]:
        if check["name"] == name and math.isfinite(float(check["value"])):
            return float(check["value"])
    return None


def in_order(checks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Checks with a verdict, failed ones first, and those that were recorded without one."""
    gated = [c for c in checks if c["status"] != "RECORDED"]
    return sorted(gated, key=lambda c: c["status"] != FAIL), [c for c in checks if c["status"] == "RECORDED"]


def shown(check: dict[str, Any]) -> str:
    """The value of a check with its unit: "0.0787 nats", "3,329,408 weights", "inf"."""
    number, unit = float(check["value"]), words(check["name"]).unit
    whole = number == round(number) if math.isfinite(number) else False
    text = f"{number:,.0f}" if whole and abs(number) < 1e15 else f"{number:.3g}"
    return f"{text} {unit}".rstrip()
