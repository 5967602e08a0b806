"""Reports in their true form without an export: a manifest, and what the ladder says of a model of many layers; and
what an HTML parser sees of a page.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from export.validate.gates import GATES, RECORDED, Check

GOLDEN = Path(__file__).parent.parent / "export" / "bundle" / "golden"
TALKED = ("own_kl", "given_kl")
ANSWERS = [
    {"question": "What is <b>written</b>?", "reference": "K7 & P3", "bundle": "K7 & P4", "picture": True},
    {"question": "12+30=", "reference": "42", "bundle": "42", "picture": False},
]


def manifest(layers: int = 32, golden: str = "onnx-single") -> dict[str, Any]:
    """Of a bundle as large as the published 4B, with the files and the target of a golden manifest."""
    found: dict[str, Any] = json.loads((GOLDEN / f"{golden}.json").read_text(encoding="utf-8"))
    target = found["target"]["name"]
    states = []
    for layer in range(layers):
        shapes = {"recurrent": [1, 32, 128, 128], "conv": [1, 3, 8192]}
        if layer % 4 == 3:
            shapes = {"key": [1, 1536, 4, 256], "value": [1, 1536, 4, 256]}
        states += [
            {"name": f"{kind}_{layer}", "kind": kind, "layer": layer, "shape": shape, "dtype": "float32"}
            for kind, shape in shapes.items()
        ]
    model = {
        **found["model"],
        "size": "4b",
        "num_parameters": 4_659_865_088,
        "source": {"id": "Qwen/Qwen3.5-4B", "kind": "hub", "revision": None, "seed": None},
    }
    return {**found, "name": f"qwen3.5-4b-{target}-int4", "model": model, "states": states}


def made(name: str, value: float, gate: str | None = None, enforced: bool = True) -> Check:
    """A check that passes its gate, or that is recorded where there is none or it is not enforced."""
    rule = GATES.get(gate or name)
    if rule is None:
        return Check(name, value, "RECORDED", reason=RECORDED[name])
    status = "PASS" if enforced else "RECORDED"
    return Check(name, value, status, rule.limit, rule.at_least, rule.reason)


def report(layers: int = 32, seed: int = 0, measured: str = "host", gate_quality: bool = True) -> dict[str, Any]:
    """What `judge` returns of a whole ladder with pictures, in which every gate passes."""
    random = np.random.default_rng(seed)

    def states(scale: float, upto: int = layers) -> dict[str, float]:
        kinds = [("key", "value") if layer % 4 == 3 else ("recurrent", "conv") for layer in range(upto)]
        return {
            f"{kind}_{layer}": float(scale * (1 + layer) * random.uniform(0.5, 1.5))
            for layer, pair in enumerate(kinds)
            for kind in pair
        }

    talks = [f"conversation {n}" for n in range(16)]
    talked = {"chats": talks, **{name: [float(x) for x in random.lognormal(-4, 1, 16)] for name in TALKED}}
    emulation = {"text_stream": [float(2**n) for n in range(12)], "vision_stream": [80.0, 300.0, 2390.0]}

    def quality(name: str, value: float, kind: str = "int4") -> Check:
        return made(f"L3.{name}", value, f"L3.{kind}.{name}", gate_quality)

    kl = [float(x) for x in random.lognormal(-5, 1.5, 231)]
    drift = [float(x) for x in random.lognormal(-5, 1.5, 512)]
    errors = {
        f"decoder.layers.{i}.mlp.{part}.weight": 0.05 + i / 1000 for i in range(layers) for part in ("up", "down")
    }
    rungs = {
        "L0": (
            [
                made("L0.logits", 1.1e-6),
                made("L0.states", 1.6e-6),
                made("L0.vision", 5.7e-7),
                made("L0.pictures_in_text", 2),
                made("L0.whole_model", 9e-7),
            ],
            {"states": states(1e-7)},
        ),
        "L1": (
            [
                *(made(f"L1.{name}", 1.2e-6) for name in ("logits", "states", "embed", "vision")),
                made("L1.padding", 0),
                made("L1.layers", 4),
            ],
            {"states": states(2e-7, upto=4)},
        ),
        "L2": (
            [made("L2.mismatches", 0), made("L2.missing", 0), made("L2.weights", 4_659_865_088)],
            {"wrong": [], "missing": [], "tensor_errors": errors},
        ),
        "L3": (
            [
                quality("kl_mean", float(np.mean(kl))),
                made("L3.kl_p99", float(np.quantile(kl, 0.99))),
                made("L3.kl_worst", max(kl)),
                quality("sqnr_db", 21.6),
                quality("top1", 0.93),
                quality("top5", 1.0),
                made("L3.ambiguous", 0.02),
                quality("chunking", 6e-5),
                quality("vision", 0.011, "int8"),
                quality("drift", float(np.mean(drift[-128:]))),
                made("L3.drift_first", float(np.mean(drift[:128]))),
                made("L3.drift_steps", 512),
                made("L3.drift_context", 1024),
                quality("own_kl", 0.05),
            ],
            {
                **{"kl": kl, "rows": list(range(231)), "drift_kl": drift, "states": states(1e-2), "answers": ANSWERS},
                **talked,
                **(emulation if measured == "emulated" else {}),
            },
        ),
    }
    return {
        "rungs": {
            name: {"status": "PASS", "checks": [c.as_json() for c in checks], "series": series, "notes": []}
            for name, (checks, series) in rungs.items()
        },
        "passed": True,
        "measured": measured,
        "latency": {"bundle": speed(9.5, 38, measured), "reference": speed(1.2, 11, "host")},
    }


def speed(decode: float, prefill: float, source: str) -> dict[str, Any]:
    def phase(rate: float) -> dict[str, Any]:
        return {"tokens_per_s_median": rate, "tokens_per_s_p90": 0.9 * rate, "threads": 2, "source": source}

    return {
        "prefill": {**phase(prefill), "prompt_tokens": 512},
        "decode": phase(decode),
        "decode_bytes": 2_500_000_000,
        "decode_macs": 4_100_000_000,
        "peak_memory_bytes": 3 * 2**30,
        "load_s": 2.5,
    }


def spoil(found: dict[str, Any], name: str, value: float) -> None:
    """Give a check of a report a value that fails its gate."""
    for rung in found["rungs"].values():
        for each in rung["checks"]:
            if each["name"] == name:
                each.update(value=value, status="FAIL")
                rung["status"] = "FAIL"
    found["passed"] = False


class Seen(HTMLParser):
    """What a page consists of: its tags with attributes in order, headings (level, text), and all text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.text += " " if tag in ("div", "p", "td", "th", "li", "caption", "figcaption") else ""
        if tag not in self.VOID:
            self.open.append(tag)
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append((int(tag[1:]), ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        closed = self.open.pop()
        if closed != tag:
            raise ValueError(f"<{closed}> is closed by </{tag}>")

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if any(tag[0] == "h" and tag[1:].isdigit() for tag in self.open):
            level, text = self.headings[-1]
            self.headings[-1] = level, " ".join((text + data).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
