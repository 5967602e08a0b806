"""What many tests would compute alike is computed once in a process: traced programs, and the reference in PyTorch.

A deliberate fault is in an emitter, a packer, a session or a host. None of them reaches what is remembered here, so
that a fault shows as it would without. Tests that compare two exports with each other call `forget` between the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.model import trace
from export.model.session import TorchSession
from export.validate import answers, dialogues, reference, teacher
from export.validate.chats import Chat
from export.validate.reference import Pass
from export.validate.teacher import Reading


class Memory:
    """Results of functions by what they depend on."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def forget(self) -> None:
        """Everything is computed anew from here on."""
        self._known.clear()

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def traces(self, patch: pytest.MonkeyPatch) -> None:
        """Programs, each given out as it was traced: emitters read them, but for arguments that some exchange."""

        def remembered(name: str, right: Callable[..., trace.Program]) -> Callable[..., trace.Program]:
            def traced(*inputs: Any, **options: Any) -> trace.Program:
                def first() -> Any:
                    program = right(*inputs, **options)
                    return program, [(node, node.args) for node in program.exported.graph.nodes]

                program, arguments = self.once((name, inputs, tuple(sorted(options.items()))), first)
                for node, args in arguments:
                    if node.args is not args:
                        node.args = args
                return program

            return traced

        for name in ("trace_decoder", "trace_vision", "trace_embed"):
            patch.setattr(trace, name, remembered(name, getattr(trace, name)))

    def transformers(self, patch: pytest.MonkeyPatch) -> None:
        """What transformers computes of a checkpoint."""

        def remembered(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
            def judged(checkpoint: Any, config: Any, *inputs: Any, **told: Any) -> Any:
                key = name, checkpoint.content_key(), config, *map(digest, inputs)
                return self.once(key, lambda: right(checkpoint, config, *inputs, **told))

            return judged

        for name in ("hf_sequence", "hf_vision"):
            patch.setattr(reference, name, remembered(name, getattr(reference, name)))
        patch.setattr(teacher, "hf_logits", remembered("hf_logits", teacher.hf_logits))

    def modules(self, patch: pytest.MonkeyPatch) -> None:
        """What our modules compute, layer by layer, of a checkpoint. Not where they are what is tested."""

        def remembered(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
            def compared(weights: Any, *inputs: Any, **told: Any) -> Any:
                key = name, type(weights), weights.checkpoint.content_key(), weights.config, *map(digest, inputs)
                return self.once(key, lambda: right(weights, *inputs, **told))

            return compared

        for name in ("own_sequences", "own_vision"):
            patch.setattr(reference, name, remembered(name, getattr(reference, name)))
        patch.setattr(dialogues, "reference_answers", remembered("answers", dialogues.reference_answers))

    def answers(self, patch: pytest.MonkeyPatch) -> None:
        """What our modules answer to the prompts of a task. Not where they are what is tested."""
        right = answers.generator

        def generator(session: Any, contract: Contract) -> Any:
            generate = right(session, contract)
            if not isinstance(session, TorchSession):
                return generate
            parameters = [digest(tensor.numpy()) for tensor in session.model.state_dict().values()]
            whose = contract, tuple(parameters)

            def answer(images: list[NDArray[Any]], ids: list[int]) -> list[int]:
                key = "answer", whose, tuple(ids), *map(digest, images)
                return list(self.once(key, lambda: generate(images, ids)))

            return answer

        patch.setattr(answers, "generator", generator)


def digest(value: Any) -> Any:
    """A key of the same content: that of arrays is short."""
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, Reading | Chat | Pass):
        return tuple(digest(getattr(value, field.name)) for field in fields(value))
    return tuple(map(digest, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
