"""The tokens that end an answer: the union of what generation_config, config, tokenizer and template say.

No single file is enough. The published small checkpoints have no generation_config.json and their config.json
names <|endoftext|> only; the token that ends a turn is known to the tokenizer, and always to the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.chat.template import encode, has_template, render_text
from export.checkpoint.base import Checkpoint, CheckpointError, read_json
from export.spec import ExportError

GENERATION = "generation_config.json"
PUBLISHED = (248046, 248044)
"""<|im_end|> and <|endoftext|> of the published vocabulary, for weights that come without a tokenizer."""
MARK = "lighthouse"
"""An answer whose end can be found again in a rendered conversation."""


@dataclass
class Stops:
    """Stop tokens in a stable order, each with the sources that name it, and whole sentences for the user."""

    sources: dict[int, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return list(self.sources)

    def add(self, token: int, source: str) -> None:
        named = self.sources.setdefault(token, [])
        if source not in named:
            named.append(source)


def find_stops(
    checkpoint: Checkpoint, rows: int, tokenizer: Any | None = None, real: Mapping[int, str] | None = None
) -> Stops:
    """The stop tokens of a checkpoint, the one that ends a turn first.

    Args:
        rows: of the embedding. tokenizer: of the checkpoint, with its chat template if it has one; without a
            tokenizer the published stops count as well, where they have a row. real: token by id, with a tokenizer.

    Raises:
        ExportError: a damaged generation_config.json, or a tokenizer and no stop token anywhere.
    """
    stops = Stops()
    real = real or {}
    if tokenizer is None:
        for token in PUBLISHED:
            if token < rows:
                stops.add(token, "the published vocabulary")
    elif has_template(tokenizer):
        end = end_of_turn(tokenizer)
        if end is None:
            stops.notices.append("the chat template ends an answer with no special token; the other stop tokens remain")
        else:
            _add(stops, end, "the template", rows, real)
    for source, value in _named(checkpoint, tokenizer):
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            _add(stops, token, source, rows, real)
    if tokenizer is None:
        return stops
    if not stops.sources:
        raise CheckpointError(
            f"no stop token is known: neither {GENERATION}, config.json, the tokenizer nor the chat template names one "
            "of the vocabulary, and generation would never stop; set eos_token in tokenizer_config.json"
        )
    listed = [f"{real[token]} ({token}, named by {_and(named)})" for token, named in stops.sources.items()]
    stops.notices.append(f"an answer stops at {_and(listed)}")
    return stops


def _named(checkpoint: Checkpoint, tokenizer: Any | None) -> Iterator[tuple[str, Any]]:
    """Source and value of every eos_token_id."""
    if tokenizer is not None:
        yield "the tokenizer", tokenizer.eos_token_id
    path = checkpoint.sidecar(GENERATION)
    if path is not None:
        yield GENERATION, read_json(path).get("eos_token_id")
    text = checkpoint.config.get("text_config")
    for section in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        yield "config.json", section.get("eos_token_id")


def _add(stops: Stops, token: Any, source: str, rows: int, real: Mapping[int, str]) -> None:
    """Add a stop token, or a notice if it cannot be one."""
    if type(token) is not int:
        problem = "it must be a token id, or a list of them"
    elif not 0 <= token < rows:
        problem = f"the embedding has rows 0 to {rows - 1}"
    elif real and token not in real:
        problem = "the tokenizer has no such token"
    else:
        stops.add(token, source)
        return
    stops.notices.append(f"{source} has eos_token_id {token!r}, which is ignored: {problem}")


def end_of_turn(tokenizer: Any) -> int | None:
    """The first special token after the content of an answer, as the template renders it; None if there is none."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARK}]
    try:
        text = render_text(tokenizer, messages, generation_prompt=False)
    except ExportError:
        return None  # a template for single questions
    tail = text[text.rindex(MARK) + len(MARK) :] if MARK in text else ""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in encode(tokenizer, tail) if token in special), None)


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
