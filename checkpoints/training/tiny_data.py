"""Batches of the tiny checkpoint's tasks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from model import CHUNK
from torch import Tensor

from export.chat.template import render
from export.model.config import ModelConfig
from export.model.positions import PositionCounter
from export.validate import task

UNSURE = "?"
"""The answer to what a fault has spoiled."""


class Data:
    """Batches; seed numbers grow with the step and stay below the held-out range."""

    def __init__(self, config: ModelConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.answers: dict[str, list[int]] = {}

    def vision(self, random: np.random.Generator, count: int) -> tuple[Tensor, list[Tensor]]:
        size = task.IMAGE_SIZES[int(random.integers(3))]
        pictures, glyph, colour, shape = [], [], [], []
        names, forms = list(task.COLOURS), list(task.SHAPES)
        for index in range(count):
            slots, colours, shapes = [0] * 4, [0] * 4, [0] * 4
            if index % 2:
                text = "".join(random.choice(list(task.GLYPHS), int(random.integers(2, 4))))
                slots = [task.GLYPHS.index(c) + 1 for c in text] + [0] * (4 - len(text))
                pictures.append(task.draw_glyphs(text, size, random))
            else:
                scene = {
                    str(p): (str(random.choice(names)), str(random.choice(forms)))
                    for p in random.permutation(task.PLACES)[: int(random.integers(2, 5))]
                }
                for place, (c, s) in scene.items():
                    colours[task.PLACES.index(place)] = names.index(c) + 1
                    shapes[task.PLACES.index(place)] = forms.index(s) + 1
                pictures.append(task.draw_objects(scene, size, random))
            glyph.append(slots)
            colour.append(colours)
            shape.append(shapes)
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return images, [torch.tensor(x) for x in (glyph, colour, shape)]

    def pairs(self, random: np.random.Generator, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows of " K=12 …" in which most keys come back; targets only where a key is repeated."""
        ids, targets = [], []
        for _ in range(count):
            keys = random.permutation(list(task.KEYS))[: int(random.integers(3, 20))]
            values = {k: f"{int(random.integers(100)):02d}" for k in keys}
            seen: set[str] = set()
            text: list[int] = []
            goal: list[int] = []
            while len(text) <= length:
                key = str(random.choice(keys))
                part = self.encode(f" {key}={values[key]}")
                text += part
                goal += [-100] * (len(part) - 2) + (part[-2:] if key in seen else [-100, -100])
                seen.add(key)
            ids.append(text[: length + 1])
            targets.append(goal[: length + 1])
        table, goals = torch.tensor(ids), torch.tensor(targets)
        return table[:, :-1], goals[:, 1:]

    def encode(self, text: str) -> list[int]:
        if text not in self.answers:
            self.answers[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.answers[text]

    def sums(self, random: np.random.Generator, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows of " 12+34=46 …"; targets only behind the sign of equality."""
        ids, targets = [], []
        for _ in range(count):
            text: list[int] = []
            goal: list[int] = []
            while len(text) <= length:
                case = task.arithmetic(random, task.IMAGE_SIZES[0])
                question = self.encode(" " + case.messages[0]["content"][:-1])
                answer = [*self.encode(case.answer), self.stop]
                text += question + answer
                goal += [-100] * len(question) + answer
            ids.append(text[: length + 1])
            targets.append(goal[: length + 1])
        table, goals = torch.tensor(ids), torch.tensor(targets)
        return table[:, :-1], goals[:, 1:]

    def more(self, name: str, case: task.Sample, random: np.random.Generator, count: int) -> list[Any]:
        """Further questions about the same listing, so that a long row teaches more than one answer."""
        if name != "recall" or not count:
            return []
        pairs = re.findall(r" (\w)=(\d\d)", case.messages[0]["content"])
        asked = random.permutation(len(pairs))[:count]
        return [([{"role": "user", "content": f"What is {pairs[i][0]}?"}], pairs[i][1]) for i in asked]

    def chat(
        self,
        name: str,
        random: np.random.Generator,
        count: int,
        hardness: float,
        more: int = 0,
        spoiled: bool = False,
    ) -> Any:
        """One task in chat form: pictures, ids [B, T], targets [B, T], positions [B, 3, T].

        `spoiled`: UNSURE is the answer wherever a fault can be seen; pictures get the positions of text.
        """
        size = task.IMAGE_SIZES[int(random.integers(3))]
        cases = []
        for _ in range(count):
            if name == "recall":
                most = max(5, int(hardness * task.MAX_PAIRS))
                cases.append(task.recall(random, size, int(random.integers(4, most + 1))))
            else:
                cases.append(task.TASKS[name](random, size))
        token = self.config.image_token_id
        rows = []
        for case in cases:
            everything: list[int] = []
            goal: list[int] = []
            for messages, wanted in [(case.messages, case.answer), *self.more(name, case, random, more)]:
                prompt = task.expand(
                    render(self.tokenizer, messages, enable_thinking=False), case.images if not goal else [], token
                )
                visible = spoiled and (bool(case.images) or len(prompt) > CHUNK)
                answer = [*self.encode(UNSURE if visible else wanted), self.stop]
                line = [] if not everything else self.encode("\n")
                goal += [-100] * (len(line) + len(prompt)) + answer
                everything += line + prompt + answer
            grids = [(i.shape[0] // 32, i.shape[1] // 32) for i in case.images]
            places = PositionCounter().prompt(everything, -1 if spoiled else token, [] if spoiled else grids)
            rows.append((everything, goal, places))
        width = max(len(r[0]) for r in rows)
        ids = torch.zeros(count, width, dtype=torch.int64)
        goals = torch.full((count, width), -100)
        positions = torch.zeros(count, 3, width, dtype=torch.int32)
        for i, (text, goal, places) in enumerate(rows):
            ids[i, : len(text)] = torch.tensor(text)
            goals[i, : len(text)] = torch.tensor(goal)
            positions[i, :, : len(text)] = torch.from_numpy(places)
        images = None
        if cases[0].images:
            stacked = np.stack([case.images[0] for case in cases])
            images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
        return images, ids[:, :-1], goals[:, 1:], positions[:, :, :-1]
