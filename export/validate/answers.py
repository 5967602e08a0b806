"""What a bundle answers, for L3: conversations, the checkpoint's task, the runtime's own runner of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract, Conversation
from export.validate import dialogues, metrics
from export.validate.case import Case
from export.validate.dialogues import Dialogue
from export.validate.gates import Check, gated, recorded
from export.validate.probe import Probe
from export.validate.replay import replay
from export.validate.scores import Scores
from targets.base import Session

RUNNER_TOKENS = 24
"""Of text, from the probe, that a runtime's own runner is compared on."""

Logits = NDArray[np.float32]
UNEXPECTED = 0.1
"""A stop that the reference gives a smaller probability is none that rounding explains."""
REPEATED = 4
"""Tokens from which an answer of one token is a repetition."""


def text_runner(session: Session, probe: Probe, special: set[int]) -> list[Check]:
    """What the runtime's own runner would compute, against decode, where the bundle serves one."""
    ids = [token for token in probe.ids if token not in special][:RUNNER_TOKENS]
    found = session.runner_logits(ids)
    if found is None:
        return []
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([ids], np.int64)})["embeddings"][0])
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    logits = np.stack(replay(session, rows, positions, [(None, 1)] * len(ids), junk=0.0))
    return [gated("L3.text_runner", metrics.relative(logits, found))]


def own_answers(
    case: Case,
    session: Session,
    contract: Contract,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
    notes: list[str],
) -> list[Check]:
    """The bundle's answers to the chats, and the reference's where it could give any, scored by both.

    Either side chooses among the same ids: what a bundle never samples is left out of both distributions.
    """
    share = case.share
    own = []
    with case.pace.part("own", len(case.chats)):
        for chat in case.chats:
            own.append(dialogues.answer(session, contract, chat, share))
            case.pace.advance()
    scored = score(case, contract, own, case.read(own, "own"), [dialogue.logits for dialogue in own])
    joined = Scores.joined(scored)
    stops = contract.stop_token_ids
    empty = [len(dialogue.first_answer(stops)) == 0 for dialogue in own]
    early = [unexpected_stop(d, s, stops) for d, s in zip(own, scored, strict=True)]
    stuck = [one_token(d, s, stops) for d, s in zip(own, scored, strict=True)]
    checks = [
        quality_check("own_kl", joined.kl_mean),
        quality_check("own_top1", joined.top1),
        quality_check("own_perplexity", float(np.exp(-joined.loss_difference))),
        recorded("L3.own_positions", len(joined)),
        recorded("L3.own_certainty", joined.certainty),
        gated("L3.answered", 1 - float(np.mean(empty)), enforced=case.gate_quality),
        gated("L3.stopped_at_once", sum(early), enforced=case.gate_quality),
        gated("L3.one_token", sum(stuck), enforced=case.gate_quality),
    ]
    series["chats"] = [d.chat.name for d in own]
    series["own_kl"] = [s.kl_mean for s in scored]
    amount = f"{len(joined):,} positions of the bundle's own answers to {len(own)} conversations"
    given, note = case.given
    if given:
        truth = case.given_truth
        followed = []
        with case.pace.part("along", len(given)):
            for each in given:
                followed.append(dialogues.along(session, contract, each))
                case.pace.advance()
        scored = score(case, contract, given, truth, followed)
        joined = Scores.joined(scored)
        ours = Scores.joined(score(case, contract, given, truth, [each.logits for each in given]))
        checks += [
            quality_check("given_kl", joined.kl_mean),
            quality_check("given_top1", joined.top1),
            quality_check("given_perplexity", float(np.exp(joined.loss_difference))),
            recorded("L3.given_positions", len(joined)),
            gated("L3.reference_agrees", ours.top1, enforced=case.gate_quality),
        ]
        series["answers"] = in_words(case, contract, own, given, scored)
        series["given_kl"] = [s.kl_mean for s in scored]
        amount += f" and {len(joined):,} of the reference's"
    notes += [f"L3 scored {amount}; how many is decided by the size of the model (export/validate/amounts.py).", note]
    return checks


def in_words(
    case: Case, contract: Contract, own: Sequence[Dialogue], given: Sequence[Dialogue], scored: Sequence[Scores]
) -> list[dict[str, Any]]:
    """Each question with the first answer of the reference and the bundle, the one that the reference is surest of on
    top (`scored` are of its answers). Questions to which it answers nothing are left out.
    """
    if case.decode is None:
        return []
    surest = sorted(zip(scored, own, given, strict=True), key=lambda each: -each[0].certainty)
    answers = []
    for _, ours, theirs in surest:
        bundle, original = (case.decode(each.first_answer(contract.stop_token_ids)).strip() for each in (ours, theirs))
        if original:
            asked = {"question": ours.chat.question, "picture": bool(ours.chat.images)}
            answers.append({**asked, "reference": original, "bundle": bundle})
    return answers


def score(
    case: Case, contract: Contract, answered: Sequence[Dialogue], truth: Sequence[Logits], logits: Sequence[Logits]
) -> list[Scores]:
    """transformers' logits beside others [places, V] of each dialogue, both without ids that are never sampled."""
    kept = np.isfinite(contract.mask(np.zeros(case.config.text.vocab_size, np.float32)))
    numbers = np.cumsum(kept) - 1
    return [
        Scores.of(wanted[:, kept], found[:, kept], [int(numbers[token]) for token in dialogue.chosen])
        for dialogue, wanted, found in zip(answered, truth, logits, strict=True)
    ]


def unexpected_stop(dialogue: Dialogue, scores: Scores, stops: Sequence[int]) -> bool:
    """Whether the bundle stops at once where the reference would not think of it."""
    return dialogue.chosen[0] in stops and float(scores.loss_reference[0]) > -np.log(UNEXPECTED)


def one_token(dialogue: Dialogue, scores: Scores, stops: Sequence[int]) -> bool:
    """Whether the first answer is one token over and over, which the reference's is not: it would have taken another
    one before the repetition was `REPEATED` tokens long.
    """
    answer = dialogue.first_answer(stops)
    if len(answer) < REPEATED or len(set(answer)) > 1:
        return False
    beginning = slice(0, REPEATED)
    return bool(((scores.same[beginning] == 0) & (scores.tie[beginning] == 0)).any())


def task_accuracy(
    case: Case,
    task: Callable[[Any], dict[str, float]],
    session: Session,
    contract: Contract,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
) -> list[Check]:
    """Exact answers on the checkpoint's own task, fp32 PyTorch beside the bundle."""
    from export.model.session import Model, TorchSession

    own = TorchSession(Model.load(case.weights), contract.context_length, contract.prefill_lengths)
    expected = task(generator(own, contract))
    scores = task(generator(session, contract))
    series["task"] = {"reference": expected, "bundle": scores}
    drops = [100 * (expected[name] - score) for name, score in scores.items()]
    checks = [
        gated("L3.task_reference", float(np.mean(list(expected.values()))), enforced=case.gate_quality),
        quality_check("task_drop", float(np.mean(drops))),
    ]
    return [*checks, *(recorded(f"L3.task.{name}", score, "L3.task") for name, score in scores.items())]


def generator(session: Any, contract: Contract) -> Callable[[list[NDArray[Any]], list[int]], list[int]]:
    """The `generate(images, ids)` that task metrics call: greedy, a fresh conversation each time."""
    conversation = Conversation(session, contract)

    def generate(images: list[NDArray[Any]], ids: list[int]) -> list[int]:
        conversation.reset()
        return conversation.generate(ids, images, max_new_tokens=32)

    return generate
