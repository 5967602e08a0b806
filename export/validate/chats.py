"""Conversations that a bundle answers for the ladder: `data/chats.json`, rendered by the checkpoint's own template.

System messages, tools and their results, thinking on and off, pictures, several turns. A template that refuses one
has one fewer, and its name is told; a tokenizer without a template continues passages of text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.chat.template import encode, has_template, render, render_text
from export.spec import ExportError
from export.validate.texts import DATA, passages

SUMS = 12
"""Further questions to a chat whose answers are short, behind those of its own."""
MARK = "answer-7391"
"""Stands for an answer, to see what the template writes behind one."""
PROMPT_SHARE = 2
"""A prompt takes at most this part of the context: the rest is for its answer."""


@dataclass(frozen=True)
class Chat:
    """A prompt: token ids with image tokens expanded, and its pictures [3, H, W] in 0…1."""

    name: str
    ids: list[int]
    images: list[NDArray[np.float32]] = field(default_factory=list)
    further: list[list[int]] = field(default_factory=list)
    """Turns of the user that follow short answers: token ids from behind an answer up to the next one. The first of
    them is that of the end of a turn, which an answer that stops ends with itself.
    """
    question: str = ""
    """What the user asks, in words, for the report."""


@dataclass(frozen=True)
class Chats:
    """What can be asked, and the names of what cannot, by reason."""

    asked: list[Chat]
    refused: list[str] = field(default_factory=list)
    """By the template."""
    blind: list[str] = field(default_factory=list)
    """About pictures, which the bundle or the template does not take."""
    long: list[str] = field(default_factory=list)
    """Longer than half of the context."""

    @property
    def notes(self) -> list[str]:
        """A sentence for each reason why conversations were left out."""
        reasons = (
            (self.refused, "the chat template refuses them"),
            (self.blind, "the bundle takes no pictures"),
            (self.long, f"they fill more than 1/{PROMPT_SHARE} of the context"),
        )
        return [f"Conversations left out because {why}: {', '.join(names)}." for names, why in reasons if names]


def load(tokenizer: Any, contract: Contract, pictures: Sequence[NDArray[np.float32]], count: int) -> Chats:
    """The first `count` conversations that can be asked, with `pictures` [3, H, W] for their places, in turn."""
    found = Chats([])
    if not has_template(tokenizer):
        texts = [text.strip() for text in passages()]
        asked = (Chat(f"passage {n}", encode(tokenizer, text), question=text) for n, text in enumerate(texts))
        return Chats([c for c in asked if len(c.ids) <= contract.context_length // PROMPT_SHARE][:count])
    tools = json.loads((DATA / "tools.json").read_text(encoding="utf-8"))
    for entry in json.loads((DATA / "chats.json").read_text(encoding="utf-8")):
        name, places = entry["name"], _places(entry["messages"])
        if places and not (pictures and contract.image_sizes and contract.takes_pictures):
            found.blind.append(name)
            continue
        options: dict[str, Any] = {"tools": [tools[n] for n in entry["tools"]]} if "tools" in entry else {}
        try:
            ids = render(tokenizer, entry["messages"], enable_thinking=entry.get("thinking", False), **options)
        except ExportError:  # a Refusal, or a template that fails on what it does not know: tools, system, lists
            found.refused.append(name)
            continue
        images = [pictures[n % len(pictures)] for n in range(places)]
        ids = expand(ids, images, contract)
        if len(ids) > contract.context_length // PROMPT_SHARE:
            found.long.append(name)
        elif len(found.asked) < count:
            questions = [*entry.get("further", ()), *sums(len(found.asked))]
            further = further_turns(tokenizer, questions)
            found.asked.append(Chat(name, ids, images, further, _question(entry["messages"])))
    return found


def further_turns(tokenizer: Any, questions: Sequence[str]) -> list[list[int]]:
    """What the template writes between an answer and the answer to each of the questions; nothing where it refuses."""
    turns = []
    for question in questions:
        messages = [("user", "Hello"), ("assistant", MARK), ("user", question)]
        try:
            text = render_text(
                tokenizer, [{"role": role, "content": content} for role, content in messages], enable_thinking=False
            )
        except ExportError:
            return []
        if MARK not in text:
            return []
        turns.append(encode(tokenizer, text.rpartition(MARK)[2]))
    return turns


def sums(seed: int) -> list[str]:
    """Sums and differences of two-digit numbers: questions that any model of language has an idea of."""
    random = np.random.default_rng([5, seed])
    pairs = random.integers(10, 100, (SUMS, 2))
    return [f"{a}+{b}=?" if n % 2 else f"{max(a, b)}-{min(a, b)}=?" for n, (a, b) in enumerate(pairs)]


def expand(ids: Sequence[int], images: Sequence[NDArray[Any]], contract: Contract) -> list[int]:
    """Each image token as often as its picture [3, H, W], of one of the bundle's sizes, has tokens."""
    side = contract.pixels_per_token
    counts = iter([(image.shape[1] // side) * (image.shape[2] // side) for image in images])
    expanded: list[int] = []
    for token in ids:
        expanded += [token] * (next(counts) if token == contract.image_token_id else 1)
    return expanded


def _question(messages: Sequence[dict[str, Any]]) -> str:
    """The text of the user's turns, one a line; what was answered and what tools said is left out."""
    contents = [m["content"] for m in messages if m["role"] == "user"]
    texts = [c if isinstance(c, str) else " ".join(i["text"] for i in c if i["type"] == "text") for c in contents]
    return "\n".join(texts)


def _places(messages: Sequence[dict[str, Any]]) -> int:
    contents = [m["content"] for m in messages if not isinstance(m["content"], str)]
    return sum(item["type"] == "image" for items in contents for item in items)
