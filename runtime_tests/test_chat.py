"""Chats of several turns: only what is new is fed, and the answers are those of a fresh conversation.

Also what goes into a chat: pictures that cannot be read and sampling values outside their ranges.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.chat import pictures
from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation
from export.chat.sampling import MAX_SEED, Sampling
from export.checkpoint.weights import Weights
from export.model.session import Model, TorchSession
from export.spec import UsageError
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


# --- pictures -------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    """A grey PNG of any declared size, however few rows it holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"".join(parts)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()


GREY = bytes([0, 128, 128]) * 2
WRONG_PICTURES: dict[str, tuple[bytes, str]] = {
    "bomb": (png(30_000, 30_000, b"\0" * 100), r"x.png is too large: more than \d+ pixels .*; scale it down"),
    "half a bomb": (png(12_000, 10_000, b"\0" * 100), r"x.png is too large: more than \d+ pixels"),
    "text bomb": (
        png(2, 2, GREY, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**27))),
        r"cannot read picture .*x.png: .*too large",
    ),
    "no picture": (b"<svg/>", r"cannot read picture .*x.png: .*; give a PNG or JPEG file"),
    "empty": (b"", r"cannot read picture .*x.png: "),
    "cut png": (encoded("PNG")[:-200], r"cannot read picture .*x.png: image file is truncated"),
    "cut jpeg": (encoded("JPEG")[:-200], r"cannot read picture .*x.png: image file is truncated"),
    "cut header": (encoded("PNG")[:20], r"cannot read picture .*x.png: "),
    "broken chunk": (encoded("PNG")[:33] + b"\xff" * 40, r"cannot read picture .*x.png: "),
    "damaged gif": (encoded("GIF")[:30], r"cannot read picture .*x.png: "),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", WRONG_PICTURES)
def test_a_wrong_picture_is_a_usage_error(case: str, tmp_path: Path) -> None:
    content, message = WRONG_PICTURES[case]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        pictures.load(tmp_path / "x.png")
    assert raised.value.exit_code == 2


def test_a_sound_picture_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(2, 2, GREY))
    found = pictures.load(tmp_path / "x.png")
    assert found.shape == (2, 2, 3) and found.dtype == np.float32
    assert np.all(found == np.float32(128 / 255))


# --- sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, rf"--seed -1: must be 0 to {MAX_SEED}"),
        ({"seed": 2**63}, rf"--seed {2**63}: must be 0 to {MAX_SEED}"),
        ({"temperature": -0.1}, r"--temperature -0.1: must be 0 \(greedy\) or more"),
        ({"temperature": math.nan}, r"--temperature nan: must be 0"),
        ({"temperature": math.inf}, r"--temperature inf: must be 0"),
        ({"top_k": -1}, r"--top-k -1: must be 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"--top-p 0.0: must be above 0 and at most 1"),
        ({"top_p": math.nan}, r"--top-p nan: must be above 0 and at most 1"),
    ],
)
def test_sampling_values_outside_their_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**values)


def test_the_largest_seed_samples() -> None:
    sample = Sampling(temperature=1.0, seed=MAX_SEED).sampler()
    assert sample(np.array([0.0, 50.0, 0.0], np.float32)) == 1
