"""Looking at every value of a short run of a bundle on the interpreter, for the linter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from targets.base import Arrays, Session
from targets.to_coreml.session import CoreMLSession

STEPS = 4
"""Tokens decoded after the prompt."""
SEED = 0


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


def observe(folder: Path, manifest: Mapping[str, Any], calls: Calls | None = None) -> Observed:
    """Run a bundle and return the extremes of every result; `calls` defaults to `short_run`.

    Raises:
        ExportError: a package cannot be read or run.
    """
    observer = Observer()
    session = ObservedSession(folder, manifest, torch.get_num_threads(), observer)
    try:
        (calls or short_run(manifest))(session)
    finally:
        session.close()
    return observer.observed


def short_run(manifest: Mapping[str, Any]) -> Calls:
    """One whole chunk of each prefill length that fits, a few tokens one by one, one picture of each size; all random
    from a fixed seed.
    """

    def calls(session: Session) -> None:
        random = np.random.default_rng(SEED)
        (width,) = {t["shape"][-1] for t in manifest["signatures"]["decode"]["inputs"] if t["name"] == "embeddings"}
        rows = next(s["table"]["rows"] for s in manifest["signatures"]["embed"]["stages"] if "table" in s)
        for height, breadth in manifest["image_sizes"]:
            picture = random.random((1, 3, height, breadth), np.float32)
            session.run(f"vision_{height}x{breadth}", {"image": picture})
        start = 0
        for tokens in (*_fitting(manifest), *[1] * STEPS):
            if start + tokens > manifest["context_length"]:
                break
            ids = random.integers(0, rows, (1, tokens), np.int64)
            embeddings = session.run("embed", {"input_ids": ids})["embeddings"].reshape(1, tokens, width)
            positions = np.broadcast_to(np.arange(start, start + tokens, dtype=np.int32), (3, tokens)).copy()
            inputs: Arrays = {
                "embeddings": embeddings,
                "position_ids": positions,
                "start": np.array([start], np.int32),
            }
            if tokens > 1:
                inputs["valid"] = np.array([tokens], np.int32)
            session.run("decode" if tokens == 1 else f"prefill_{tokens}", inputs)
            start += tokens

    return calls


def _fitting(manifest: Mapping[str, Any]) -> Iterable[int]:
    """Prefill lengths that leave room for the tokens after them, one after the other."""
    room = manifest["context_length"] - STEPS
    for tokens in sorted(manifest["prefill_lengths"]):
        if tokens <= room:
            room -= tokens
            yield tokens
