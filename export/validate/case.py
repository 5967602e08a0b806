"""What the rungs are given and what they leave: a bundle with its checkpoint, and the outcome of one rung."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from export.chat.conversation import Contract, chunks
from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.pace import Pace
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.quantize.scale import StreamScale, scaled
from export.validate import dialogues, reference, rounding, teacher, transformers_model
from export.validate.amounts import STEPWISE, Amounts
from export.validate.chats import Chat
from export.validate.dialogues import Dialogue
from export.validate.gates import Check, failed
from export.validate.probe import Probe, make_probe, picture
from export.validate.transformers_model import Whole
from targets.base import Arrays, Target

CACHED = 8
"""Tokens at the end of the probe that the reference takes as in generation, so that its cache is used as well."""


@dataclass
class Rung:
    """Outcome of one rung: its checks, series for the plots of the report, and what a reader must know of them."""

    name: str
    checks: list[Check]
    series: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Whole sentences."""

    @property
    def status(self) -> str:
        return "FAIL" if failed(self.checks) else "PASS"

    def as_json(self) -> dict[str, Any]:
        checks = [c.as_json() for c in self.checks]
        return {"status": self.status, "checks": checks, "series": self.series, "notes": self.notes}


Known = dict[tuple[Hashable, ...], Any]
"""What was computed of a checkpoint and a probe, for the next bundle of the same checkpoint; see `Case.once`."""
Result = TypeVar("Result")


@dataclass
class Case:
    """One bundle (finished or still `.partial`) with the checkpoint it came from."""

    checkpoint: Checkpoint
    config: ModelConfig
    recipe: Recipe
    target: Target
    folder: Path
    manifest: Mapping[str, Any]
    threads: int
    tokens: int = 96
    """Length of the probe; the first half is prefilled, the rest decoded."""
    amounts: Amounts = field(default_factory=Amounts)
    """How much L3 reads and asks beside the probe; by default nothing."""
    gate_quality: bool = True
    """False for random weights, whose L3 says nothing about a real model."""
    task: Callable[[Any], dict[str, float]] | None = None
    """Task accuracy of a generate function, where the checkpoint has a task."""
    text: list[int] | None = None
    """Token ids that the probe and the run of L3 over a full context are made of; None: random ids."""
    familiar: bool = False
    """Whether that text is of the checkpoint's own task. It judges, though only the answers in it were ever learned."""
    chats: list[Chat] = field(default_factory=list)
    """Conversations that L3 has answered."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Token ids in words, for the report; None: it shows no answers."""
    known: Known = field(default_factory=dict)
    """Shared by the cases of several bundles of one checkpoint."""
    pace: Pace = field(default_factory=Pace)
    """Of the rung that is climbed."""

    def once(self, what: str, compute: Callable[[], Result], *depends: Hashable) -> Result:
        """`compute()`, or what it gave for another bundle: a result of the checkpoint, the probe, the pictures, and
        whatever else it depends on, but of no bundle.
        """
        key = (what, self._content, *depends)
        if key in self.known:
            self.pace.leave_out(what)
        else:
            self.known[key] = compute()
        found: Result = self.known[key]
        return found

    @cached_property
    def _content(self) -> Hashable:
        """Checkpoint, layers and everything it is fed, short."""
        digest = hashlib.sha256()
        for array in (np.asarray(self.probe.ids), self.probe.positions, *self.probe.images, *self.pictures):
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        return self.checkpoint.content_key(), self.config, digest.hexdigest()

    @property
    def floats(self) -> str:
        """Dtype of the bundle's activations."""
        return self.target.capabilities.floats

    @cached_property
    def weights(self) -> Weights:
        """As the bundle has them, before rounding."""
        return scaled(weights_for(self.checkpoint, self.config, self.recipe.conditioning), self.scale)

    @property
    def scale(self) -> StreamScale:
        """Of the bundle's residual streams."""
        return StreamScale.parse(self.manifest.get("quantization", {}).get("streams", {}))

    def to_stream(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """Rows [T, D] from transformers' embedding or vision tower as the bundle's residual stream has them."""
        return self.weights.to_stream(torch.from_numpy(rows)).numpy()

    @property
    def layers(self) -> int:
        """Of the decoder."""
        return self.config.text.num_hidden_layers

    @cached_property
    def noise(self) -> float:
        """What the recipe's rounding puts on the decoder's matrices, as a share of their power."""
        smallest = self.target.capabilities.smallest_scale
        return rounding.of_weights(Quantizer(self.weights, self.recipe, smallest))

    @cached_property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((h, w) for h, w in self.manifest["image_sizes"])

    @cached_property
    def prefill_lengths(self) -> tuple[int, ...]:
        return tuple(self.manifest["prefill_lengths"])

    @cached_property
    def probe(self) -> Probe:
        limit = min(self.tokens, int(self.manifest["context_length"]))
        return make_probe(self.config, limit, self.image_sizes, text=self.text)

    @cached_property
    def pictures(self) -> list[NDArray[np.float32]]:
        """One picture [3, H, W] for every image size of the bundle."""
        random = np.random.default_rng(2)
        return [picture(random, height, width) for height, width in self.image_sizes]

    @cached_property
    def pictures_in_chats(self) -> list[NDArray[np.float32]]:
        """Two pictures [3, H, W] of the bundle's first sizes, or none."""
        random = np.random.default_rng(3)
        return [picture(random, height, width) for height, width in (self.image_sizes * 2)[:2]]

    @cached_property
    def true_pictures(self) -> list[NDArray[np.float32]]:
        """transformers' image embeddings of `pictures`, as the bundle's stream has them."""
        return [self.to_stream(each) for each in self._seen[len(self.probe.images) :]]

    @cached_property
    def _seen(self) -> list[NDArray[np.float32]]:
        """transformers' image embeddings of the probe's pictures and of `pictures`."""
        return self.see("see", [*self.probe.images, *self.pictures])

    def see(self, what: str, pictures: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """transformers' image embeddings of pictures [3, H, W], computed once."""

        def compute() -> list[NDArray[np.float32]]:
            with self.pace.part(what, 1):
                return reference.hf_vision(self.checkpoint, self.config, pictures)

        return self.once(what, compute, *(image.tobytes() for image in pictures))

    @cached_property
    def plan(self) -> list[tuple[int | None, int]]:
        """Half of the probe or more in chunks, its last chunk padded, then one token at a time."""
        return make_plan(len(self.probe.ids), self.prefill_lengths, self.amounts.steps)

    @property
    def chunking_tokens(self) -> int:
        """Of the probe, that the bundle reads both by chunks and one by one."""
        return min(len(self.probe.ids), STEPWISE, 2 * self.amounts.steps)

    @cached_property
    def embedded(self) -> NDArray[np.float32]:
        """Rows [T, D] from transformers' embedding, vision tower and splicing."""

        def rows() -> NDArray[np.float32]:
            plain = reference.embed(self.checkpoint, self.probe.ids)
            images = self._seen[: len(self.probe.images)]
            return transformers_model.hf_splice(self.checkpoint, self.config, plain, self.probe.ids, images)

        return self.once("embedded", rows)

    @cached_property
    def true_positions(self) -> NDArray[np.int32]:
        """transformers' positions [3, T] of the probe; `probe.positions` are those of our own counter."""
        images = self.probe.images
        grid = transformers_model.pixels(self.checkpoint, self.config, images).grid if images else None
        return transformers_model.hf_positions(self.checkpoint, self.config, self.probe.ids, grid)

    @cached_property
    def truth(self) -> tuple[NDArray[np.float32], Arrays]:
        """transformers' fp32 logits [T, V] and final states on the probe. Its delta rule goes token by token: its
        chunks are the less exact of its two forms (docs/LOG.md) and would be most of the distance to ours. The last
        tokens come one at a time, through its cache.
        """
        fed = self.embedded, self.true_positions, max(1, len(self.probe.ids) - CACHED), True
        def compute() -> tuple[NDArray[np.float32], Arrays]:
            with self.pace.part("truth", self.layers):
                return reference.hf_sequence(self.checkpoint, self.config, *fed, advance=self.pace.advance)

        return self.once("truth", compute)

    @property
    def drift_steps(self) -> int:
        """Decode steps at the end of a full cache. Twice as many where states are kept in float16 and the model is
        small, as it is where it is decoded over more than `STEPWISE` tokens at all.
        """
        steps = self.amounts.drift
        return 2 * steps if self.floats == "float16" and steps > STEPWISE else steps

    @property
    def share(self) -> int:
        """Scored positions of each chat, so that all together have those of the amounts."""
        return -(-self.amounts.positions // max(1, len(self.chats)))

    @cached_property
    def given(self) -> tuple[list[Dialogue], str]:
        """The reference's own answers to the chats, none where it does not fit the memory; and a sentence on that."""
        longest = max((len(chat.ids) for chat in self.chats), default=0)
        needed, free = (
            transformers_model.bytes_needed(self.checkpoint, self.config, longest),
            psutil.virtual_memory().available,
        )
        if needed > free:
            return [], (
                f"The reference gave no answers of its own: its {needed / 1e9:.1f} GB do not fit into the "
                f"{free / 1e9:.1f} GB that are free. It read the bundle's, layer by layer."
            )
        contract, share = Contract.of(self.manifest), self.share
        prompts = tuple((tuple(chat.ids), *(image.tobytes() for image in chat.images)) for chat in self.chats)

        def compute() -> list[Dialogue]:
            with self.pace.part("given", len(self.chats)):
                return dialogues.reference_answers(self.weights, contract, self.chats, share, advance=self.pace.advance)

        return self.once("given", compute, contract, share, prompts), (
            "The reference's answers were given by this project's modules in float32 and read by transformers, which "
            "would have chosen the same tokens in the share that L3.reference_agrees tells."
        )

    @cached_property
    def given_truth(self) -> list[NDArray[np.float32]]:
        """transformers' logits [places, V] along each of the reference's answers."""
        answers = self.given[0]
        return self.once("read given", lambda: self.read(answers, "given"), tuple(tuple(each.ids) for each in answers))

    def read(self, answered: Sequence[Dialogue], whose: str) -> list[NDArray[np.float32]]:
        """transformers' logits [places, V] along each dialogue."""
        pictures = {image.tobytes(): image for each in answered for image in each.chat.images}
        seen = dict(zip(pictures, self.see("see chats", list(pictures.values())), strict=True))
        readings = [dialogue.reading(self.checkpoint, self.config, seen) for dialogue in answered]
        with self.pace.part(f"read {whose}", self.layers):
            return teacher.hf_logits(self.checkpoint, self.config, readings, advance=self.pace.advance)

    @cached_property
    def whole(self) -> Whole:
        """transformers' whole model, run once on the probe; only its logits are kept."""
        given = self.checkpoint, self.config, self.probe.ids, self.probe.images

        def compute() -> Whole:
            with self.pace.part("whole", 1):
                return transformers_model.whole_model(*given)

        return self.once("whole", compute)


def make_plan(tokens: int, lengths: tuple[int, ...], stepwise: int = STEPWISE) -> list[tuple[int | None, int]]:
    """Half of the tokens in chunks, the rest one by one, but no more than `stepwise`."""
    prefill = min(tokens, max(1, tokens // 2 + 3, tokens - stepwise))
    steps: list[tuple[int | None, int]] = list(chunks(prefill, lengths))
    return steps + [(None, 1)] * (tokens - prefill)
