"""How much a bundle is judged on: the written rule, by the size of the model.

The larger the model, the fewer tokens, so that a validated export ends in minutes: 0.8B within 8 on ONNX and ExecuTorch
and 20 on emulated Core ML, 2B within 20 and 45. What a token costs is the weights of the decoder with the rows of its
head, read once: on the host for decode steps of the bundle, in float32 for the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.checkpoint.weights import Weights

STEPWISE = 256
"""Most tokens that a model which is not small is decoded one by one in one run; the others go in by chunks."""


@dataclass(frozen=True)
class Amounts:
    """Of the parts of L3. Nothing of what is 0."""

    probe: int = 0
    """Tokens of text beside the two pictures of the probe."""
    drift: int = 0
    """Decode steps at the end of a full cache. Twice as many for a small model whose states are kept in float16."""
    chats: int = 0
    """Conversations that are answered."""
    positions: int = 0
    """Scored positions of answers, of the bundle's and of the reference's each: what each chat has its share of."""

    steps: int = STEPWISE
    """Tokens of the probe that are decoded one by one at most, the last ones; the others go in by chunks."""

    @property
    def share(self) -> int:
        """Positions of one chat, and the longest answer."""
        return -(-self.positions // max(1, self.chats))


SMALL = 100_000_000
RULE: tuple[tuple[float, Amounts], ...] = (
    (SMALL, Amounts(probe=160, drift=512, chats=20, positions=520)),
    (1_200_000_000, Amounts(probe=64, drift=STEPWISE, chats=16, positions=256, steps=64)),
    (3_000_000_000, Amounts(probe=64, drift=128, chats=12, positions=144, steps=64)),
    (math.inf, Amounts(probe=64, drift=64, chats=8, positions=64, steps=64)),
)
"""Up to so many weights of the decoder with its head (0.8B: 0.75e9, 2B: 1.9e9, 4B: 4.2e9): these amounts."""


def amounts_for(weights: Weights) -> Amounts:
    """The amounts of the rule."""
    count = decoder_weights(weights)
    return next(amounts for most, amounts in RULE if count <= most)


def decoder_weights(weights: Weights) -> int:
    """Weights that one token meets: all of the decoder and the head, the head too where it is tied."""
    return sum(math.prod(p.shape) for name, p in weights.parameters.items() if name.startswith("decoder."))
