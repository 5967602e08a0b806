"""The bundle's own answers to conversations, and the reference's: how they are given, and what each side makes of them.

Whatever a checkpoint was tuned for, its own answers are text that it knows, and a broken bundle's are garbage in the
eyes of the reference. All are greedy. A chat whose answers are short is asked further, until it has its share of
scored positions: an answer of three tokens says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract, Conversation
from export.chat.sampling import greedy
from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.model.session import Model, TorchSession
from export.validate import reference, transformers_model
from export.validate.chats import Chat
from export.validate.teacher import Reading


@dataclass(frozen=True)
class Dialogue:
    """A chat with its answers."""

    chat: Chat
    ids: list[int]
    """Prompt, answers and further questions."""
    places: list[int]
    """Where an answer's tokens were chosen: `ids[place + 1]` is the choice at `place`."""
    logits: NDArray[np.float32]
    """[places, V] of the side that answered."""

    @property
    def chosen(self) -> list[int]:
        """The tokens of all answers, stop tokens among them."""
        return [self.ids[place + 1] for place in self.places]

    def first_answer(self, stops: Sequence[int]) -> list[int]:
        """The tokens before the first stop token, or all."""
        first: list[int] = []
        for token in self.chosen:
            if token in stops:
                break
            first.append(token)
        return first

    def reading(
        self, checkpoint: Checkpoint, config: ModelConfig, seen: Mapping[bytes, NDArray[np.float32]]
    ) -> Reading:
        """What transformers reads, with its own embeddings, splicing and positions, and what it has `seen` of each
        picture, by the bytes of that.
        """
        ids, images = self.ids[:-1], self.chat.images
        rows = reference.embed(checkpoint, ids)
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        if images:
            features = [seen[image.tobytes()] for image in images]
            rows = transformers_model.hf_splice(checkpoint, config, rows, ids, features)
            grid = transformers_model.pixels(checkpoint, config, images).grid
            positions = transformers_model.hf_positions(checkpoint, config, ids, grid)
        return Reading(rows, positions, self.places)


def answer(session: Any, contract: Contract, chat: Chat, share: int) -> Dialogue:
    """The chat answered greedily, with further questions until `share` positions are scored, nothing more can be asked
    or the context is full.
    """
    talk = Conversation(session, contract)
    ids, places, rows = list(chat.ids), [], []
    further = iter(chat.further)
    logits = talk.feed(ids, _as_pictures(chat))
    while True:
        places.append(len(ids) - 1)
        rows.append(logits)
        ids.append(greedy(contract.mask(logits)))
        if len(places) == share:
            break
        fed = [ids[-1]]
        if ids[-1] in contract.stop_token_ids:
            turn = next(further, None)
            if turn is None:
                break
            ids += turn[1:] if turn[0] == ids[-1] else turn
            fed = ids[places[-1] + 1 :]
        if talk.start + len(fed) > contract.context_length:
            ids = ids[: places[-1] + 2]
            break
        logits = talk.feed(fed)
    return Dialogue(chat, ids, places, np.stack(rows))


def along(session: Any, contract: Contract, dialogue: Dialogue) -> NDArray[np.float32]:
    """Logits [places, V] of another side, given the same tokens."""
    talk = Conversation(session, contract)
    rows = [talk.feed(dialogue.ids[: dialogue.places[0] + 1], _as_pictures(dialogue.chat))]
    for before, place in zip(dialogue.places, dialogue.places[1:], strict=False):
        rows.append(talk.feed(dialogue.ids[before + 1 : place + 1]))
    return np.stack(rows)


def reference_answers(
    weights: Weights,
    contract: Contract,
    chats: Sequence[Chat],
    share: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Dialogue]:
    """The answers of our modules in float32 with the whole model in memory, which is free again afterwards.

    Args:
        advance: called behind each.
    """
    session = TorchSession(Model.load(weights), contract.context_length, contract.prefill_lengths)
    answers = []
    for chat in chats:
        answers.append(answer(session, contract, chat, share))
        advance()
    return answers


def _as_pictures(chat: Chat) -> list[NDArray[Any]]:
    """As a conversation takes them: [H, W, 3]."""
    return [np.moveaxis(image, 0, -1) for image in chat.images]
