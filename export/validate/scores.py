"""Scores of a bundle's logits beside the reference's at many positions, and what a position weighs.

A position at which the reference itself does not know how to go on says little about a bundle: its logits there are
small differences of guesses, which rounding moves first. So it weighs exp(-H), H being the entropy of the reference's
distribution in nats: 1 where it is sure, 1/n where it hesitates between n tokens alike. Means over positions are
weighted so. A checkpoint may also be sure and wrong: on a text that it never learned it may do worse than somebody who
takes each of the V tokens for equally likely. It is `lost` there, and such a text judges nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from export.validate import metrics

BLOCK_VALUES = 2**23
"""Logits that are compared at once in float64: 64 MiB an array."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """One value for each scored position [N]."""

    kl: Floats
    """KL(reference ‖ bundle) in nats."""
    entropy: Floats
    """Of the reference, in nats."""
    loss_reference: Floats
    """-log p of the token that came, in nats; NaN where none came."""
    loss_bundle: Floats
    same: Floats
    """1 where both have the same best token."""
    tie: Floats
    """1 where they have not, and the reference's two best are closer than `metrics.NEAR_TIE`."""
    in_five: Floats
    """1 where the reference's best is among the bundle's five."""
    signal: Floats
    """Sum of squares of the reference's centred logits."""
    noise: Floats
    """Of the difference."""

    @classmethod
    def of(cls, reference: NDArray[np.float32], bundle: NDArray[np.float32], came: Sequence[int | None]) -> Scores:
        """From logits [N, V] of both, and the N tokens that came next (None: not known)."""
        blocks = [
            cls._block(reference[part], bundle[part], came[part]) for part in _blocks(len(came), reference.shape[-1])
        ]
        return cls.joined(blocks)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """All positions of all parts."""
        names = [f.name for f in fields(cls)]
        empty = np.zeros(0)
        return cls(*(np.concatenate([empty, *(getattr(part, name) for part in parts)]) for name in names))

    @classmethod
    def _block(cls, reference: NDArray[np.float32], bundle: NDArray[np.float32], came: Sequence[int | None]) -> Scores:
        p, q = metrics.log_softmax(reference), metrics.log_softmax(bundle)
        chances, wanted = np.exp(p), metrics.centred(reference)
        places = np.arange(len(came))
        tokens = np.asarray([0 if token is None else token for token in came])
        unknown = np.asarray([token is None for token in came])
        best = reference.argmax(-1)
        same = best == bundle.argmax(-1)
        k = min(5, bundle.shape[-1])
        five = np.argpartition(-bundle, k - 1, axis=-1)[:, :k]
        two = np.partition(reference, -2, axis=-1)[:, -2:].astype(np.float64)
        return cls(
            kl=np.maximum((chances * (p - q)).sum(-1), 0.0),
            entropy=-(chances * p).sum(-1),
            loss_reference=np.where(unknown, np.nan, -p[places, tokens]),
            loss_bundle=np.where(unknown, np.nan, -q[places, tokens]),
            same=same.astype(np.float64),
            tie=(~same & (two[:, 1] - two[:, 0] < metrics.NEAR_TIE)).astype(np.float64),
            in_five=(five == best[:, None]).any(-1).astype(np.float64),
            signal=(wanted**2).sum(-1),
            noise=((wanted - metrics.centred(bundle)) ** 2).sum(-1),
        )

    def __getitem__(self, part: slice) -> Scores:
        """Some positions."""
        return Scores(*(getattr(self, f.name)[part] for f in fields(self)))

    def __len__(self) -> int:
        return len(self.kl)

    @property
    def weights(self) -> Floats:
        """exp(-H) of each position."""
        return np.exp(-self.entropy)

    @property
    def certainty(self) -> float:
        """Mean weight: how much of what was scored the reference knows how to continue; 1 is all."""
        return float(self.weights.mean()) if len(self) else 0.0

    def mean(self, values: Floats, among: NDArray[np.bool_] | None = None) -> float:
        """Weighted mean over all positions, or some."""
        chosen = np.ones(len(self), bool) if among is None else among
        return float(np.average(values[chosen], weights=self.weights[chosen])) if chosen.any() else float("nan")

    @property
    def kl_mean(self) -> float:
        """Weighted."""
        return self.mean(self.kl)

    @property
    def top1(self) -> float:
        """Weighted share of decided positions with the same best token; near ties are ambiguous and left out."""
        decided = self.tie == 0
        return self.mean(self.same, decided) if decided.any() else 1.0

    @property
    def top5(self) -> float:
        """Weighted."""
        return self.mean(self.in_five)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise in dB, 10·log10(sum a² / sum (a-b)²) of centred logits, weighted."""
        noise = self.mean(self.noise)
        return float("inf") if noise == 0 else float(10 * np.log10(self.mean(self.signal) / noise))

    @property
    def perplexity_reference(self) -> float:
        """Of the tokens that came, unweighted."""
        return float(np.exp(np.nanmean(self.loss_reference)))

    @property
    def perplexity_bundle(self) -> float:
        """Of the same."""
        return float(np.exp(np.nanmean(self.loss_bundle)))

    def lost(self, vocabulary: int) -> bool:
        """Whether the reference's perplexity of the tokens that came is that of equal chances for all, or more."""
        return self.perplexity_reference >= vocabulary

    @property
    def loss_difference(self) -> float:
        """Bundle minus reference, weighted: the logarithm of the ratio of their perplexities."""
        return self.mean(self.loss_bundle - self.loss_reference, ~np.isnan(self.loss_reference))


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_VALUES // width)
    return (slice(start, start + step) for start in range(0, rows, step))
