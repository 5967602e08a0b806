"""What the parts of a rung take, in seconds of one host of two cores: a guess, of which only the ratios are used. How
long they take here shows while they run (export.pace).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.model.config import LINEAR
from export.validate.case import CACHED, Case, make_plan
from export.validate.drift import FULL_CACHE_TOKENS, STRESS_STEPS
from export.validate.lowered import shallow

READ = 12e-9
"""A weight of the checkpoint, read and conditioned."""
MANY = 25e-12
"""A weight and a token in float32, of many tokens at a time."""
ONE = 350e-12
"""The same, one token at a time: the memory's speed."""
DOUBLE = 80e-12
"""The same in float64, of many."""
RULE = 150e-6
"""A token in a layer of linear attention by transformers' recurrent function."""
CHECKED = 25e-9
"""A stored weight, read, and quantised once more."""
WRITTEN = 20e-9
"""A weight, lowered without quantisation."""
RUN = {"host": (8e-12, 30e-12), "emulated": (60e-12, 800e-12)}
"""A weight and a token in the bundle, many at a time and one, by where it runs."""


@dataclass(frozen=True)
class Size:
    """Weights of the layers, the head and the vision encoder, and the layers of linear attention."""

    layers: int
    head: int
    vision: int
    linear: int

    @classmethod
    def of(cls, case: Case) -> Size:
        def count(*beginnings: str) -> int:
            return sum(math.prod(p.shape) for n, p in case.weights.parameters.items() if n.startswith(beginnings))

        linear = case.config.text.layer_types.count(LINEAR)
        return cls(count("decoder.layers."), count("decoder.head."), count("vision."), linear)


def parts(case: Case, rung: str) -> dict[str, float]:
    """Name -> seconds of the parts of a rung."""
    return {"L0": _l0, "L1": _l1, "L2": _l2, "L3": _l3}[rung](case, Size.of(case))


def _l0(case: Case, size: Size) -> dict[str, float]:
    tokens, pictures = len(case.probe.ids), _patches(case)
    steps = sum(length is None for length, _ in case.plan)
    read = READ * (size.layers + size.head)
    found = {
        "truth": read + size.layers * (MANY * tokens + ONE * CACHED) + size.linear * RULE * tokens,
        "ours": read + size.layers * (2 * MANY * tokens + DOUBLE * tokens + ONE * steps),
        "whole": READ * (size.layers + size.head + size.vision) + MANY * (size.layers + size.head) * tokens,
    }
    if pictures:
        found["see"] = size.vision * (READ + MANY * pictures)
        found["pictures"] = size.vision * (2 * READ + MANY * pictures + DOUBLE * pictures / 2)
    return found


def _l1(case: Case, size: Size) -> dict[str, float]:
    tokens, pictures = len(case.probe.ids), _patches(case) / 2
    steps = sum(length is None for length, _ in case.plan)
    share = shallow(case.config).text.num_hidden_layers / case.layers
    layers, many, one = share * size.layers, *RUN[case.target.measured]
    found = {"lower": WRITTEN * (layers + size.head + size.vision)}
    for prefix in ("L1",) if case.floats == "float32" else ("L1.exact", f"L1.{case.floats}"):
        wide = (MANY + DOUBLE) * (prefix != f"L1.{case.floats}")  # what float16 storage is held to counts no roundings
        ours = layers * (ONE * steps + (MANY + wide) * tokens)
        found[f"{prefix} ours"] = READ * (layers + size.head) + ours
        found[f"{prefix} calls"] = 2 * FLOATS * (layers + size.head) * (one * steps + many * (tokens - steps))
        if pictures:
            found[f"{prefix} pictures"] = size.vision * (2 * READ + (MANY + wide + many) * pictures)
    return found


FLOATS = 6
"""How much longer a bundle without quantisation takes."""


def _l2(case: Case, size: Size) -> dict[str, float]:
    return {"weights": CHECKED * sum(math.prod(p.shape) for p in case.weights.parameters.values())}


def _l3(case: Case, size: Size) -> dict[str, float]:
    many, one = RUN[case.target.measured]
    token, reference = size.layers + size.head, READ * (size.layers + size.head)

    def run(plan: list[tuple[int | None, int]]) -> float:
        steps = sum(length is None for length, _ in plan)
        return token * (one * steps + many * sum(valid for length, valid in plan if length is not None))

    tokens = case.chunking_tokens
    found = {
        "probe": run(case.plan),
        "chunking": run(make_plan(tokens, case.prefill_lengths)) + run([(None, 1)] * tokens),
    }
    if case.drift_steps:
        context = min(FULL_CACHE_TOKENS, int(case.manifest["context_length"]))
        steps = min(case.drift_steps, context - 1)
        found["text"] = reference + size.layers * MANY * context + size.head * MANY * steps
        found["drift"] = token * (one * steps + many * (context - steps))
    if case.chats:
        prompts, said = sum(len(chat.ids) for chat in case.chats), case.share * len(case.chats)
        read = reference + size.layers * MANY * (prompts + said) + size.head * MANY * said
        ours = READ * (token + size.vision) + token * (MANY * prompts + ONE * said)
        bundle = token * (many * prompts + one * said)
        shown = {image.tobytes(): image.shape[1] * image.shape[2] for chat in case.chats for image in chat.images}
        if shown:
            found["see chats"] = size.vision * (READ + MANY * sum(shown.values()) / _side(case) ** 2)
        found |= {"given": ours, "own": bundle, "read own": read, "read given": read, "along": bundle}
    if case.target.measured == "emulated":
        prompt = sum(valid for length, valid in case.plan if length is not None)
        found["stress"] = 4 * token * (many * prompt + one * STRESS_STEPS)
    return found


def _patches(case: Case) -> float:
    """Rows of the vision encoder for the pictures of the probe and those beside it."""
    images = [*case.probe.images, *case.pictures]
    return sum(image.shape[1] * image.shape[2] / _side(case) ** 2 for image in images)


def _side(case: Case) -> int:
    """Of a patch, in pixels."""
    return case.config.vision.patch_size if case.config.vision is not None else 1
