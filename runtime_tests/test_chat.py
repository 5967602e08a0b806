"""Chats of several turns: only what is new is fed, and the answers are those of a fresh conversation.

Also what goes into a chat: pictures that cannot be read and sampling values outside their ranges.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from export.chat import pictures
from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation
from export.chat.sampling import MAX_SEED, Sampling, masked
from export.checkpoint.weights import Weights
from export.model.positions import PromptError
from export.model.session import Model, TorchSession
from export.spec import UsageError
from export.validate import answers, chats, dialogues
from export.validate.case import Case
from runtime_tests.conftest import MemoryCheckpoint
from targets.base import Session

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

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"word {token}"


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


# --- ids that are never sampled, ids that cannot be fed --------------------------------------------------------

MANIFEST: dict[str, Any] = {
    "context_length": 256,
    "prefill_lengths": [16, 64],
    "image_sizes": [],
    "model": {"vocab_size": 64},
    "tokenizer": {"stop_token_ids": [STOP, 7], "special_token_ids": {"image": 5}},
}


def manifest(**fields: Any) -> dict[str, Any]:
    return {**MANIFEST, "tokenizer": {**MANIFEST["tokenizer"], **fields}}


def test_a_contract_knows_what_is_never_sampled() -> None:
    able = {"pictures": False, "tools": True, "list_content": False, "thinking": {"switch": True, "default": False}}
    told = Contract.of(manifest(num_tokens=60, never_sampled_ids=[6, 7, 8], template=able))
    assert told.num_rows == 64 and told.num_tokens == 60
    assert told.never_sampled_ids == (5, 6, 8), "the picture's place, and never a stop token"
    assert not told.takes_pictures
    old = Contract.of(MANIFEST)
    assert old.num_tokens is None and old.never_sampled_ids == (5,) and old.takes_pictures
    without = Contract.of({**MANIFEST, "tokenizer": {"stop_token_ids": [], "special_token_ids": {}}})
    assert without.never_sampled_ids == ()


def test_a_mask_leaves_the_other_logits_alone() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    before = logits.copy()
    found = masked(logits, 60, (5, 6, 1000))
    assert np.array_equal(logits, before) and found.dtype == np.float32
    gone = np.isneginf(found[0])
    assert gone.nonzero()[0].tolist() == [5, 6, 60, 61, 62, 63]
    assert np.array_equal(found[:, ~gone], before[:, ~gone])
    assert np.array_equal(masked(logits, None, ()), before)


class Wishful:
    """A session that always wants the same tokens, best first."""

    def __init__(self, *wishes: int) -> None:
        self.logits = np.zeros((1, 64), np.float32)
        self.logits[0, list(wishes)] = np.arange(len(wishes), 0, -1) * 10.0
        self.ran: list[str] = []

    def run(self, signature: str, inputs: Any) -> dict[str, Any]:
        self.ran.append(signature)
        if signature == "embed":
            return {"embeddings": np.zeros((*inputs["input_ids"].shape, 8), np.float32)}
        return {"logits": self.logits}

    def reset(self) -> None: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(1.0, top_k=3, top_p=0.9, seed=3)])
def test_no_sampler_of_ours_sees_what_is_masked(sampling: Sampling) -> None:
    contract = Contract.of(manifest(num_tokens=60, never_sampled_ids=[5, 6, 8]))
    talk = Conversation(Wishful(63, 60, 5, 8, 6, 20), contract)
    assert talk.generate([2, 3], max_new_tokens=4, sampler=sampling.sampler()) == [20] * 4
    old = Conversation(Wishful(5, 63, 20), Contract.of(MANIFEST))
    assert old.generate([2, 3], max_new_tokens=2) == [63, 63], "a bundle that does not say masks its image id only"
    stops = Conversation(Wishful(7, 20), Contract.of(manifest(num_tokens=60, never_sampled_ids=[7])))
    assert stops.generate([2, 3], max_new_tokens=4) == [], "a stop token is never masked"


class Half(Contract):
    """Deliberately wrong: masks what the sampler sees, not what is scored, which asks with zeros."""

    def mask(self, logits: Any) -> Any:
        return super().mask(logits) if logits.any() else logits


@pytest.mark.parametrize(("kind", "agreed"), [(Contract, True), (Half, False)])
def test_the_reference_of_answers_chooses_among_the_same_ids(kind: type[Contract], agreed: bool) -> None:
    """transformers wants rows without a token as well."""
    bundle = Wishful(63, 20)
    contract = kind.of(manifest(num_tokens=60))
    answered = dialogues.answer(cast(Session, bundle), contract, chats.Chat("one", [2, 3]), 4)
    assert answered.chosen == [20] * 4
    case = cast(Case, SimpleNamespace(config=SimpleNamespace(text=SimpleNamespace(vocab_size=64))))
    truth = np.array(answered.logits)
    truth[:, 63] += 50  # ids without a token are the likeliest, by which no answer must be judged
    (found,) = answers.score(case, contract, [answered], [truth], [answered.logits])
    assert (found.kl_mean < 1e-9 and found.perplexity_reference < 1.01) == agreed


@pytest.mark.parametrize("token", [64, 10**6, -1])
def test_a_token_without_a_row_is_refused_before_anything_runs(token: int) -> None:
    session = Wishful(20)
    talk = Conversation(session, Contract.of(MANIFEST))
    rule = r"has no row in the model's embedding, which has 64 rows \(0 to 63\): the tokenizer knows more than the m"
    with pytest.raises(PromptError, match=rf"token {token} \('no text known'\) {rule}odel; leave it out"):
        talk.feed([20, token])
    Chat(talk, Words(True))
    with pytest.raises(PromptError, match=rf"token {token} \('word {token}'\) {rule}"):
        talk.generate([20, token], max_new_tokens=1)
    assert session.ran == [] and talk.start == 0
    talk.feed([20, 63])
    assert session.ran == ["embed", "prefill_16"]


def test_pictures_are_refused_where_the_template_has_no_place_for_them() -> None:
    session = Wishful(20)
    able = {"pictures": False, "tools": True, "list_content": True, "thinking": {"switch": True, "default": False}}
    chat = Chat(Conversation(session, Contract.of(manifest(template=able))), Words(True))
    messages = [{"role": "user", "content": "20 21"}]
    with pytest.raises(PromptError, match=r"chat template \(chat_template.jinja\) takes no pictures; ask without, or"):
        chat.answer(messages, [np.zeros((64, 64, 3), np.float32)], max_new_tokens=1)
    assert session.ran == []
    assert chat.answer(messages, max_new_tokens=1)[1] == [20]


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
