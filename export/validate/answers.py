"""What a bundle answers, for L3: greedy continuations, the checkpoint's task, the runtime's own runner of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract, Conversation
from export.validate import metrics, reference
from export.validate.case import Case
from export.validate.gates import GREEDY, Check, gated, recorded
from export.validate.probe import Probe
from export.validate.replay import replay
from targets.base import Session

RUNNER_TOKENS = 24
"""Of text, from the probe, that a runtime's own runner is compared on."""


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


def greedy_tokens(
    case: Case,
    session: Session,
    contract: Contract,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
) -> Check:
    """Tokens that greedy decoding gives as transformers would, up to the first difference; mean over prompts.

    transformers judges the bundle's own continuation in one teacher-forced pass: up to the first difference
    that is the same as letting it run freely, and layers can still be streamed. Both choose among the same ids:
    what a bundle never samples is masked in transformers' logits as well.
    """
    lengths = []
    for prompt in case.prompts:
        answer = Conversation(session, contract).generate(prompt, max_new_tokens=GREEDY, stop=())
        ids = [*prompt, *answer]
        rows = reference.embed(case.checkpoint, ids)
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        logits, _ = reference.hf_sequence(case.checkpoint, case.config, rows, positions, len(prompt))
        best = contract.mask(logits[len(prompt) - 1 : -1]).argmax(-1)
        different = np.flatnonzero(best != np.asarray(answer))
        lengths.append(int(different[0]) if len(different) else len(answer))
    series["greedy_tokens"] = lengths
    return quality_check("greedy_tokens", float(np.mean(lengths)))


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
