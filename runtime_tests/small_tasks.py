"""The tasks of the small trained checkpoints in checkpoints/small: data, and exact-match accuracy for any runner.

Each checkpoint has tasks of its own, in chat form, answered in a few tokens. Everything is drawn from a seed: training
uses seeds below HELD_OUT, evaluation those from it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.validate.task import FONT, HELD_OUT, Generate, Picture, Sample, prompt

SMALL = Path(__file__).parents[1] / "checkpoints" / "small"
IMAGE_SIZES = ((64, 64), (64, 96))
"""Height and width of the pictures of `heads`, cells of 32×32 pixels: one image token each."""
LONGEST = 128
"""Tokens of context that every task fits in, with its answer."""

Draw = Callable[[np.random.Generator], Sample]
CAPITALS = "ABCDEFGHIJKLMNOP"
INKS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.1, 0.75, 0.2),
    "blue": (0.25, 0.35, 0.95),
    "white": (0.97, 0.97, 0.97),
}
GLYPHS = "ACEHLTUX"
ANIMALS = ("cat", "dog", "horse", "sheep", "mouse", "goat", "bear", "fox")
COLOURS = ("red", "green", "blue", "black", "white", "brown", "grey", "golden")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip


def folder(name: str) -> Path:
    """Where the checkpoint `name` (a key of TASKS) lies."""
    return SMALL / name


def ask(question: str, answer: str, picture: Picture | None = None) -> Sample:
    content: Any = question
    if picture is not None:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    return Sample([] if picture is None else [picture], [{"role": "user", "content": content}], answer)


def digits(random: np.random.Generator, least: int, most: int) -> str:
    return "".join(str(d) for d in random.integers(0, 10, int(random.integers(least, most + 1))))


def reverse(random: np.random.Generator) -> Sample:
    text = digits(random, 3, 6)
    return ask(f"Reverse {text}.", text[::-1])


def ordered(random: np.random.Generator) -> Sample:
    text = digits(random, 3, 6)
    return ask(f"Sort {text}.", "".join(sorted(text)))


def recall(random: np.random.Generator) -> Sample:
    """Two to five letters with a colour each; one of them. The answer is that of "ink", from text instead."""
    letters = random.permutation(list(CAPITALS))[: int(random.integers(2, 6))]
    story = [f"{letter} is {random.choice(list(INKS))}" for letter in letters]
    asked = int(random.integers(len(letters)))
    return ask(f"{'. '.join(story)}. What colour is {letters[asked]}?", story[asked])


def repeat(random: np.random.Generator) -> Sample:
    """Three to seven letters."""
    letters = " ".join(random.permutation(list(CAPITALS))[: int(random.integers(3, 8))])
    return ask(f"Repeat {letters}.", letters)


def alphabet(random: np.random.Generator) -> Sample:
    """Three to six letters in order."""
    letters = random.permutation(list(CAPITALS))[: int(random.integers(3, 7))]
    return ask(f"Order {' '.join(letters)}.", " ".join(sorted(letters)))


def colours(random: np.random.Generator) -> Sample:
    """Two to four sentences; one of them."""
    number = int(random.integers(2, 5))
    animals, hues = random.permutation(ANIMALS)[:number], random.permutation(COLOURS)[:number]
    story = [f"The {animal} is {hue}." for animal, hue in zip(animals, hues, strict=True)]
    asked = int(random.integers(number))
    return ask(f"{' '.join(story)} What is the {animals[asked]}?", story[asked])


def words(random: np.random.Generator) -> Sample:
    """A sum in words."""
    a, b = int(random.integers(10)), int(random.integers(10))
    told = f"{NUMBERS[a]} plus {NUMBERS[b]}"
    return ask(f"How much is {told}?", f"{told} is {NUMBERS[a + b]}")


Cells = list[tuple[str, str]]
"""(glyph, colour) of every cell of a picture, row by row."""


def cells(random: np.random.Generator, size: tuple[int, int]) -> tuple[Picture, Cells]:
    """A picture [H, W, 3] with one coloured glyph in every cell of 32×32 pixels."""
    height, width = size
    number = height * width // 32**2
    glyphs, inks = random.permutation(list(GLYPHS))[:number], random.choice(list(INKS), number)
    picture = np.tile(random.uniform(0, 0.15, 3), (height, width, 1))
    for place, (glyph, ink) in enumerate(zip(glyphs, inks, strict=True)):
        row, column = divmod(place, width // 32)
        top = 32 * row + int(random.integers(2, 9))
        left = 32 * column + int(random.integers(2, 15))
        bits = np.array([[line >> (4 - x) & 1 for x in range(5)] for line in FONT[glyph]], bool)
        picture[top : top + 21, left : left + 15][np.kron(bits, np.ones((3, 3), bool))] = INKS[ink]
    noisy = (picture + random.normal(0, 0.02, picture.shape)).clip(0, 1).astype(np.float32)
    return noisy, [(str(g), str(i)) for g, i in zip(glyphs, inks, strict=True)]


def about(task: str, found: Cells, random: np.random.Generator) -> tuple[str, str]:
    """A question of "read" or "ink" about a picture, and its answer."""
    if task == "read":
        return "Read.", " ".join(glyph for glyph, _ in found)
    glyph, colour = found[int(random.integers(len(found)))]
    return f"What colour is {glyph}?", f"{glyph} is {colour}"


def pictured(task: str) -> Draw:
    """How a sample of "read" or "ink" is drawn."""

    def draw(random: np.random.Generator) -> Sample:
        picture, found = cells(random, IMAGE_SIZES[int(random.integers(len(IMAGE_SIZES)))])
        return ask(*about(task, found, random), picture)

    return draw


TASKS: dict[str, dict[str, Draw]] = {
    "text": {"reverse": reverse, "sort": ordered},
    "wide": {"repeat": repeat, "order": alphabet},
    "untied": {"colours": colours, "words": words},
    "heads": {"read": pictured("read"), "ink": pictured("ink"), "recall": recall},
}
"""Checkpoint -> task -> how a sample is drawn."""


def sample(name: str, task: str, seed: int) -> Sample:
    """Sample number `seed` of a checkpoint's task; the same on every machine."""
    return TASKS[name][task](np.random.default_rng([sorted(TASKS[name]).index(task), seed]))


def evaluate(
    name: str,
    generate: Generate,
    tokenizer: Any,
    *,
    samples: int = 100,
    seed: int = HELD_OUT,
    tasks: Sequence[str] | None = None,
) -> dict[str, float]:
    """Share of exact answers per task of a checkpoint.

    Args:
        generate: as in `export.validate.task.evaluate`. tokenizer: the checkpoint's. samples: per task, from seed on.
        tasks: all of the checkpoint's by default.
    """
    scores = {}
    for task in TASKS[name] if tasks is None else tasks:
        right = 0
        for number in range(samples):
            case = sample(name, task, seed + number)
            answer = tokenizer.decode(generate(case.images, prompt(case, tokenizer)), skip_special_tokens=True)
            right += answer.strip() == case.answer
        scores[task] = right / samples
    return scores


def text(name: str, tokenizer: Any, tokens: int, seed: int = HELD_OUT) -> list[int]:
    """At least `tokens` ids of answered conversations without pictures: words the model knows, for probes."""
    drawn = {task: draw for task, draw in TASKS[name].items() if not sample(name, task, seed).images}
    ids: list[int] = []
    number = seed
    while len(ids) < tokens:
        case = sample(name, list(drawn)[number % len(drawn)], number)
        ids += prompt(case, tokenizer) + tokenizer(f"{case.answer}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        number += 1
    return ids
