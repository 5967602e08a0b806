"""Choosing the next token from logits: which ids may be chosen at all, and by what rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.spec import UsageError

Sampler = Callable[[NDArray[Any]], int]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    Raises:
        UsageError: a value outside its range, with the option's name.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # a NaN fails as well
            raise UsageError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be 0 to {MAX_SEED}")

    def sampler(self) -> Sampler:
        """A function logits [V] -> token id, with its own random generator."""
        if self.temperature == 0:
            return greedy
        random = np.random.default_rng(self.seed)

        def sample(logits: NDArray[Any]) -> int:
            ids, p = distribution(logits, self.temperature, self.top_k, self.top_p)
            return int(random.choice(ids, p=p))

        return sample


def masked(logits: NDArray[Any], num_tokens: int | None, never: Sequence[int]) -> NDArray[Any]:
    """A copy of logits [..., V] with minus infinity where no sampler may choose.

    Args:
        num_tokens: ids from this one on are rows of the embedding without a token; None: every row has one.
        never: other ids that are no answer, such as the placeholders of pictures.
    """
    result = logits.copy()
    if num_tokens is not None:
        result[..., num_tokens:] = -np.inf
    result[..., [token for token in never if token < logits.shape[-1]]] = -np.inf
    return result


def greedy(logits: NDArray[Any]) -> int:
    return int(np.argmax(logits))


def distribution(
    logits: NDArray[Any], temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids, most probable first, and their probabilities after temperature, top-k and top-p.

    Top-p keeps the smallest set whose probability reaches top_p (Holtzman et al. 2019, arXiv:1904.09751).
    """
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    keep = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    p = p[:keep] / p[:keep].sum()
    return order[:keep], p
