"""Tables of a calibration: bundles, twins beside the plain one, and the margin between right bundles and faults.

How near a value is to its gate is told as a share: 1 is the limit, below it passes. For a value that has to be small
it is value / limit; for a share that has to be near 1, (1 - value) / (1 - limit); for decibels the ratio of the powers
of noise; for a ratio of perplexities that of their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
TWINS = ("streams", "outliers", "concentrated")
COMPARED = ("L3.kl_mean", "L3.own_kl", "L3.given_kl")
MOST_BY_TWIN = 2.0
"""Times the divergence of the plain one that a twin's may be (issue 13, 1.2)."""


def number(value: Any) -> float:
    """A value as `judge.finite` wrote it."""
    return float(value)


def share(check: Record) -> float:
    """Of its limit; above 1 the check fails."""
    value, limit, name = number(check["value"]), number(check["limit"]), check["name"]
    if math.isnan(value):
        return math.inf
    if name.endswith("sqnr_db"):
        return float(10 ** min(30, (limit - value) / 10))
    if name.endswith("perplexity"):
        value, limit = math.log(value), math.log(limit)
    elif check["at_least"]:
        value, limit = 1 - value, 1 - limit
    if limit == 0:
        return 0.0 if value <= 0 else math.inf
    return max(value / limit, 0.0)


def gated(record: Record) -> dict[str, Record]:
    """Checks of a record that a gate decides, by name."""
    return {c["name"]: c for c in record.get("checks", ()) if c["status"] in ("PASS", "FAIL")}


def values(record: Record) -> dict[str, float]:
    """Every value of a record, with and without a gate, by name of the check."""
    return {c["name"]: number(c["value"]) for c in record.get("checks", ())}


def lost(record: Record) -> float:
    """Points of accuracy lost, the mean over the checkpoint's tasks."""
    drops = [100 * (record["accuracy_fp32"][name] - found) for name, found in record["accuracy"].items()]
    return sum(drops) / len(drops)


def tables(records: Sequence[Record]) -> list[str]:
    """All of them, as text."""
    bundles = [r for r in records if r["kind"] == "bundle"]
    found = [of_bundles(bundles), of_twins(bundles)]
    faults = [r for r in records if r["kind"] == "fault" and r["fault"] != "none"]
    return [*found, of_margins(bundles, faults)] + ([of_faults(faults)] if faults else [])


def lines(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns, the first one aligned to the left."""
    everything = [head, *rows]
    widths = [max(len(row[n]) for row in everything) for n in range(len(head))]
    told = ["  ".join(w.ljust(x) if n == 0 else w.rjust(x) for n, (w, x) in enumerate(zip(row, widths, strict=True)))
            for row in everything]  # fmt: skip
    return "\n".join([title, *(line.rstrip() for line in told)])


def of_bundles(bundles: Sequence[Record]) -> str:
    """One row a bundle."""
    rows = []
    for r in bundles:
        what = f"{r['checkpoint']} {r['target']} {r['recipe']}"
        if "refused" in r:
            rows.append([what, *[""] * 6, f"refused: {r['refused'][:60]}"])
            continue
        found = values(r)
        kls = [f"{found.get(name, math.nan):.2g}" for name in COMPARED]
        failing = ", ".join(name for name, check in gated(r).items() if check["status"] == "FAIL")
        accuracy = 100 * sum(r["accuracy"].values()) / len(r["accuracy"])
        told = [f"{r['weights_bytes'] / 1e6:.2f}", *kls, f"{accuracy:.1f}", f"{lost(r):+.1f}", failing or "none"]
        rows.append([what, *told])
    head = ["bundle", "MB", "KL", "own_kl", "given_kl", "accuracy %", "points lost", "failed gates"]
    return lines("Bundles", head, rows)


def of_twins(bundles: Sequence[Record]) -> str:
    """Divergence of a twin over that of the plain one, by the same target and recipe."""
    plain = {(r["target"], r["recipe"]): values(r) for r in bundles if r["checkpoint"] == "plain"}
    rows = []
    for r in bundles:
        base = plain.get((r["target"], r["recipe"]))
        if r["checkpoint"] not in TWINS or "refused" in r or not base:
            continue
        ratios = [values(r)[name] / base[name] for name in COMPARED]
        beyond = "" if max(ratios) <= MOST_BY_TWIN else "beyond 2"
        what = f"{r['checkpoint']} {r['target']} {r['recipe']}"
        rows.append([what, *(f"{ratio:.2f}" for ratio in ratios), f"{lost(r):+.1f}", beyond])
    return lines("Twins: times the divergence of the plain one", ["twin", *COMPARED, "points lost", ""], rows)


def fault_margins(faults: Sequence[Record]) -> list[tuple[str, str, float]]:
    """(fault with checkpoint, the gate that sees it best, its share of that gate's limit)."""
    found = []
    for r in faults:
        shares = {name: share(check) for name, check in gated(r).items()}
        best = max(shares, key=shares.__getitem__)
        found.append((f"{r['fault']} ({r['checkpoint']}, {r['recipe']})", best, shares[best]))
    return found


def row(record: Record, name: str) -> str:
    """A check with the row of the gates that it is held to, where there are several."""
    recipe = record["recipe"]
    if not name.startswith("L3."):
        return name
    kind = recipe if recipe in ("int8", "fp32") else "int8" if name == "L3.vision" else "int4"
    return f"{name} ({'fp16' if kind == 'fp32' and record.get('target') == 'coreml' else kind})"


def of_margins(bundles: Sequence[Record], faults: Sequence[Record]) -> str:
    """For every gate: the nearest right bundle, and the nearest fault of those that no other gate sees better."""
    right: dict[str, tuple[float, str]] = {}
    for r in bundles:
        for name, check in gated(r).items():
            gate = row(r, name)
            found = share(check), f"{r['checkpoint']} {r['target']} {r['recipe']}"
            right[gate] = max(right.get(gate, (0.0, "")), found)
    wrong: dict[str, tuple[float, str]] = {}
    for r, (what, name, much) in zip(faults, fault_margins(faults), strict=True):
        gate = row(r, name)
        wrong[gate] = min(wrong.get(gate, (math.inf, "")), (much, what))
    rows = []
    for gate, (most, where) in sorted(right.items()):
        least, fault = wrong.get(gate, (math.nan, ""))
        rows.append([gate, f"{most:.2f}", where, "" if math.isnan(least) else f"{least:.3g}", fault])
    head = ["gate", "right at most", "on", "faults at least", "which"]
    return lines("Margins, in shares of the limit", head, rows)


def of_faults(faults: Sequence[Record]) -> str:
    """Every fault with the gate that sees it best."""
    rows = [[what, gate, f"{much:.3g}", "" if much > 1 else "ESCAPES"] for what, gate, much in fault_margins(faults)]
    return lines("Faults", ["fault", "seen best by", "share of the limit", ""], rows)
