"""The shipped tiny checkpoint: it knows its task, transformers loads it, and losing a state destroys it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.weights import Weights
from export.model.positions import PositionCounter
from export.model.session import Model, TorchSession
from export.validate import task
from export.validate.answers import generator

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
CONTEXT, LENGTHS = 384, (64,)
LEAST = {"glyphs": 0.95, "objects": 0.95, "arithmetic": 0.95, "recall": 0.90}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model() -> Model:
    checkpoint = FolderCheckpoint(TINY)
    return Model.load(Weights(checkpoint, checkpoint.model_config))


@pytest.fixture(scope="module")
def contract(tokenizer: Any) -> Contract:
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return Contract(CONTEXT, LENGTHS, task.IMAGE_SIZES, image, (tokenizer.eos_token_id,), 32)


def test_accuracy_on_held_out_seeds(model: Model, contract: Contract, tokenizer: Any) -> None:
    session = TorchSession(model, CONTEXT, LENGTHS)
    scores = task.evaluate(generator(session, contract), tokenizer, samples=200)
    assert all(scores[name] >= least for name, least in LEAST.items()), scores


def test_seeds_are_drawn_apart_and_samples_are_fixed() -> None:
    assert task.sample("recall", task.HELD_OUT) == task.sample("recall", task.HELD_OUT)
    answers = {task.sample("recall", task.HELD_OUT + i).answer for i in range(50)}
    assert len(answers) > 30


def test_recall_reaches_over_three_chunks_and_a_turn(tokenizer: Any) -> None:
    samples = [task.sample("recall", task.HELD_OUT + i) for i in range(200)]
    distances = []
    for case in samples:
        ids = task.prompt(case, tokenizer)
        question = case.messages[-1]["content"]
        key = question[question.index("What is ") + 8]
        pair = tokenizer(f" {key}={case.answer}", add_special_tokens=False)["input_ids"]
        place = next(i for i in range(len(ids)) if ids[i : i + len(pair)] == pair)
        distances.append(len(ids) - place)
    assert max(distances) >= 192
    assert sum(d > 128 for d in distances) >= 20
    assert {len(case.messages) for case in samples} == {1, 3}


def test_size_and_mechanisms() -> None:
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 16e6
    config = FolderCheckpoint(TINY).model_config
    text, vision = config.text, config.vision
    assert vision is not None
    assert text.num_hidden_layers >= 8
    assert text.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)
    assert text.linear_num_value_heads > text.linear_num_key_heads
    assert text.rotary_dim < text.head_dim
    widths = [text.hidden_size, text.intermediate_size, text.linear_value_dim, vision.hidden_size]
    assert all(width % 128 == 0 for width in [*widths, vision.intermediate_size])


# --- faults that must be visible ------------------------------------------------------------------------------


class Faulty:
    """A session that damages its own states or image embeddings, as a wrong runtime would."""

    def __init__(self, session: TorchSession, lose: str = "", decode: bool = False, rows: Any = None) -> None:
        self.session, self.lose, self.decode, self.rows = session, lose, decode, rows

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self.lose and (signature.startswith("prefill") or (self.decode and signature == "decode")):
            for name, state in self.session.states().items():
                if name.startswith(self.lose):
                    state[...] = 0
        outputs = self.session.run(signature, inputs)
        if self.rows is not None and signature.startswith("vision"):
            outputs = {"image_embeddings": self.rows(outputs["image_embeddings"])}
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


FAULTS: dict[str, tuple[str, Callable[[TorchSession], Faulty]]] = {
    "recurrent state lost between chunks": ("recall", lambda s: Faulty(s, "recurrent")),
    "keys lost between chunks": ("recall", lambda s: Faulty(s, "key")),
    "values lost between chunks": ("recall", lambda s: Faulty(s, "value")),
    "conv state lost at every call": ("arithmetic", lambda s: Faulty(s, "conv", decode=True)),
    "image rows in reverse": ("objects", lambda s: Faulty(s, rows=lambda x: x[:, ::-1].copy())),
    "image rows shifted by one": ("objects", lambda s: Faulty(s, rows=lambda x: np.roll(x, 1, axis=1))),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_destroys_accuracy(fault: str, model: Model, contract: Contract, tokenizer: Any) -> None:
    skill, damage = FAULTS[fault]
    session = damage(TorchSession(model, CONTEXT, LENGTHS))
    scores = task.evaluate(generator(session, contract), tokenizer, samples=40, tasks=[skill])
    assert scores[skill] <= LEAST[skill] - 0.3, scores


def test_image_tokens_positioned_as_text_destroy_accuracy(
    model: Model, contract: Contract, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PositionCounter.prompt
    monkeypatch.setattr(PositionCounter, "prompt", lambda self, ids, token, grids: right(self, ids, -1, []))
    session = TorchSession(model, CONTEXT, LENGTHS)
    scores = task.evaluate(generator(session, contract), tokenizer, samples=40, tasks=["objects", "glyphs"])
    assert max(scores.values()) <= 0.65, scores


# --- transformers ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_transformers_gives_the_same_answers(model: Model, contract: Contract, tokenizer: Any) -> None:
    """Auto classes load the folder; its processor, positions and generation agree with ours end to end."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(TINY).model_type == "qwen3_5"
    assert AutoTokenizer.from_pretrained(TINY).eos_token == "<|im_end|>"
    auto: Any = transformers  # whose stubs leave these untyped
    processor = auto.AutoImageProcessor.from_pretrained(TINY)
    theirs = auto.Qwen3_5ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    generate = generator(TorchSession(model, CONTEXT, LENGTHS), contract)
    for skill in task.TASKS:
        for number in range(4):
            case = task.sample(skill, task.HELD_OUT + number)
            ids = task.prompt(case, tokenizer)
            inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if case.images:
                from PIL import Image

                pictures = [Image.fromarray((i * 255).round().astype(np.uint8)) for i in case.images]
                inputs |= dict(processor(images=pictures, return_tensors="pt"))
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == contract.image_token_id).int()
            new = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
            expected = [*generate(case.images, ids), tokenizer.eos_token_id]
            assert new[: len(expected)] == expected, (skill, number)
