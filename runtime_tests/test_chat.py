"""Chats of several turns: only what is new is fed, and the answers are those of a fresh conversation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation
from export.checkpoint.weights import Weights
from export.model.session import Model, TorchSession
from runtime_tests.conftest import MemoryCheckpoint

STOP, ASSISTANT, THINK = 1, 2, 3
CONTRACT = Contract(256, (16, 64), ((64, 64),), 5, (STOP,), 32)


class Words:
    """A tokenizer whose words are their numbers. With `drops`, it forgets the thinking of earlier answers."""

    def __init__(self, drops: bool) -> None:
        self.drops = drops

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool, enable_thinking: bool
    ) -> str:
        words: list[Any] = []
        for message in messages:
            if message["role"] == "assistant":
                words += [ASSISTANT] if self.drops else [ASSISTANT, THINK]
            words += [message["content"], STOP]
        return " ".join(map(str, [*words, *([ASSISTANT, THINK] if add_generation_prompt else [])]))

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


class Counting(Conversation):
    fed = 0

    def feed(self, ids: Any, images: Any = ()) -> Any:
        self.fed += len(ids)
        return super().feed(ids, images)


@pytest.fixture(scope="module")
def session(small: MemoryCheckpoint) -> TorchSession:
    model = Model.load(Weights(small, small.model_config))
    return TorchSession(model, CONTRACT.context_length, CONTRACT.prefill_lengths)


@pytest.mark.parametrize("drops", [False, True])
def test_turns_answer_as_if_fed_anew(drops: bool, session: TorchSession) -> None:
    conversation = Counting(session, CONTRACT)
    chat = Chat(conversation, Words(drops))
    picture = np.random.default_rng(0).random((64, 64, 3), np.float32)
    messages: list[dict[str, Any]] = []
    kept: list[int] = []
    for question in ("20 21 6 5 7 22", "23 24 25", "26 27"):
        messages.append({"role": "user", "content": question})
        before = conversation.fed
        prompt, new = chat.answer(messages, [picture], max_new_tokens=6)
        fed = conversation.fed - before
        kept.append(chat.reused)
        assert prompt.count(5) == 4
        assert fed <= len(prompt) - chat.reused + 6
        fresh = Conversation(TorchSession(session.model, 256, (16, 64)), CONTRACT)
        assert new == fresh.generate(prompt, [picture], max_new_tokens=6)
        messages.append({"role": "assistant", "content": " ".join(map(str, new))})
    assert kept[0] == 0
    assert all(later >= 10 for later in kept[1:])
    assert kept[2] > kept[1]


def test_an_edited_question_starts_from_the_snapshot_or_anew(session: TorchSession) -> None:
    chat = Chat(Counting(session, CONTRACT), Words(True))
    first = {"role": "user", "content": "20 21 22"}
    chat.answer([first], max_new_tokens=4)
    chat.answer([first], max_new_tokens=4)
    assert chat.reused == 4  # asked again: all but the generation prompt is there
    _, edited = chat.answer([{"role": "user", "content": "30 31 32 33"}], max_new_tokens=4)
    assert chat.reused == 0
    fresh = Conversation(TorchSession(session.model, 256, (16, 64)), CONTRACT)
    assert edited == fresh.generate([30, 31, 32, 33, STOP, ASSISTANT, THINK], max_new_tokens=4)
