"""Prompts that a bundle can make of itself: a chat rendered by its own template, with a picture where it takes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.chat.template import encode, has_template, load_tokenizer, render
from export.validate import texts
from export.validate.chats import expand
from export.validate.probe import picture

QUESTION = "What is written here, in which colours, and how many letters are there? Answer in one sentence."
RANDOM_TOKENS = 32
"""Of a bundle without a tokenizer, whose weights are random too."""
TEXT_TOKENS = 128
"""Of the passages."""
SEED = 0


@dataclass(frozen=True)
class Example:
    """A prompt: token ids with image tokens expanded, and its pictures [3, H, W] in 0…1."""

    ids: list[int]
    images: list[NDArray[np.float32]] = field(default_factory=list)


def examples(folder: Path, manifest: Mapping[str, Any], *, passages: bool = False) -> list[Example]:
    """A question without a picture and, where the bundle takes pictures, one for each size, as far as they fit.

    A bundle without a tokenizer (random weights) gets random ids from a fixed seed, without a template the bare text.

    Args:
        passages: begin with text of all kinds, for who has no probe, which needs the checkpoint's config.

    Raises:
        ExportError: the tokenizer or the template fails.
    """
    contract = Contract.of(manifest)
    random = np.random.default_rng(SEED)
    if not (folder / "tokenizer.json").exists():
        rows = next(s["table"]["rows"] for s in manifest["signatures"]["embed"]["stages"] if "table" in s)
        allowed = [i for i in range(rows) if i != contract.image_token_id]
        count = min(RANDOM_TOKENS, contract.context_length - 1)
        return [Example([int(i) for i in random.choice(allowed, count)])]
    tokenizer = load_tokenizer(folder)
    room = contract.context_length - 1
    found = [Example(texts.text(tokenizer)[: min(TEXT_TOKENS, room)])] if passages else []
    if not has_template(tokenizer):
        return [*found, Example(encode(tokenizer, QUESTION)[:room])]
    found += [Example(render(tokenizer, [{"role": "user", "content": QUESTION}]))]
    for height, width in contract.image_sizes if contract.takes_pictures else ():
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        ids = render(tokenizer, [{"role": "user", "content": content}])
        image = picture(random, height, width)
        found.append(Example(expand(ids, [image], contract), [image]))
    return [each for each in found if len(each.ids) <= room]
