"""The small trained checkpoints: each has the property it is there for and knows its tasks."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.weights import Weights
from export.model.config import FULL, LINEAR
from export.model.session import Model, TorchSession
from export.sizes import CUSTOM, shipped_tiny
from export.spec import ExportSpec
from export.validate import task
from export.validate.answers import generator
from export.validate.transformers_model import whole_model
from runtime_tests import small_tasks
from runtime_tests.test_tiny import Faulty

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = tuple(small_tasks.TASKS)
CONTEXT, LENGTHS = small_tasks.LONGEST, (16,)
LEAST = 0.95
MOST_BYTES = 3_000_000


@cache
def opened(name: str) -> Checkpoint:
    return open_checkpoint(ExportSpec(target="onnx", size=CUSTOM, checkpoint=str(small_tasks.folder(name))))


@cache
def tokenizer(name: str) -> Any:
    return load_tokenizer(small_tasks.folder(name))


@cache
def session(name: str) -> TorchSession:
    checkpoint = opened(name)
    return TorchSession(Model.load(Weights(checkpoint, checkpoint.model_config)), CONTEXT, LENGTHS)


def generate(name: str, runner: Any) -> Callable[[list[Any], list[int]], list[int]]:
    image = opened(name).model_config.image_token_id
    stop = tokenizer(name).convert_tokens_to_ids("<|im_end|>")
    return generator(runner, Contract(CONTEXT, LENGTHS, small_tasks.IMAGE_SIZES, image, (stop,), 32))


# --- what each is there for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_one_is_small_complete_and_a_hybrid(name: str) -> None:
    folder = small_tasks.folder(name)
    files = {file.name for file in folder.iterdir()}
    assert files >= {"config.json", "tokenizer.json", "chat_template.jinja", "README.md", "log.jsonl"}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES
    assert set(opened(name).model_config.text.layer_types) == {LINEAR, FULL}
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["cpu_s"] <= 90 * 60
    assert min(entries[-1]["exact"].values()) >= LEAST


def test_heads_has_equal_numbers_of_them_and_sees() -> None:
    config = opened("heads").model_config
    assert config.text.linear_num_key_heads == config.text.linear_num_value_heads == 4
    assert config.vision is not None


def test_wide_has_groups_of_every_size() -> None:
    text = opened("wide").model_config.text
    assert text.hidden_size == 512
    inputs = (text.hidden_size, text.intermediate_size, text.linear_value_dim, text.num_attention_heads * text.head_dim)
    assert all(width % 128 == 0 for width in inputs)


def test_untied_has_a_head_and_ids_of_its_own() -> None:
    checkpoint = opened("untied")
    text = checkpoint.model_config.text
    assert not text.tie_word_embeddings
    assert not np.array_equal(
        checkpoint.read("lm_head.weight").numpy(), checkpoint.read("model.language_model.embed_tokens.weight").numpy()
    )
    tiny, own = load_tokenizer(shipped_tiny()), tokenizer("untied")
    assert text.vocab_size == 1024 > len(own) > 900  # rows without a token, as published checkpoints have
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "\n"):
        assert own(token, add_special_tokens=False) != tiny(token, add_special_tokens=False)


def test_text_is_a_decoder_alone() -> None:
    checkpoint = opened("text")
    stored = json.loads((small_tasks.folder("text") / "config.json").read_text())
    assert (stored["model_type"], stored["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
    assert checkpoint.model_config.vision is None
    assert not (small_tasks.folder("text") / "preprocessor_config.json").exists()


def test_the_wheel_leaves_them_out() -> None:
    project = tomllib.loads((small_tasks.SMALL.parents[1] / "pyproject.toml").read_text())
    packed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert [path for path in packed if path.startswith("checkpoints")] == ["checkpoints/tiny"]


# --- what they know -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_held_out_samples_are_answered(name: str) -> None:
    scores = small_tasks.evaluate(name, generate(name, session(name)), tokenizer(name), samples=8)
    assert scores.keys() == small_tasks.TASKS[name].keys()
    assert sum(scores.values()) >= len(scores) - 1 / 8, scores  # one of all may be wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_held_out_seeds(name: str) -> None:
    scores = small_tasks.evaluate(name, generate(name, session(name)), tokenizer(name), samples=400)
    print(name, scores)  # noqa: T201
    assert min(scores.values()) >= LEAST, scores


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_and_answers_alike(name: str) -> None:
    """transformers' whole model, from the folder, gives every token of our answers the highest logit."""
    checkpoint = opened(name)
    for skill in small_tasks.TASKS[name]:
        case = small_tasks.sample(name, skill, task.HELD_OUT)
        prompt = task.prompt(case, tokenizer(name))
        answer = generate(name, session(name))(case.images, prompt)
        answer = [*answer, tokenizer(name).convert_tokens_to_ids("<|im_end|>")]
        pictures = [np.rint(i.transpose(2, 0, 1) * 255) / np.float32(255) for i in case.images]
        whole = whole_model(checkpoint, checkpoint.model_config, [*prompt, *answer], pictures)
        assert whole.logits is not None and "as from_pretrained loads it from the checkpoint's folder" in whole.note
        assert whole.logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer, skill


@pytest.mark.parametrize(
    ("name", "lost", "skill"),
    [
        *((name, "recurrent", skill) for name, tasks in small_tasks.TASKS.items() for skill in tasks),
        ("text", "key", "sort"),
        ("wide", "key", "repeat"),
        ("wide", "value", "order"),
        ("heads", "value", "read"),
    ],
)
def test_a_lost_state_is_seen(name: str, lost: str, skill: str) -> None:
    """Prompts take several chunks of 16 tokens; without what earlier ones left, answers are wrong.

    The other tasks answer from the recurrent state alone: "untied" does not miss its keys and values.
    """
    runner = Faulty(session(name), lost)
    scores = small_tasks.evaluate(name, generate(name, runner), tokenizer(name), samples=6, tasks=[skill])
    assert scores[skill] <= (0.0 if lost == "recurrent" else 0.34), scores


def test_samples_are_fixed_by_their_seed() -> None:
    for name, tasks in small_tasks.TASKS.items():
        for skill in tasks:
            found = [small_tasks.sample(name, skill, task.HELD_OUT + i) for i in range(50)]
            again = small_tasks.sample(name, skill, task.HELD_OUT)
            assert (again.messages, again.answer) == (found[0].messages, found[0].answer)
            assert len({(case.answer, str(case.messages)) for case in found}) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_text_for_probes_is_answered_conversation(name: str) -> None:
    ids = small_tasks.text(name, tokenizer(name), 200)
    assert 200 <= len(ids) < 200 + small_tasks.LONGEST
    assert ids[0] == tokenizer(name).convert_tokens_to_ids("<|im_start|>")
    assert opened(name).model_config.image_token_id not in ids
