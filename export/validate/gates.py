"""Every tolerance of the project in one table, each with the reason for its number.

A check is a name and a value, made by `gated` with the gate it must meet, or by `recorded` if it has none. Both look
names up in a closed list, so that a misspelt gate is an error and never a check without one. Rungs: L0 our modules
against transformers, L1 the lowered program without quantisation against our modules, L2 the artifact's weights
against the quantiser, L3 the shipped artifact against transformers; beside them
a published golden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from export.spec import ExportError

T = TypeVar("T")


@dataclass(frozen=True)
class Gate:
    """`value <= limit` (or `>=` when `at_least`)."""

    limit: float
    reason: str
    at_least: bool = False
    in_roundings: bool = False
    """The limit counts the rounding that was measured on the checkpoint (`export.validate.rounding`)."""
    of_noise: bool = False
    """The limit counts the noise that the recipe puts on the checkpoint's weights (`rounding.of_weights`), and is never
    above `MOST_NOISE`."""

    def passes(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Check:
    """One number of a rung. `status` is PASS, FAIL, or RECORDED where there is nothing to demand."""

    name: str
    value: float
    status: str
    limit: float | None = None
    at_least: bool = False
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


GATES: dict[str, Gate] = {
    "L0.logits": Gate(
        8,
        "transformers steps token by token, we go by chunks, and both round: right models of 18 seeds and shapes "
        "measure 0.2 to 2.7, the least of the deliberate faults some 300",
        in_roundings=True,
    ),
    "L0.states": Gate(
        8, "the same of every state, which feed every later token: right models measure 0.5 to 3.1", in_roundings=True
    ),
    "L0.vision": Gate(8, "the same, one pass without recurrence: right models measure 1 to 2.6", in_roundings=True),
    "L0.rounding": Gate(
        1e-3,
        "float32 from float64 in our own modules, the unit of the gates above: tiny 2e-6, lively random models up to "
        "3e-5; sums that lose more in float32 are unstable and would hide faults",
    ),
    "L0.whole_model": Gate(
        2e-4,
        "transformers against itself, its delta rule in chunks against single steps: tiny 3e-6, random 0.8B 2e-5, "
        "lively random small models 4e-5; one tensor with its rows shifted by one: 0.16 and more",
    ),
    "L1.logits": Gate(
        32,
        "another runtime has other orders of summation and an exp of its own: right models of five shapes measure 0.1 "
        "to 1.5 on three runtimes, and 10 where the Neural Engine's operators are series in float32",
        in_roundings=True,
    ),
    "L1.states": Gate(
        32, "the same, measured 0.2 to 1.8; a state wrong by one token or head is off by 1e-1", in_roundings=True
    ),
    "L1.vision": Gate(
        32, "one pass, measured 1.2 to 1.8; gelu in its other form gives 6e-5, a hundred roundings", in_roundings=True
    ),
    "L1.embed": Gate(1e-4, "rows of the table, unquantised; measured 0"),
    "L1.padding": Gate(0, "padded rows of NaN at nonsense positions must change no bit of logits and states"),
    "L1.float16.logits": Gate(
        0.1, "storage in float16 alone (L1.logits holds the rest to 1e-4): tiny 2e-3, random small models up to 0.05"
    ),
    "L1.float16.states": Gate(0.1, "the same; random small models up to 0.04"),
    "L1.float16.embed": Gate(5e-4, "one rounding to float16: at most 2^-11"),
    "L1.float16.vision": Gate(5e-3, "storage in float16, one pass; measured 1e-3"),
    "L2.mismatches": Gate(0, "the packer only moves codes and scales: every weight equal bit for bit"),
    "L2.missing": Gate(0, "every parameter of the model is in the artifact, whole"),
    "L2.tensor_error": Gate(
        0.5,
        "root mean square error of the worst tensor, relative to its own: 4 bits measure 0.1 to 0.2, zeros in place of "
        "weights too small for any scale 1",
    ),
    "L3.fp32.kl_mean": Gate(1e-6, "no quantisation: only fp32 rounding is left; measured 4e-12"),
    "L3.fp32.sqnr_db": Gate(60, "no quantisation: relative error below 1e-3; measured 126", at_least=True),
    "L3.fp32.top1": Gate(1.0, "no quantisation: only ties may differ", at_least=True),
    "L3.fp32.top5": Gate(1.0, "no quantisation", at_least=True),
    "L3.fp32.states": Gate(1e-3, "no quantisation; L1.states holds the same program closer"),
    "L3.fp32.drift": Gate(1e-6, "that of kl_mean: the last steps are as close as the first"),
    "L3.fp32.chunking": Gate(1e-6, "that of kl_mean: chunks and single steps are the same sums"),
    "L3.fp32.vision": Gate(1e-4, "no quantisation; measured 8e-7"),
    "L3.fp16.kl_mean": Gate(1e-3, "no quantisation: float16 storage is left; tiny measures 2e-5"),
    "L3.fp16.sqnr_db": Gate(40, "no quantisation: relative error below 1e-2; tiny measures 55", at_least=True),
    "L3.fp16.top1": Gate(0.98, "near ties may fall the other way", at_least=True),
    "L3.fp16.top5": Gate(1.0, "no quantisation", at_least=True),
    "L3.fp16.states": Gate(0.1, "no quantisation; tiny measures 0.009, positions of one axis for all three 0.24"),
    "L3.fp16.drift": Gate(1e-3, "that of kl_mean: the recurrent state must not wander off"),
    "L3.fp16.chunking": Gate(1e-3, "chunks and single steps round differently in float16"),
    "L3.fp16.vision": Gate(1e-2, "no quantisation; float16 storage measures 1e-3"),
    "L3.fp16.task_drop": Gate(0.5, "points of task accuracy lost to float16 storage: two answers of 400"),
    "L3.kl_mean": Gate(
        30,
        "KL grows with the square of what rounding does to weights, on every checkpoint: right bundles measure 1 to 9 "
        "of it on text they know",
        of_noise=True,
    ),
    "L3.drift": Gate(30, "that of kl_mean: the recurrent state must not wander off", of_noise=True),
    "L3.own_kl": Gate(
        30,
        "that of kl_mean, on the bundle's own answers: right bundles of nine checkpoints measure 0.7 to 24, the least "
        "of the faults that no other gate sees better 88",
        of_noise=True,
    ),
    "L3.given_kl": Gate(30, "that of own_kl, on the reference's answers", of_noise=True),
    "L3.chunking": Gate(
        5e-3,
        "sums in another order move int8 activations: right bundles measure 2e-6 to 1e-3; a state that fades by a "
        "tenth a step gives 0.06",
    ),
    "L3.state_noise": Gate(
        20,
        "power of the error over a state's own, the worst of all, on any text: right bundles of seven checkpoints "
        "measure 2 to 15 of it, the least of the faults that no other gate sees better 31",
        of_noise=True,
    ),
    "L3.int8.vision": Gate(0.05, "8 bits per channel and int8 activations, worst element; tiny measures 0.012"),
    "L3.int4.vision": Gate(0.3, "4 bits in the encoder, worst element; no shipped recipe does it"),
    "L3.int8.sqnr_db": Gate(25, "8 bits: 0.3 % of the logits' power is noise; tiny measures 40", at_least=True),
    "L3.int8.top1": Gate(0.95, "one decided token in twenty may change; tiny: none", at_least=True),
    "L3.int8.top5": Gate(0.99, "the reference's token is hardly ever far down; tiny: never", at_least=True),
    "L3.int4.sqnr_db": Gate(10, "4 bits: 10 % of the logits' power is noise; tiny measures 22", at_least=True),
    "L3.int4.top1": Gate(0.85, "one decided token in seven may change; tiny: one in 14", at_least=True),
    "L3.int4.top5": Gate(0.95, "the reference's token is rarely far down; tiny: never", at_least=True),
    "L3.fp32.own_kl": Gate(1e-6, "that of kl_mean, on the bundle's own answers"),
    "L3.fp32.own_top1": Gate(1.0, "no quantisation: only ties may differ", at_least=True),
    "L3.fp32.own_perplexity": Gate(1.001, "reference's over bundle's, on the bundle's own answers"),
    "L3.fp32.given_kl": Gate(1e-6, "that of kl_mean, on the reference's answers"),
    "L3.fp32.given_top1": Gate(1.0, "no quantisation: only ties may differ", at_least=True),
    "L3.fp32.given_perplexity": Gate(1.001, "bundle's over reference's, on the reference's answers"),
    "L3.fp16.own_kl": Gate(1e-3, "that of kl_mean, on the bundle's own answers"),
    "L3.fp16.own_top1": Gate(0.98, "near ties may fall the other way", at_least=True),
    "L3.fp16.own_perplexity": Gate(1.01, "reference's over bundle's, on the bundle's own answers"),
    "L3.fp16.given_kl": Gate(1e-3, "that of kl_mean, on the reference's answers"),
    "L3.fp16.given_top1": Gate(0.98, "near ties may fall the other way", at_least=True),
    "L3.fp16.given_perplexity": Gate(1.01, "bundle's over reference's, on the reference's answers"),
    "L3.int8.own_top1": Gate(0.95, "one decided token in twenty may change; tiny: one in 250", at_least=True),
    "L3.int8.own_perplexity": Gate(1.02, "reference's over bundle's, on the bundle's answers; tiny measures 1.002"),
    "L3.int8.given_top1": Gate(0.95, "one decided token in twenty may change; tiny: one in 300", at_least=True),
    "L3.int8.given_perplexity": Gate(1.02, "bundle's over reference's, on the reference's answers; tiny: 1.0002"),
    "L3.int4.own_top1": Gate(
        0.8, "one decided token in five may change: right bundles of nine checkpoints change one in 10 to 100", True
    ),
    "L3.int4.own_perplexity": Gate(
        1.6, "reference's over bundle's, on the bundle's answers: nine checkpoints measure 1.004 to 1.35"
    ),
    "L3.int4.given_top1": Gate(0.8, "that of own_top1, on the reference's answers; one in 7 to 100", True),
    "L3.int4.given_perplexity": Gate(
        1.6, "bundle's over reference's, on the reference's answers: nine checkpoints measure 1.001 to 1.28"
    ),
    "L3.answered": Gate(
        0.25, "share of chats that are not answered by stopping at once: else nothing was measured", at_least=True
    ),
    "L3.stopped_at_once": Gate(
        0, "chats whose answer is empty though the reference gives a stop less than a tenth: none by rounding"
    ),
    "L3.one_token": Gate(0, "first answers of one token over and over, which the reference's are not"),
    "L3.reference_agrees": Gate(
        0.99, "share of the reference's own tokens that transformers would have chosen, near ties apart", at_least=True
    ),
    "L3.activations": Gate(
        65504 / 2,
        "the largest value in float16, which ends at 65,504: a factor of two for conversations nobody tried; beyond it "
        "streams must be scaled (export.quantize.scale) or the bundle is wrong without a word",
    ),
    "L3.text_runner": Gate(1e-4, "the same weights one token at a time by another method; measured 0 to 2e-7"),
    "L3.fp32.task_drop": Gate(0.0, "points of task accuracy lost without quantisation: none"),
    "L3.int8.task_drop": Gate(1.0, "points of task accuracy lost to int8; tiny measures 0.25"),
    "L3.int4.task_drop": Gate(3.0, "points of task accuracy lost to int4; tiny measures 0 to 0.25"),
    "L3.task_reference": Gate(
        0.9, "a model that cannot do its task in fp32 would make every drop look harmless", at_least=True
    ),
    "golden.fp32.logits": Gate(
        1e-4, "that of L1.logits: fp32 on another runtime, the picture as it is; tiny measures 3e-7"
    ),
    "golden.fp32.resized.logits": Gate(
        0.01,
        "transformers rounds a resized picture to 8 bits, this project's chat does not, and decoders of JPEG differ; "
        "tiny measures 2e-4",
    ),
    "golden.fp32.ids": Gate(0, "tokens above the golden's ten by more than a near tie: fp32 moves none so far"),
    "golden.fp16.logits": Gate(0.1, "that of L1.float16.logits: storage in float16, in the worst of models"),
}
GOLDEN_ROWS = {"sqnr_db": "sqnr_db", "tokens": "given_top1", "top5": "top5"}
"""Checks of a golden, and the gate of L3 by which each is held, for every kind of weights."""
GATES |= {
    f"golden.{kind}.{name}": replace(GATES[f"L3.{kind}.{row}"], reason=f"that of L3.{kind}.{row}, on a golden")
    for kind in ("fp32", "fp16", "int8", "int4")
    for name, row in GOLDEN_ROWS.items()
}


RECORDED: dict[str, str] = {
    "L0.pictures_in_text": "a count: fewer than two where the context is too short for them",
    "L1.layers": "a count: the first layers stand for all where the model is large",
    "L2.weights": "a count of what L2.mismatches is about",
    "L3.kl_p99": "one token among a hundred decides it: right bundles reach 0.6 on text they know, 10 on other text",
    "L3.kl_worst": "one token decides it: right bundles reach 6 on text they know, 15 on other text, faults begin at 2",
    "L3.kl_pictures": "no model is asked what follows within a picture; states and later text show what it left",
    "L3.text_positions": "a count of what kl_mean is about",
    "L3.certainty": "of the reference, which is no fault of a bundle",
    "L3.perplexity": "of the text, to be read beside the reference's; KL holds the difference",
    "L3.perplexity_reference": "of the checkpoint, which is no fault of a bundle",
    "L3.own_positions": "a count, decided by the size of the model",
    "L3.own_certainty": "of the reference along the bundle's answers: L3.own_perplexity holds what garbage changes",
    "L3.given_positions": "a count, decided by the size of the model",
    "L3.ambiguous": "near ties of the reference, which are no fault of a bundle",
    "L3.states": "the worst element of quantised ones: right bundles reach 1.1, lost states 0.5; state_noise holds all",
    "L3.drift_first": "what L3.drift is compared with by a reader",
    "L3.drift_steps": "a count",
    "L3.drift_context": "a count",
    "L3.drift_layout": "of layouts of states that the bundle does not have",
    "L3.stress_kl": "sensitivity to sums in float16, in a model of no device",
    "L3.task": "the score of one skill; task_drop is about all of them",
    "golden.logits": "of quantised weights: golden.sqnr_db holds the same numbers to the bundle's row",
    "golden.ids": "of weights that are quantised, or a picture that is resized: the tenth place is no answer",
    "golden.ambiguous": "a count of near ties, which are no fault of a bundle",
    "golden.prompt_tokens": "a count; a prompt of other ids is refused",
}
"""Values without a gate, each with the reason why it has none."""


class UnknownCheckError(ExportError):
    """A check names a gate, or a value without one, that is in no list."""


DEPTH = 8
"""Layers that the gates of L0.whole_model and L3.state_noise are for: rounding adds up evenly, so a deeper model may be
off by as much more.
"""
ACTIVATIONS = 1.5e-4
"""Noise of activations in 8 bits, which some runtimes multiply by quantised weights: what bundles in 8 bits lose beyond
the noise of their weights is 0 to 1.5e-4 of it on five checkpoints.
"""
MOST_NOISE = 0.4
"""Whatever the noise, no KL on answers in nats and no noise of a state may be more. Noise on the weights of the four
small checkpoints costs them one point of accuracy where KL is 0.4 to 0.6, and ten where it is 0.9 to 1.7.
"""
FLOOR = 5e-7
"""Least rounding that is counted: four units in the last place of float32, lost by the luck of one sum's order."""


def gated(
    name: str,
    value: float,
    gate: str | None = None,
    *,
    enforced: bool = True,
    layers: int = DEPTH,
    rounding: float | None = None,
    noise: float | None = None,
) -> Check:
    """Hold a value against its gate.

    Args:
        gate: a name in `GATES`; None: that of the check. enforced: False records the value with the gate beside it.
        layers: of a comparison in which rounding adds up with them. rounding: relative distance of float32 from float64
            in the same sums, for gates that count it. noise: mean squared relative error of the weights, likewise.

    Raises:
        UnknownCheckError: there is no such gate. ValueError: it counts roundings or noise and none is given.
    """
    rule = _entry(GATES, gate or name, name, "gate", "GATES, or use `recorded`")
    if rule.in_roundings:
        if rounding is None:
            raise ValueError(f"check {name}: its gate counts roundings; measure one (export.validate.rounding)")
        # An overflow of float32 is no rounding that others may have as well.
        limit = rule.limit * (max(rounding, FLOOR) if math.isfinite(rounding) else FLOOR)
        rule = replace(rule, limit=limit, reason=f"{rule.limit:g} roundings, here of {rounding:.1e}: {rule.reason}")
    if rule.of_noise:
        if noise is None:
            raise ValueError(f"check {name}: its gate counts the noise of weights; measure it (rounding.of_weights)")
        noise = (noise if math.isfinite(noise) else 0.0) + ACTIVATIONS
        reason = f"{rule.limit:g} times the noise of weights and activations, here of {noise:.1e}: {rule.reason}"
        rule = replace(rule, limit=rule.limit * noise, reason=reason)
    if layers > DEPTH:
        rule = replace(rule, limit=rule.limit * layers / DEPTH, reason=f"{rule.reason}; here {layers}")
    if rule.of_noise:
        rule = replace(rule, limit=min(MOST_NOISE, rule.limit))
    status = "RECORDED" if not enforced else "PASS" if rule.passes(float(value)) else "FAIL"
    return Check(name, float(value), status, rule.limit, rule.at_least, rule.reason)


def recorded(name: str, value: float, entry: str | None = None) -> Check:
    """A value without a gate.

    Args:
        entry: a name in `RECORDED`, where several checks share one; None: that of the check.

    Raises:
        UnknownCheckError: there is no such entry.
    """
    reason = _entry(RECORDED, entry or name, name, "value without a gate", "RECORDED with the reason why it has none")
    return Check(name, float(value), "RECORDED", reason=reason)


def _entry(table: Mapping[str, T], key: str, name: str, what: str, place: str) -> T:
    if key not in table:
        close = get_close_matches(key, table, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise UnknownCheckError(f"check {name}: there is no {what} called {key}{guess}; add it to {place}")
    return table[key]


def failed(checks: Iterable[Check]) -> list[Check]:
    return [c for c in checks if c.status == "FAIL"]
