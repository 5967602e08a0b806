"""Looking at every value that a bundle computes on the interpreter, in conversations with pictures, for the linter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.chat.conversation import Contract, Conversation
from targets.base import Prompt, Session
from targets.to_coreml.session import CoreMLSession

STEPS = 4
"""Tokens decoded after a prompt."""


@dataclass
class Extremes:
    """Of all results that one operation gave."""

    half: bool
    """Whether they are float16."""
    lowest: float = 0.0
    highest: float = 0.0
    broken: int = 0
    """Elements that were infinite or NaN; the others are counted in `lowest` and `highest`."""


Observed: TypeAlias = "dict[tuple[str, str], dict[str, Extremes]]"
"""(file, function) -> operation -> extremes of its results."""
Calls: TypeAlias = Callable[[Session], None]
"""A conversation: calls signatures of a session."""


class Observer:
    """Collects extremes; `place` says whose results come in."""

    def __init__(self) -> None:
        self.observed: Observed = {}
        self.place = ("", "")

    def __call__(self, name: str, kind: str, value: Tensor) -> None:
        """What the interpreter calls with each result."""
        if not value.dtype.is_floating_point or not value.numel():
            return
        seen = self.observed.setdefault(self.place, {})
        extremes = seen.setdefault(name, Extremes(value.dtype == torch.float16))
        low, high = (float(bound) for bound in torch.aminmax(value))
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = torch.isfinite(value)
            extremes.broken += int((~finite).sum())
            value = torch.where(finite, value, torch.zeros((), dtype=value.dtype))
            low, high = (float(bound) for bound in torch.aminmax(value))
        extremes.lowest, extremes.highest = min(extremes.lowest, low), max(extremes.highest, high)


class ObservedSession(CoreMLSession):
    """A session on the interpreter, on any system, whose observer knows which function runs."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int, observer: Observer) -> None:
        self._observer = observer
        super().__init__(folder, manifest, threads, observe=observer)

    def _run_graph(self, stage: Mapping[str, Any], values: dict[str, NDArray[Any]]) -> None:
        self._observer.place = stage["file"], stage["entry"]
        super()._run_graph(stage, values)


def observe(folder: Path, manifest: Mapping[str, Any], calls: Calls) -> Observed:
    """Run a bundle and return the extremes of every result.

    Raises:
        ExportError: a package cannot be read or run.
    """
    observer = Observer()
    session = ObservedSession(folder, manifest, torch.get_num_threads(), observer)
    try:
        calls(session)
    finally:
        session.close()
    return observer.observed


def conversations(
    manifest: Mapping[str, Any],
    prompts: Sequence[Prompt],
    pictures: Sequence[NDArray[Any]] = (),
    advance: Callable[[float], None] = lambda share: None,
) -> Calls:
    """Every prompt as an app feeds it, with a few tokens of an answer; the first one also by each prefill length alone,
    so that no function of a package goes unseen. Then the pictures [3, H, W] that stand in no prompt.

    Args:
        advance: is told what share of all that has been run, by tokens.
    """
    contract = Contract.of(manifest)
    alone: list[tuple[int, ...]] = [(length,) for length in contract.prefill_lengths]
    ways = [
        (prompt, lengths)
        for place, prompt in enumerate(prompts)
        for lengths in (alone if place == 0 and alone else [contract.prefill_lengths])
    ]
    shown = [picture.shape[1] * picture.shape[2] // contract.pixels_per_token**2 for picture in pictures]
    tokens = sum(len(prompt.ids) for prompt, _ in ways) + sum(shown)

    def calls(session: Session) -> None:
        for prompt, lengths in ways:
            images = [image.transpose(1, 2, 0) for image in prompt.images]
            conversation = Conversation(session, replace(contract, prefill_lengths=lengths))
            conversation.generate(prompt.ids, images, max_new_tokens=STEPS + 1, stop=())
            advance(len(prompt.ids) / tokens)
        for picture, count in zip(pictures, shown, strict=True):
            session.run(f"vision_{picture.shape[1]}x{picture.shape[2]}", {"image": picture[None]})
            advance(count / tokens)

    return calls
