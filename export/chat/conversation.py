"""One conversation on a session: chunked prefill, images, M-RoPE positions, decode, snapshots.

Works on any `targets.base.Session` and any manifest; nothing here knows a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.chat import pictures
from export.chat.sampling import Sampler, greedy, masked
from export.model.positions import PositionCounter, PromptError, splice
from export.spec import ExportError

Arrays = dict[str, NDArray[Any]]


class Runner(Protocol):
    """The part of a session that a conversation needs."""

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays: ...
    def reset(self) -> None: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...


class ContextFull(ExportError):
    """The conversation does not fit the context of the bundle."""


@dataclass(frozen=True)
class Contract:
    """What a conversation must know of a bundle."""

    context_length: int
    prefill_lengths: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]
    image_token_id: int
    stop_token_ids: tuple[int, ...]
    pixels_per_token: int
    """Side of the square of pixels behind one image token."""
    num_rows: int | None = None
    """Rows of the embedding, where known: ids from this one on cannot be fed."""
    num_tokens: int | None = None
    """Ids from this one on have no token, where known: they are never sampled."""
    never_sampled_ids: tuple[int, ...] = ()
    takes_pictures: bool = True
    """Whether the chat template has a place for them."""

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Contract:
        sizes = tuple((h, w) for h, w in manifest["image_sizes"])
        side = 32
        for height, width in sizes:
            count = manifest["signatures"][f"vision_{height}x{width}"]["outputs"][0]["shape"][1]
            side = round((height * width / count) ** 0.5)
        tokenizer = manifest["tokenizer"]
        image = tokenizer["special_token_ids"].get("image", -1)
        stops = tuple(tokenizer["stop_token_ids"])
        never = {*tokenizer.get("never_sampled_ids", ()), *((image,) if image >= 0 else ())}
        return cls(
            context_length=manifest["context_length"],
            prefill_lengths=tuple(manifest["prefill_lengths"]),
            image_sizes=sizes,
            image_token_id=image,
            stop_token_ids=stops,
            pixels_per_token=side,
            num_rows=manifest.get("model", {}).get("vocab_size"),
            num_tokens=tokenizer.get("num_tokens"),
            never_sampled_ids=tuple(sorted(never - set(stops))),
            takes_pictures=tokenizer.get("template", {}).get("pictures", True),
        )

    def mask(self, logits: NDArray[Any]) -> NDArray[Any]:
        """A copy of logits [..., V] with minus infinity at ids that are never sampled."""
        return masked(logits, self.num_tokens, self.never_sampled_ids)


@dataclass(frozen=True)
class Snapshot:
    """Everything to continue a conversation from an earlier token."""

    states: Any
    start: int
    position: int


def chunks(count: int, lengths: Sequence[int]) -> Iterator[tuple[int | None, int]]:
    """Cut `count` tokens into (prefill length, valid tokens); None stands for one decode step.

    The largest length is used while it is full; the rest goes into the smallest that holds it, padded.
    """
    ordered = sorted(lengths)
    while count > 0:
        if count == 1 or not ordered:
            yield None, 1
            count -= 1
            continue
        fits = [length for length in ordered if length >= count]
        length = fits[0] if fits else ordered[-1]
        # A long chunk mostly of padding costs more than a full shorter one before it.
        full = [shorter for shorter in ordered if shorter <= count]
        if fits and full and length > 2 * full[-1]:
            length = full[-1]
        yield length, min(length, count)
        count -= length


class Conversation:
    """Feeds tokens and pictures to a session and keeps place and position."""

    def __init__(self, session: Runner, contract: Contract) -> None:
        self.session = session
        self.contract = contract
        self.token_name: Callable[[int], object] = lambda token: "no text known"
        """Text of a token, for messages; a chat, which has the tokenizer, sets it."""
        self.reset()

    def reset(self) -> None:
        self.session.reset()
        self.start = 0
        self.positions = PositionCounter()

    def snapshot(self) -> Snapshot:
        return Snapshot(self.session.snapshot(), self.start, self.positions.next)

    def restore(self, snapshot: Snapshot) -> None:
        self.session.restore(snapshot.states)
        self.start = snapshot.start
        self.positions = PositionCounter(snapshot.position)

    def image_size(self, picture: NDArray[Any]) -> tuple[int, int]:
        """The bundle's (H, W) for a picture [H, W, 3]."""
        if not self.contract.image_sizes:
            raise PromptError(
                "the bundle has no vision encoder (image_sizes is empty); export it without --no-vision"
            )
        return pictures.nearest_size(picture.shape[0], picture.shape[1], self.contract.image_sizes)

    def grid(self, picture: NDArray[Any]) -> tuple[int, int]:
        """Merged grid (rows, columns) of a picture: its number of image tokens is the product."""
        height, width = self.image_size(picture)
        side = self.contract.pixels_per_token
        return height // side, width // side

    def expand(self, ids: Sequence[int], images: Sequence[NDArray[Any]]) -> list[int]:
        """Repeat each single image token of a rendered prompt as often as its picture has tokens."""
        token, result, used = self.contract.image_token_id, [], 0
        for place in ids:
            if place != token:
                result.append(place)
                continue
            if used >= len(images):
                raise PromptError(f"the prompt has more image places than the {len(images)} images given")
            rows, columns = self.grid(images[used])
            result += [token] * (rows * columns)
            used += 1
        if used != len(images):
            raise PromptError(f"{len(images)} images were given but the prompt has places for {used}")
        return result

    def feed(self, ids: Sequence[int], images: Sequence[NDArray[Any]] = ()) -> NDArray[Any]:
        """Append tokens (image tokens already expanded) and return the logits [V] after the last.

        Raises:
            ContextFull: they do not fit; nothing was run. PromptError: tokens and images disagree, or a token has
                no row in the embedding; nothing was run.
        """
        if not ids:
            raise PromptError("no tokens to feed; give at least one")
        self._check_rows(ids)
        room = self.contract.context_length - self.start
        if len(ids) > room:
            raise ContextFull(
                f"{len(ids)} tokens do not fit: {self.start} of {self.contract.context_length} slots are used; "
                "shorten the prompt, start anew, or export with a larger --context-length"
            )
        counter = PositionCounter(self.positions.next)
        grids = [self.grid(picture) for picture in images]
        positions = counter.prompt(ids, self.contract.image_token_id, grids)
        embedded = self._embed(ids)
        rows = [self._encode(picture) for picture in images]
        embedded = splice(embedded, ids, self.contract.image_token_id, rows)
        logits, done = np.zeros(0, np.float32), 0
        for length, valid in chunks(len(ids), self.contract.prefill_lengths):
            part = slice(done, done + valid)
            logits = self._call(length, embedded[part], positions[:, part])
            done += valid
        self.positions = counter
        return logits

    def _check_rows(self, ids: Sequence[int]) -> None:
        """Runtimes differ in what they read past a table's end, some without a word: nothing may ask them to."""
        rows = self.contract.num_rows
        most = max(ids) if rows is None else rows - 1
        for token in ids:
            if not 0 <= token <= most:
                bound = "" if rows is None else f", which has {rows} rows (0 to {most})"
                raise PromptError(
                    f"token {token} ({self.token_name(token)!r}) has no row in the model's embedding{bound}: the "
                    "tokenizer knows more than the model; leave it out of the prompt, or resize the embedding and "
                    "export again"
                )

    def _embed(self, ids: Sequence[int]) -> NDArray[Any]:
        return self.session.run("embed", {"input_ids": np.asarray([ids], np.int64)})["embeddings"][0]

    def _encode(self, picture: NDArray[Any]) -> NDArray[Any]:
        size = self.image_size(picture)
        image = pictures.stretch(picture, size)[None]
        return self.session.run(f"vision_{size[0]}x{size[1]}", {"image": image})["image_embeddings"][0]

    def _call(self, length: int | None, rows: NDArray[Any], positions: NDArray[np.int32]) -> NDArray[Any]:
        count, width = rows.shape
        size = length or 1
        embeddings = np.zeros((1, size, width), rows.dtype)
        embeddings[0, :count] = rows
        position_ids = np.zeros((3, size), np.int32)
        position_ids[:, :count] = positions
        inputs = {
            "embeddings": embeddings,
            "position_ids": position_ids,
            "start": np.asarray([self.start], np.int32),
        }
        if length is not None:
            inputs["valid"] = np.asarray([count], np.int32)
        outputs = self.session.run(f"prefill_{length}" if length else "decode", inputs)
        self.start += count
        return join_logits(outputs)

    def generate(
        self,
        ids: Sequence[int],
        images: Sequence[NDArray[Any]] = (),
        *,
        max_new_tokens: int,
        sampler: Sampler = greedy,
        stop: Iterable[int] | None = None,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> list[int]:
        """Feed a prompt and sample until a stop token, the limit, or the end of the context.

        Ids that are no answer are masked before the sampler sees the logits [V].
        The stop token is not returned and not yet in the state: a next turn feeds it first.
        """
        stops = set(self.contract.stop_token_ids if stop is None else stop)
        logits = self.feed(ids, images)
        new: list[int] = []
        while len(new) < max_new_tokens:
            token = sampler(self.contract.mask(logits))
            if token in stops:
                break
            new.append(token)
            on_token(token)
            if len(new) == max_new_tokens or self.start >= self.contract.context_length:
                break
            logits = self.feed([token])
        return new


def join_logits(outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """float32 logits [V] from one output or from the pieces of a split head."""
    if "logits" in outputs:
        return outputs["logits"][0].astype(np.float32, copy=False)
    pieces = sorted((name for name in outputs if name.startswith("logits_")), key=lambda n: int(n[7:]))
    return np.concatenate([outputs[name][0].astype(np.float32, copy=False) for name in pieces])
