"""Batches of the small checkpoints' tasks: rows of conversations one after the other, in chat form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.chat.template import render
from export.model.config import ModelConfig
from export.model.positions import PositionCounter
from runtime_tests import small_tasks

MARK = "MARK"
PICTURES = frozenset({"read", "ink"})


@dataclass(frozen=True)
class Batch:
    """Pictures [B, 3, H, W] or None, ids and targets [B, T] (-100: none), positions [B, 3, T]."""

    images: Tensor | None
    ids: Tensor
    goals: Tensor
    positions: Tensor


class Data:
    """Everything is drawn from the generator that is passed in."""

    def __init__(self, name: str, config: ModelConfig, tokenizer: Any) -> None:
        self.tasks = small_tasks.TASKS[name]
        self.config = config
        self.tokenizer = tokenizer
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.stop = stop
        # A prompt's frame is always the same, and rendering it is the slow part.
        framed = render(tokenizer, [{"role": "user", "content": MARK}], enable_thinking=False)
        mark = self.encode(MARK)
        place = next(i for i in range(len(framed)) if framed[i : i + len(mark)] == mark)
        self.before, self.behind = framed[:place], framed[place + len(mark) :]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def turn(self, question: str, answer: str, dense: bool, tokens: int = 0) -> tuple[list[int], list[int]]:
        """Ids of a question with its answer, and targets; `tokens` of a picture before the question.

        `dense`: of the frame only the first and the last token, so that half of all tokens teach something.
        """
        c = self.config
        picture = [c.vision_start_token_id, *[c.image_token_id] * tokens, c.vision_end_token_id] if tokens else []
        before, behind = (self.before[:1], self.behind[-1:]) if dense else (self.before, self.behind)
        asked = [*before, *picture, *self.encode(question), *behind]
        told = [*self.encode(answer), self.stop]
        return asked + told, [-100] * len(asked) + told

    def batch(
        self,
        tasks: list[str],
        random: np.random.Generator,
        count: int,
        length: int,
        dense: bool = False,
        shares: Any = None,
    ) -> Batch:
        """Rows of at most `length` tokens (one turn at least): all about pictures, a picture a row, or none of them.

        `shares`: how often each task is drawn, all alike by default; the sum is 1.
        """
        size = small_tasks.IMAGE_SIZES[int(random.integers(len(small_tasks.IMAGE_SIZES)))]
        grid = (size[0] // 32, size[1] // 32)
        rows, pictures = [], []
        for _ in range(count):
            ids: list[int] = []
            goals: list[int] = []
            found: small_tasks.Cells = []
            if PICTURES.issuperset(tasks):
                picture, found = small_tasks.cells(random, size)
                pictures.append(picture)
            while True:
                task = str(random.choice(tasks, p=shares))
                if found:
                    question, answer = small_tasks.about(task, found, random)
                else:
                    case = self.tasks[task](random)
                    question, answer = case.messages[0]["content"], case.answer
                more, wanted = self.turn(question, answer, dense, grid[0] * grid[1] if found and not ids else 0)
                if ids and len(ids) + len(more) > length:
                    break
                line = self.encode("\n") if ids and not dense else []
                ids += line + more
                goals += [-100] * len(line) + wanted
            rows.append((ids, goals))
        return self.padded(rows, pictures, grid)

    def padded(self, rows: list[tuple[list[int], list[int]]], pictures: list[Any], grid: tuple[int, int]) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        goals = torch.full((len(rows), width), -100)
        positions = torch.zeros(len(rows), 3, width, dtype=torch.int32)
        for i, (text, goal) in enumerate(rows):
            ids[i, : len(text)] = torch.tensor(text)
            goals[i, : len(text)] = torch.tensor(goal)
            places = PositionCounter().prompt(text, self.config.image_token_id, [grid] if pictures else [])
            positions[i, :, : len(text)] = torch.from_numpy(places)
        images = None
        if pictures:
            images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return Batch(images, ids[:, :-1], goals[:, 1:], positions[:, :, :-1])

    def cells(self, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, H, W], and of every image token [B, N] the number of its glyph and of its colour."""
        size = small_tasks.IMAGE_SIZES[int(random.integers(len(small_tasks.IMAGE_SIZES)))]
        drawn = [small_tasks.cells(random, size) for _ in range(count)]
        images = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2).contiguous()
        glyphs = [[small_tasks.GLYPHS.index(glyph) for glyph, _ in found] for _, found in drawn]
        inks = [[list(small_tasks.INKS).index(ink) for _, ink in found] for _, found in drawn]
        return images, torch.tensor(glyphs), torch.tensor(inks)
