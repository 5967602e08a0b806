"""A chat of several turns that feeds only what is new: the state is kept, or brought back by a snapshot.

A template may render an earlier answer otherwise than it was generated (it drops the thinking). The state
after the answer is then of no use, and a recurrent state cannot be cut back; the snapshot taken where the last
question ended is, and everything from there on is prefilled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from export.chat.conversation import Conversation, Snapshot
from export.chat.sampling import Sampler, greedy
from export.chat.template import render
from export.model.positions import PromptError


class Chat:
    """Messages in, answer tokens out; keeps what the session's state stands for.

    Args:
        conversation: on an open session. tokenizer: of the bundle. thinking: the template's switch.
    """

    def __init__(self, conversation: Conversation, tokenizer: Any, *, thinking: bool = False) -> None:
        self.conversation = conversation
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.reused = 0
        """Tokens of the last prompt that were in the state already."""
        conversation.token_name = tokenizer.convert_ids_to_tokens
        self._fed: list[int] = []
        self._question: tuple[list[int], Snapshot] | None = None
        conversation.reset()

    def answer(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[NDArray[Any]] = (),
        *,
        max_new_tokens: int,
        sampler: Sampler = greedy,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> tuple[list[int], list[int]]:
        """(prompt ids, new ids) of the answer to the last of `messages`; `images` are those of all turns.

        Raises:
            PromptError: pictures, and a template without a place for them.
        """
        conversation = self.conversation
        if images and not conversation.contract.takes_pictures:
            raise PromptError(
                "the bundle's chat template (chat_template.jinja) takes no pictures; ask without, or export the "
                "checkpoint with a template that writes <|vision_start|><|image_pad|><|vision_end|> for a picture"
            )
        prompt = self._render(messages, images, True)
        question = self._render(messages, images, False)
        if prompt[: len(question)] != question:
            question = []  # a template that rewrites the end: nothing to come back to
        self.reused = self._rewind(prompt)
        fresh = list(images[self._pictures(prompt[: self.reused], images) :])
        end = len(question)
        if end > self.reused:
            inside = self._pictures(question, images) - (len(images) - len(fresh))
            conversation.feed(prompt[self.reused : end], fresh[:inside])
            fresh = fresh[inside:]
            self._question = (question, conversation.snapshot())
        done = max(end, self.reused)
        new = conversation.generate(
            prompt[done:], fresh, max_new_tokens=max_new_tokens, sampler=sampler, on_token=on_token
        )
        self._fed = [*prompt, *new][: conversation.start]
        return prompt, new

    def _render(self, messages: list[dict[str, Any]], images: Sequence[NDArray[Any]], prompt: bool) -> list[int]:
        ids = render(self.tokenizer, messages, generation_prompt=prompt, enable_thinking=self.thinking)
        return self.conversation.expand(ids, images)

    def _rewind(self, prompt: list[int]) -> int:
        """Bring the state to the longest known beginning of the prompt; returns its length."""
        if self._fed and len(self._fed) < len(prompt) and prompt[: len(self._fed)] == self._fed:
            return len(self._fed)
        if self._question is not None:
            ids, snapshot = self._question
            if len(ids) < len(prompt) and prompt[: len(ids)] == ids:
                self.conversation.restore(snapshot)
                return len(ids)
        self.conversation.reset()
        self._question = None
        return 0

    def _pictures(self, ids: list[int], images: Sequence[NDArray[Any]]) -> int:
        """How many pictures have their tokens within `ids`."""
        left = ids.count(self.conversation.contract.image_token_id)
        count = 0
        for picture in images:
            rows, columns = self.conversation.grid(picture)
            if left < rows * columns:
                break
            left -= rows * columns
            count += 1
        return count
