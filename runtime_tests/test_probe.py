"""What L3 reads and asks: positions of text, texts that do not repeat, the rule of amounts, conversations as data."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint.random import RandomCheckpoint
from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.sizes import SIZES, shipped_tiny
from export.validate import chats, texts
from export.validate.amounts import RULE, STEPWISE, amounts_for, decoder_weights
from export.validate.case import make_plan
from export.validate.drift import FULL_CACHE_TOKENS
from export.validate.probe import make_probe, picture, picture_tokens
from export.validate.reference import pieces
from runtime_tests import published_tokenizer

CONFIG = ModelConfig.from_dict(json.loads((shipped_tiny() / "config.json").read_text(encoding="utf-8")))
CONTRACT = Contract(1024, (64,), ((64, 96), (96, 64)), 404, (394, 392), 32)
PICTURES = [picture(np.random.default_rng(n), *size) for n, size in enumerate(CONTRACT.image_sizes)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(shipped_tiny())


def test_no_scored_position_is_before_a_picture_token() -> None:
    probe = make_probe(CONFIG, 160 + 2 * 8, ((64, 96), (96, 64)))
    pads = probe.ids.count(CONFIG.image_token_id)
    scored = [place for place in range(len(probe.ids)) if probe.before_text(CONFIG, place)]
    assert pads == 2 * 6 and len(scored) == len(probe.ids) - pads - 2 * 2
    assert not {probe.next(place) for place in scored} & picture_tokens(CONFIG)
    assert probe.next(len(probe.ids) - 1) is None


def test_a_text_is_read_once_over_a_full_cache() -> None:
    """Counted with a tokenizer of the published size: enough for the longest run, and no passage twice."""
    stand_in = PreTrainedTokenizerFast.from_pretrained(published_tokenizer.folder())
    ids = texts.text(stand_in)
    assert FULL_CACHE_TOKENS <= len(ids) < 4500
    windows = Counter(tuple(ids[start : start + 24]) for start in range(len(ids) - 23))
    assert windows.most_common(1)[0][1] == 1, "no 24 tokens come twice"
    assert len(set(texts.passages())) == len(texts.passages()) >= 35
    beginning = "".join(texts.passages()[:7])
    for kind in ("def shortest_path", "Did you lock", "Der Regen", "17 + 26", "The bakery", '"id": 4711', "| Mars |"):
        assert kind in beginning, "every kind of text is in any beginning"


@pytest.mark.parametrize("tokens", [1, 2, 96, 256, 460, 1024])
def test_a_plan_decodes_no_more_than_the_limit(tokens: int) -> None:
    plan = make_plan(tokens, (64, 512))
    assert sum(length is None for length, _ in plan) <= STEPWISE + 1
    assert list(pieces(tokens, plan))[-1][0] < tokens
    assert sum(valid for _, valid in plan) == tokens


def test_the_rule_of_amounts_falls_with_the_size() -> None:
    found = []
    for size in ("0.8b", "2b", "4b", "9b"):
        config = SIZES[size].config
        assert config is not None
        weights = Weights(RandomCheckpoint(config, 0), ModelConfig.from_dict(dict(config)))
        found.append((decoder_weights(weights), amounts_for(weights)))
    assert [round(count / 1e9, 1) for count, _ in found] == [0.8, 1.9, 4.2, 7.9]
    assert [amounts for _, amounts in found] == [RULE[1][1], RULE[2][1], RULE[3][1], RULE[3][1]]
    assert all(amounts.drift <= STEPWISE for _, amounts in found)
    small = RULE[0][1]
    assert small.positions >= 512 and small.chats >= 16 and RULE[-1][0] == math.inf


def test_conversations_are_rendered_by_the_template_of_the_checkpoint(tokenizer: Any) -> None:
    found = chats.load(tokenizer, CONTRACT, PICTURES, 99)
    assert len(found.asked) >= 16 and not found.refused and not found.blind
    by_name = {chat.name: chat for chat in found.asked}
    assert [len(by_name[n].images) for n in ("sum", "picture", "two pictures")] == [0, 1, 2]
    two = by_name["two pictures"]
    assert two.ids.count(CONTRACT.image_token_id) == 12 and [i.shape for i in two.images] == [(3, 64, 96), (3, 96, 64)]
    shown = {name: tokenizer.decode(chat.ids) for name, chat in by_name.items()}
    assert shown["reason"].endswith("<think>\n") and shown["sum"].endswith("</think>\n\n")
    assert '"weather"' in shown["tool"] and "Reply with JSON only." in shown["json"]
    further = tokenizer.decode(by_name["recall"].further[0])
    assert further.startswith("<|im_end|>\n<|im_start|>user\nWhat is C?<|im_end|>\n<|im_start|>assistant\n<think>")
    assert by_name["sum"].further != by_name["german"].further, "no two chats are asked the same sums"


def test_what_a_template_refuses_is_left_out_and_told(tokenizer: Any) -> None:
    """Deliberately narrow: no system message, no tools, no pictures."""
    narrow = load_tokenizer(shipped_tiny())
    narrow.chat_template = (
        "{%- for m in messages %}{%- if m.role not in ('user', 'assistant') or tools %}{{ raise_exception('no') }}"
        "{%- endif %}{{ m.role + ': ' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    )
    found = chats.load(narrow, CONTRACT, [], 99)
    assert {"system", "json", "tool", "tool result"} == set(found.refused)
    assert len(found.blind) == 4 and len(found.asked) == 12
    assert found.notes[0].startswith("Conversations left out because the chat template refuses them: tool, ")
    narrow.chat_template = None
    passages = chats.load(narrow, CONTRACT, PICTURES, 5)
    assert len(passages.asked) == 5 and all(chat.name.startswith("passage ") for chat in passages.asked)
    short = Contract(64, (16,), (), 404, (394,), 32)
    assert "fill more than 1/2 of the context" in chats.load(tokenizer, short, [], 99).notes[-1]
