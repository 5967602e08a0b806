"""The four small checkpoints: what each is there for, its dimensions, vocabulary and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.model.config import FULL, LINEAR
from runtime_tests import small_tasks

TEMPLATE_WORDS = ("user\n", "assistant\n", "system\n")


@dataclass(frozen=True)
class Recipe:
    """One checkpoint.

    Attributes:
        purpose: a sentence for its README.
        text, vision: fields of text_config and vision_config that differ from `small_files`' (vision None: none).
        rows: of the embedding; merges are learned from `words` and fill what bytes and special tokens leave.
        words: text of its own that merges are learned from.
        special_first: special tokens have the first ids instead of the last.
        cycles: optimiser steps, in each of which the rate falls from `rate` (of the matrices) to zero along a cosine
            (Loshchilov & Hutter 2017, arXiv:1608.03983). batch: rows of a step.
        vision_steps: before them, of the encoder alone.
        rotated: share of the dimensions of a head that rotary embedding turns, 16 of them everywhere.
    """

    purpose: str
    text: dict[str, Any]
    rows: int
    words: tuple[str, ...]
    vision: dict[str, Any] | None = None
    tied: bool = True
    alone: bool = False
    special_first: bool = False
    cycles: tuple[int, ...] = (600,)
    batch: int = 16
    rate: float = 5e-3
    vision_steps: int = 0
    rotated: float = 0.25


def _spaced(words: str | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f" {word}" for word in words) + tuple(words)


ENGLISH = (
    "the of and to in is that it was for on are as with they be at one have this from or had by hot word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way "
    "about many then them write would like so these her long make thing see him two has look more day could go come "
    "did number sound no most people my over know water than call first who may down side been now find any new "
    "work part take get place made live where after back little only round man year came show every good me give "
    "our under name very through just form sentence great think say help low line differ turn cause much mean "
    "before move right boy old too same tell does set three want air well also play small end put home read hand "
    "port large spell add even land here must big high such follow act why ask men change went light kind off need "
    "house picture try us again animal point mother world near build self earth father head stand own page should "
    "country found answer school grow study still learn plant cover food sun four between state keep eye never last "
    "let thought city tree cross farm hard start"
)
"""Common words, so that a vocabulary of a thousand has something to hold."""

RECIPES: dict[str, Recipe] = {
    "text": Recipe(
        "a decoder alone, as Qwen3_5ForCausalLM saves it, which reverses and sorts digits",
        {
            "hidden_size": 128, "intermediate_size": 256, "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        rows=320,
        words=("Reverse", "Sort"),
        alone=True,
        cycles=(450,),
    ),
    "wide": Recipe(
        "hidden size 512, so that groups of 32, 64 and 128 differ; it repeats and orders letters",
        {
            "hidden_size": 512, "intermediate_size": 128, "layer_types": [LINEAR, FULL, FULL],
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
            "linear_num_key_heads": 1, "linear_num_value_heads": 4,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        rows=320,
        rotated=0.5,
        words=("Order", "Repeat", *_spaced(small_tasks.CAPITALS)),
    ),
    "untied": Recipe(
        "a head of its own, and a vocabulary of another size with other ids; it answers in words",
        {
            "hidden_size": 128, "intermediate_size": 256, "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        rows=1024,
        words=(
            "The", " the", " is", " What", " Who", "How much is", " plus",
            *_spaced(small_tasks.ANIMALS), *_spaced(small_tasks.COLOURS), *_spaced(small_tasks.NUMBERS),
            *_spaced(tuple(ENGLISH.split())),
        ),
        tied=False,
        special_first=True,
        cycles=(450,),
    ),
    "heads": Recipe(
        "as many linear key heads as value heads, as in the 0.8B, and pictures; it reads glyphs and their colours",
        {
            "hidden_size": 128, "intermediate_size": 256, "layer_types": [LINEAR, FULL, LINEAR, FULL],
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
            "linear_num_key_heads": 4, "linear_num_value_heads": 4,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        rows=352,
        words=("Read", "What colour is", " What colour is", *_spaced(small_tasks.CAPITALS), *_spaced("TUX"),
               *_spaced(tuple(small_tasks.INKS))),
        vision={"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3},
        vision_steps=300,
        cycles=(600, 600, 600),
    ),
}  # fmt: skip
