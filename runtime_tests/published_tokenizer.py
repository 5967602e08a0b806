"""A tokenizer of the published size and layout, made from a seed: for tests that depend on size, not on words.

A byte-level BPE of 248,077 entries: 256 bytes, 247,788 merges, 33 added tokens from 248,044 on. The merges are
frequent letters and syllables first, then whole characters of other scripts, so that ordinary text becomes a few
tokens a word. Pre-tokenizer, normalizer and decoder are those of transformers' Qwen3_5Tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

FIRST_ADDED = 248_044
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
FILL = tuple(f"<|fill_{number}|>" for number in range(7))
"""Of the published added tokens only the first 26 are known."""
ADDED = (*SPECIAL, *PLAIN, *FILL)
NUM_TOKENS = FIRST_ADDED + len(ADDED)
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
"""English letters, the most frequent first."""
SEED = 20251125


def folder() -> Path:
    """The tokenizer's folder under out/, made by the first test that asks; safe with several test processes."""
    out = Path(__file__).parents[1] / "out"
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    final = out / f"published_tokenizer-{key}"
    if not final.exists():
        out.mkdir(exist_ok=True)
        mine = Path(tempfile.mkdtemp(prefix="published_tokenizer.", dir=out))
        write(mine)
        try:
            mine.rename(final)
        except OSError:  # another process was faster
            shutil.rmtree(mine)
    return final


def write(place: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    (place / "tokenizer.json").write_text(json.dumps(document(), ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 262_144,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def document() -> dict[str, Any]:
    """Content of tokenizer.json."""
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    signs = byte_signs()
    vocabulary = {signs[byte]: number for number, byte in enumerate(sorted(signs, key=lambda b: ord(signs[b])))}
    merges: list[tuple[str, str]] = []
    for left, right in candidates(signs):
        if len(vocabulary) == FIRST_ADDED:
            break
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": FIRST_ADDED + number,
                "content": content,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": content in SPECIAL,
            }
            for number, content in enumerate(ADDED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token"), None),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def byte_signs() -> dict[int, str]:
    """The printable sign of every byte, as in GPT-2: itself where it is visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


def candidates(signs: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Merges in order of rank; the parts of each are bytes or results of earlier ones."""
    space, newline = signs[ord(" ")], signs[ord("\n")]
    draw = random.Random(SEED)
    rank = {letter: number for number, letter in enumerate(LETTERS)}
    # The product of two ranks orders pairs about as their frequencies would.
    pairs = sorted(product(LETTERS, LETTERS), key=lambda p: ((rank[p[0]] + 1) * (rank[p[1]] + 1), p))
    syllables = [a + b for a, b in pairs]
    order = {syllable: number for number, syllable in enumerate(syllables)}
    triples = sorted(product(LETTERS, LETTERS, LETTERS), key=lambda t: (sum(rank[letter] for letter in t), t))
    yield from pairs
    yield from ((a.upper(), b) for a, b in pairs)
    yield from ((a.upper(), b.upper()) for a, b in pairs)
    yield from ((space, letter) for letter in chain(LETTERS, LETTERS.upper()))
    yield from ((space, syllable) for syllable in chain(syllables, (s.capitalize() for s in syllables)))
    for width in (1, 2, 4, 8, 16, 32):
        yield space * width, space * width
        yield newline * width, newline * width
    yield from ((sign, sign) for sign in "=-_*#./<>!?")
    yield from ((space, sign) for sign in "=-+*/<>([{\"'&|#$@")
    yield from _characters(signs)
    for a, b, c in triples:  # of two ways to three letters, the one whose pair comes first is taken in a text
        yield (a + b, c) if order[a + b] < order[b + c] else (a, b + c)
    yield from ((space, a + b + c) for a, b, c in triples)
    yield from ((a.upper(), b + c) for a, b, c in triples)
    yield from product((space + s for s in syllables[:300]), syllables[:100])
    yield from product(syllables[:200], syllables[:200])
    while True:  # longer pieces, to fill
        first, second, third = (draw.choice(syllables[:400]) for _ in range(3))
        yield first, second
        yield first + second, third
        yield space + first, second
        yield space + first + second, third


def _characters(signs: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Whole characters of two, three and four bytes in UTF-8, most scripts in use."""
    ranges = ((0xA0, 0x700), (0x900, 0xE00), (0xE00, 0xE80), (0x2000, 0x2C00), (0x3000, 0x3400))
    wide = ((0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xFF00, 0xFFF0), (0x1F300, 0x1FA00))
    for low, high in (*ranges, *wide):
        for number in range(low, high):
            encoded = [signs[byte] for byte in chr(number).encode()]
            for length in range(1, len(encoded)):
                yield "".join(encoded[:length]), encoded[length]
