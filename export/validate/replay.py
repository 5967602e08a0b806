"""Feeding a sequence to a session and comparing what comes out, states included, with a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import join_logits
from export.model import state
from export.model.config import ModelConfig
from export.validate import metrics, reference
from targets.base import Arrays, Session


def replay(
    session: Session,
    rows: NDArray[Any],
    positions: NDArray[Any],
    plan: list[tuple[int | None, int]],
    junk: float,
    *,
    reset: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> list[NDArray[np.float32]]:
    """Run a plan on a session; logits [V] after each call. Rows [T, D] are in the dtype of the bundle's embeddings.
    Padded ones are filled with `junk`, and where that is not zero they stand at nonsense positions.

    Args:
        advance: called behind each.
    """
    if reset:
        session.reset()
    results = []
    for first, length, valid in reference.pieces(len(rows), plan):
        size = length or 1
        chunk = np.full((1, size, rows.shape[1]), junk, rows.dtype)
        chunk[0, :valid] = rows[first : first + valid]
        places = np.full((3, size), 0 if junk == 0 else 54321, np.int32)
        places[:, :valid] = positions[:, first : first + valid]
        inputs = {"embeddings": chunk, "position_ids": places, "start": np.asarray([first], np.int32)}
        if length is not None:
            inputs["valid"] = np.asarray([valid], np.int32)
        outputs = session.run("decode" if length is None else f"prefill_{length}", inputs)
        results.append(join_logits(outputs))
        advance()
    return results


def image_embeddings(session: Session, pictures: list[NDArray[np.float32]]) -> list[NDArray[Any]]:
    """Image embeddings [N, D] of each picture, by the signature of its size."""
    return [
        session.run(f"vision_{p.shape[1]}x{p.shape[2]}", {"image": p[None]})["image_embeddings"][0] for p in pictures
    ]


def worst(expected: list[NDArray[Any]], got: list[NDArray[Any]]) -> float:
    return max(metrics.relative(a, b) for a, b in zip(expected, got, strict=True))


def canonical(config: ModelConfig, states: Mapping[str, NDArray[Any]]) -> Arrays:
    """A bundle's states in the shapes of `export.model.state`: no batch, conv [Ch, K-1], caches [Hkv, L, Dh]."""
    shapes = {s.name: s for s in state.layout(config.text, 1)}
    result: Arrays = {}
    for name, array in states.items():
        wanted = shapes[name]
        plain: NDArray[Any] = array.reshape(array.shape[-len(wanted.shape) :])
        if wanted.kind == "conv":  # the last K-1 inputs, where a target keeps more
            plain = (plain if plain.shape[0] == wanted.shape[0] else plain.T)[:, -wanted.shape[1] :]
        if wanted.kind in ("key", "value") and plain.shape[0] != wanted.shape[0]:
            plain = plain.swapaxes(0, 1)
        result[name] = plain
    return result


def state_errors(config: ModelConfig, truth: Arrays, states: Arrays, tokens: int) -> dict[str, float]:
    """Relative error of each state, its worst element; KV caches over the rows written so far."""
    return {name: metrics.relative(*pair) for name, pair in _written(truth, states, tokens)}


def state_noise(truth: Arrays, states: Arrays, tokens: int) -> dict[str, float]:
    """Power of the error of each state over its own; KV caches over the rows written so far."""
    return {name: metrics.noise(*pair) for name, pair in _written(truth, states, tokens)}


def _written(truth: Arrays, states: Arrays, tokens: int) -> Iterator[tuple[str, tuple[NDArray[Any], NDArray[Any]]]]:
    for name, expected in truth.items():
        rows = slice(None, tokens if name.startswith(("key", "value")) else None)
        yield name, (expected[:, rows], states[name][:, rows])
