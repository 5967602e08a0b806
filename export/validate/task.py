"""The task of the tiny checkpoint: data, and exact-match accuracy for any runner.

Four skills, each answered in a few tokens: reading glyphs from a picture, naming an object by its place,
recalling a value from up to three prefill chunks back (in the same turn or a turn later), and two-digit
arithmetic. Everything is drawn from a seed; training uses seeds below HELD_OUT, evaluation those from it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.sizes import shipped_tiny

HELD_OUT = 2**40
IMAGE_SIZES = ((64, 64), (64, 96), (96, 64))
GLYPHS = "ACEFHJKLPTUX3479"
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.1),
    "white": (0.97, 0.97, 0.97),
    "purple": (0.6, 0.1, 0.75),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MAX_PAIRS = 44
"""44 pairs of 4 tokens: the first lies 176 tokens and the question's own before the answer."""

WITHOUT_PICTURE = ("recall", "arithmetic")
LONGEST = 320
"""Tokens of context that every task fits in, with its answer."""

# 5×7 bitmaps, one row per number, most significant bit left.
FONT = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "9": (14, 17, 17, 15, 1, 2, 12),
}

Picture = NDArray[np.float32]
Generate = Callable[[list[Picture], list[int]], list[int]]


@dataclass(frozen=True)
class Sample:
    """One conversation and its expected answer."""

    images: list[Picture]
    messages: list[dict[str, Any]]
    answer: str


def _ask(text: str, image: bool = False) -> dict[str, Any]:
    if not image:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def draw_glyphs(text: str, size: tuple[int, int], random: np.random.Generator) -> Picture:
    """A string of 5×7 glyphs, three pixels a dot, at a random place on a dim background: [H, W, 3]."""
    height, width = size
    ground, ink = random.uniform(0, 0.35, 3), random.uniform(0.65, 1.0, 3)
    picture = np.tile(ground, (height, width, 1))
    dot = 3
    span = len(text) * 6 * dot - dot
    left = int(random.integers(1, max(2, width - span)))
    top = int(random.integers(1, height - 7 * dot))
    for place, glyph in enumerate(text):
        for row, bits in enumerate(FONT[glyph]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    y, x = top + row * dot, left + (place * 6 + column) * dot
                    picture[y : y + dot, x : x + dot] = ink
    return (picture + random.normal(0, 0.02, picture.shape)).clip(0, 1).astype(np.float32)


def draw_objects(objects: dict[str, tuple[str, str]], size: tuple[int, int], random: np.random.Generator) -> Picture:
    """Objects (colour, shape) in quarters of a dark picture [H, W, 3]."""
    height, width = size
    picture = np.tile(random.uniform(0, 0.2, 3), (height, width, 1))
    y, x = np.mgrid[0:height, 0:width]
    for place, (colour, shape) in objects.items():
        radius = random.uniform(9, 13)
        centre_y = (0.25 if "top" in place else 0.75) * height + random.uniform(-2, 2)
        centre_x = (0.25 if "left" in place else 0.75) * width + random.uniform(-2, 2)
        dy, dx = y - centre_y, x - centre_x
        inside = {
            "circle": dy**2 + dx**2 < radius**2,
            "square": np.maximum(abs(dy), abs(dx)) < 0.85 * radius,
            "triangle": (abs(dx) < 0.6 * (dy + radius)) & (abs(dy) < radius),
            "cross": (np.minimum(abs(dy), abs(dx)) < 0.3 * radius) & (np.maximum(abs(dy), abs(dx)) < radius),
        }[shape]
        picture[inside] = COLOURS[colour]
    return (picture + random.normal(0, 0.02, picture.shape)).clip(0, 1).astype(np.float32)


def glyphs(random: np.random.Generator, size: tuple[int, int]) -> Sample:
    text = "".join(random.choice(list(GLYPHS), int(random.integers(2, 4))))
    return Sample([draw_glyphs(text, size, random)], [_ask("Read.", True)], text)


def objects(random: np.random.Generator, size: tuple[int, int]) -> Sample:
    places = random.permutation(PLACES)[: int(random.integers(2, 5))]
    scene = {str(p): (str(random.choice(list(COLOURS))), str(random.choice(SHAPES))) for p in places}
    asked = str(random.choice(places))
    picture = draw_objects(scene, size, random)
    return Sample([picture], [_ask(f"What is {asked}?", True)], " ".join(scene[asked]))


def recall(random: np.random.Generator, size: tuple[int, int], pairs: int | None = None) -> Sample:
    count = int(random.integers(4, MAX_PAIRS + 1)) if pairs is None else pairs
    keys = random.permutation(list(KEYS))[:count]
    values = [f"{int(v):02d}" for v in random.integers(0, 100, count)]
    asked = int(random.integers(count))
    listing = "Keep" + "".join(f" {k}={v}" for k, v in zip(keys, values, strict=True)) + "."
    question = f"What is {keys[asked]}?"
    if random.random() < 0.5:
        messages = [_ask(listing), {"role": "assistant", "content": "OK"}, _ask(question)]
    else:
        messages = [_ask(f"{listing} {question}")]
    return Sample([], messages, values[asked])


def arithmetic(random: np.random.Generator, size: tuple[int, int]) -> Sample:
    a, b = int(random.integers(0, 100)), int(random.integers(0, 100))
    if random.random() < 0.5:
        return Sample([], [_ask(f"{a}+{b}=?")], str(a + b))
    return Sample([], [_ask(f"{max(a, b)}-{min(a, b)}=?")], str(max(a, b) - min(a, b)))


TASKS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Sample]] = {
    "glyphs": glyphs,
    "objects": objects,
    "recall": recall,
    "arithmetic": arithmetic,
}


def sample(task: str, seed: int) -> Sample:
    """Sample number `seed` of a task; the same on every machine."""
    random = np.random.default_rng([sorted(TASKS).index(task), seed])
    size = IMAGE_SIZES[int(random.integers(len(IMAGE_SIZES)))]
    return TASKS[task](random, size)


def expand(ids: Sequence[int], images: Sequence[Picture], image_token_id: int) -> list[int]:
    """Repeat each image token once per 32×32 pixels of its picture."""
    result: list[int] = []
    pictures = iter(images)
    for token in ids:
        count = 1
        if token == image_token_id:
            height, width, _ = next(pictures).shape
            count = (height // 32) * (width // 32)
        result += [token] * count
    return result


def evaluate(
    generate: Generate,
    tokenizer: Any = None,
    *,
    samples: int = 100,
    seed: int = HELD_OUT,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, float]:
    """Share of exact answers per task.

    Args:
        generate: (pictures [H, W, 3] in 0…1, prompt ids with image tokens expanded) -> new ids without the
        stop token. tokenizer: transformers' tokenizer; by default that of the shipped checkpoint. samples: per
        task, from seed on.
    """
    if tokenizer is None:
        from export.chat.template import load_tokenizer

        tokenizer = load_tokenizer(shipped_tiny())
    scores = {}
    for task in tasks:
        right = 0
        for number in range(samples):
            case = sample(task, seed + number)
            answer = tokenizer.decode(generate(case.images, prompt(case, tokenizer)), skip_special_tokens=True)
            right += answer.strip() == case.answer
        scores[task] = right / samples
    return scores


def prompt(case: Sample, tokenizer: Any) -> list[int]:
    """Token ids of a sample's conversation up to the answer, image tokens expanded."""
    from export.chat.template import render

    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return expand(render(tokenizer, case.messages, enable_thinking=False), case.images, image_token)


def text(tokenizer: Any, tokens: int, seed: int = HELD_OUT) -> list[int]:
    """At least `tokens` ids of answered conversations without pictures: words the model knows, for probes."""
    ids: list[int] = []
    for number in range(tokens):
        if len(ids) >= tokens:
            break
        case = sample(WITHOUT_PICTURE[number % 2], seed + number)
        ids += prompt(case, tokenizer) + tokenizer(f"{case.answer}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return ids
