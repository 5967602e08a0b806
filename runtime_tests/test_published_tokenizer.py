"""A tokenizer of the published size: its layout, and the sidecars and chat tests made with it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from export.bundle.writer import BundleWriter
from export.chat.abilities import probe
from export.chat.chat_tests import chat_tests
from export.chat.sidecars import write_tokenizer
from export.chat.template import load_tokenizer
from export.model.config import ModelConfig
from export.sizes import SIZES
from runtime_tests import published_tokenizer
from runtime_tests.files import PUBLISHED, Files, published_template

TEXT = (
    "The lighthouse keeper wrote in her log every evening: wind at 40 km/h, two ships passed.\n\n"
    "def f(x):\n    return x ** 2\n\nGröße, élève, Привет, नमस्ते दुनिया, 灯台は静かだった。 안녕 👩🏽‍🚀 … \t\r\n  end"
)
LAYOUT = {
    "!": 0,
    "<|endoftext|>": 248_044,
    "<|im_start|>": 248_045,
    "<|im_end|>": 248_046,
    "<|object_ref_start|>": 248_047,
    "<|quad_end|>": 248_052,
    "<|vision_start|>": 248_053,
    "<|vision_end|>": 248_054,
    "<|vision_pad|>": 248_055,
    "<|image_pad|>": 248_056,
    "<|video_pad|>": 248_057,
    "<tool_call>": 248_058,
    "</tool_call>": 248_059,
    "<think>": 248_068,
    "</think>": 248_069,
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return published_tokenizer.folder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    """As a checkpoint's: its config.json decides the class."""
    return AutoTokenizer.from_pretrained(folder, config=AutoConfig.for_model("qwen3_5"), local_files_only=True)


def test_layout_of_the_published_vocabulary(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == published_tokenizer.NUM_TOKENS == 248_077
    assert sorted(vocabulary.values()) == list(range(248_077))
    assert {token: vocabulary[token] for token in LAYOUT} == LAYOUT
    assert type(tokenizer).__name__ == "Qwen3_5Tokenizer"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (248_046, 248_044, None)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special == set(range(248_044, 248_058))


def test_text_becomes_a_few_tokens_a_word_and_comes_back(tokenizer: Any, folder: Path) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    prose = TEXT.split("\n")[0]
    assert len(tokenizer(prose)["input_ids"]) < 2.5 * len(prose.split())
    assert len(tokenizer("灯台は静か")["input_ids"]) == 5, "a token a character"
    # transformers' class rebuilds the pre-tokenizer; the file must have said the same.
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids == ids
    mixed = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    found = tokenizer(mixed)["input_ids"]
    assert found[0] == 248_045 and found.count(248_046) == 1 and found[-2] == 248_068
    assert tokenizer.decode(found) == mixed
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"], "composed by the normalizer"


def test_every_merge_has_its_parts_before_it() -> None:
    model = published_tokenizer.document()["model"]
    place = model["vocab"]
    assert len(model["merges"]) == 247_788
    assert all(
        max(place[left], place[right]) < place[left + right] == 256 + rank
        for rank, (left, right) in enumerate(model["merges"])
    )


def test_it_is_made_once(folder: Path) -> None:
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert published_tokenizer.folder() == folder and (folder / "tokenizer.json").stat().st_mtime_ns == before


def test_sidecars_and_chat_tests_at_published_size(folder: Path, tmp_path: Path) -> None:
    template = published_template(PUBLISHED[1])
    place = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    (place / "config.json").write_text(json.dumps(SIZES["9b"].config))
    checkpoint = Files(place)
    config: ModelConfig = checkpoint.model_config
    with BundleWriter(tmp_path / "b", {}, overwrite=False, resume=False) as writer:
        sidecars = write_tokenizer(checkpoint, config, writer)
        written = load_tokenizer(writer.path)
        size = (writer.path / "chat_tests.json").stat().st_size
    assert sidecars.manifest["num_tokens"] == 248_077 and config.text.vocab_size == 248_320
    assert sidecars.manifest["never_sampled_ids"] == [248_053, 248_054, 248_055, 248_056, 248_057]
    assert sidecars.manifest["stop_token_ids"] == [248_046, 248_044]
    assert sidecars.manifest["template"]["thinking"] == {"switch": True, "default": True}
    assert size < 1_500_000
    able = probe(written, config)
    begin = time.process_time()
    entries = chat_tests(written, able)
    assert time.process_time() - begin < 5
    assert len(entries) == 221
