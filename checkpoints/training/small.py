"""Trains a small checkpoint (checkpoints/small/NAME) by its recipe. Resumable.

An encoder learns alone first, to name glyph and colour of each image token by two throw-away heads, and rests then.
The decoder learns all its tasks in chat form, and stops when no held-out answer was
wrong twice. Matrices are stepped by Muon, everything else by AdamW.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import small_files
import torch
import torch.nn.functional as F
from model import Forward, initial
from recipes import RECIPES
from safetensors.torch import save_file
from small_data import PICTURES, Batch, Data
from torch import Tensor, nn
from torch.func import functional_call

from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.names import EMBEDDING, HEAD
from export.checkpoint.weights import TEXT, VISION, Weights, assemble, parameters
from export.model.config import ModelConfig
from export.model.session import Model, TorchSession
from export.validate.answers import generator
from runtime_tests import small_tasks

LOUDNESS = 12.8
"""What a token's own logit begins with, where the head is tied."""
EVERY = 50
"""Steps between two lines of the log."""
WARM = 30
"""Steps in which the rate rises."""
DENSE = 0.6
"""Share of the first cycle in which two of three batches bring questions without the frame of a chat, and so more."""
LEAST_SHARE = 0.1
"""Of a task without errors, in later cycles."""
LENGTHS = {True: 64, False: 96}
"""Tokens of a row, dense and in chat form."""
CHECKED = 128
"""Held-out samples a task in the last line."""
ANSWERED = 100
"""Held-out samples a task on the model card."""


class Trainer:
    """Training of one checkpoint; `state-NAME.pt` beside this file keeps what is needed to go on."""

    def __init__(self, name: str) -> None:
        self.name, self.recipe = name, RECIPES[name]
        self.output = small_tasks.folder(name)
        self.state = Path(__file__).parent / f"state-{name}.pt"
        self.config = ModelConfig.from_dict(small_files.write(self.output, self.recipe))
        self.data = Data(name, self.config, load_tokenizer(self.output))
        self.forward = Forward(self.config)
        self.forward.vision_trains = False
        self.map = parameters(self.config)
        tensors = initial(self.config)
        # A tied head reads rows of length sqrt(D): at first a token's own logit is 13. A head of its own starts small.
        start = LOUDNESS / self.config.text.hidden_size if self.recipe.tied else 1.0
        tensors[f"{TEXT}.norm.weight"].fill_(start - 1)
        self.tensors = {n: nn.Parameter(t) for n, t in tensors.items()}
        width = self.config.text.hidden_size
        self.heads = nn.ModuleList([nn.Linear(width, len(x)) for x in (small_tasks.GLYPHS, small_tasks.INKS)])
        self.step, self.cpu = 0, 0.0
        self.optimizers = self.new_optimizers()
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            for key, tensor in saved["tensors"].items():
                self.tensors[key].data.copy_(tensor)
            for optimizer, kept in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.heads.load_state_dict(saved["heads"])
            self.step, self.cpu = saved["step"], saved["cpu"]
        else:
            (self.output / "log.jsonl").unlink(missing_ok=True)

    def new_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the decoder's matrices; AdamW, in which the encoder and the two tables have rates of their own."""
        tables = (EMBEDDING, HEAD)
        matrices = [n for n, t in self.tensors.items() if n.startswith(TEXT) and t.ndim == 2 and n not in tables]
        vision = [n for n in self.tensors if n.startswith(VISION)]
        rest = [n for n in self.tensors if n not in matrices and n not in vision and n not in tables]

        def group(names: Any, share: float, decay: float = 0.0) -> dict[str, Any]:
            return {"params": [self.tensors[n] for n in names if n in self.tensors], "share": share,
                    "weight_decay": decay}  # fmt: skip

        muon = torch.optim.Muon([group(matrices, 1.0, 0.05)], adjust_lr_fn="match_rms_adamw")
        others = [group(tables, 1.0), group(rest, 0.5), {**group(vision, 0.3), "vision": True}]
        others.append({"params": list(self.heads.parameters()), "share": 0.3, "weight_decay": 0.0, "vision": True})
        return [muon, torch.optim.AdamW(others, betas=(0.9, 0.98))]

    def call(self, *inputs: Tensor | None) -> Tensor:
        tensors = {f"model.{n}": assemble(p, self.tensors.__getitem__) for n, p in self.map.items()}
        result: Tensor = functional_call(self.forward, tensors, inputs)
        return result

    def learning_rates(self) -> None:
        """A cosine to zero for the encoder's stage and for each cycle of the decoder's."""
        sees, step = self.step < self.recipe.vision_steps, self.step
        for steps in (self.recipe.vision_steps, *self.recipe.cycles):
            if step < steps:
                break
            step -= steps
        scale = self.recipe.rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / WARM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["share"] if group.get("vision", False) == sees else 0.0

    def draw(self, random: np.random.Generator) -> Batch:
        """A batch about pictures or without them."""
        step = self.step - self.recipe.vision_steps
        dense = step < DENSE * self.recipe.cycles[0] and step % 3 > 0
        tasks, shares = list(self.data.tasks), None
        pictures = [task for task in tasks if task in PICTURES]
        if pictures:
            seen = bool(random.random() < len(pictures) / len(tasks))
            tasks = [task for task in tasks if (task in PICTURES) == seen]
        if step >= self.recipe.cycles[0]:  # later cycles are about what went wrong
            wrong = np.array([LEAST_SHARE + 1 - self.told()[-1]["exact"][task] for task in tasks])
            shares = wrong / wrong.sum()
        return self.data.batch(tasks, random, self.recipe.batch, LENGTHS[dense], dense, shares)

    def loss(self, random: np.random.Generator) -> Tensor:
        if self.step < self.recipe.vision_steps:
            images, *goals = self.data.cells(random, 48)
            tokens = self.call(images, None, None)
            named = [h(tokens).flatten(0, 1) for h in self.heads]
            losses = [F.cross_entropy(n, g.flatten()) for n, g in zip(named, goals, strict=True)]
            return sum(losses, torch.zeros(()))
        batch = self.draw(random)
        with torch.autocast("cpu", torch.bfloat16):  # a third faster, where the processor multiplies bfloat16
            logits = self.call(batch.images, batch.ids, batch.positions)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.goals.flatten())

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Share of held-out answers whose every token is the best one."""
        random = np.random.default_rng([small_tasks.HELD_OUT, self.step])
        if self.step < self.recipe.vision_steps:
            images, *goals = self.data.cells(random, samples)
            tokens = self.call(images, None, None)
            right = [(h(tokens).argmax(-1) == g).float().mean() for h, g in zip(self.heads, goals, strict=True)]
            return {"glyph": float(right[0]), "colour": float(right[1])}
        scores = {}
        for task in self.data.tasks:
            batch = self.data.batch([task], random, samples, 1)
            best = self.call(batch.images, batch.ids, batch.positions).argmax(-1)
            scores[task] = float(((best == batch.goals) | (batch.goals == -100)).all(-1).float().mean())
        return scores

    def save(self) -> None:
        kept = {
            "tensors": {n: t.data for n, t in self.tensors.items()},
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "cpu": self.cpu,
        }
        torch.save(kept, self.state.with_suffix(".tmp"))
        self.state.with_suffix(".tmp").replace(self.state)
        weights = {n: t.data.to(torch.bfloat16).contiguous() for n, t in self.tensors.items()}
        if self.recipe.alone:
            weights = {n.replace(f"{TEXT}.", "model."): t for n, t in weights.items()}
        save_file(weights, self.output / "model.safetensors", metadata={"format": "pt"})

    def train(self, minutes: float) -> None:
        """Go on until the recipe's last step, until all is learned, or for so many minutes."""
        begin, last = time.monotonic(), time.process_time()
        total, mean = self.recipe.vision_steps + sum(self.recipe.cycles), 0.0
        while self.step < total and not self.learned() and time.monotonic() - begin < 60 * minutes:
            self.learning_rates()
            loss = self.loss(np.random.default_rng([1, self.step]))
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*self.tensors.values(), *self.heads.parameters()], 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            mean = 0.95 * mean + 0.05 * float(loss.detach()) if self.step else float(loss.detach())
            self.step += 1
            if self.step % EVERY == 0 or self.step == total:
                scores = self.evaluate(CHECKED if self.step == total else 48)
                now = time.process_time()
                self.cpu, last = self.cpu + now - last, now
                self.save()
                exact = {task: round(score, 3) for task, score in scores.items()}
                line = {"step": self.step, "cpu_s": round(self.cpu), "wall_s": round(time.monotonic() - begin)}
                small_files.log(self.output, line | {"loss": round(mean, 4), "exact": exact})
        if self.step == total or self.learned():
            self.card()

    def learned(self) -> bool:
        """Whether no held-out answer was wrong in the last two lines of the log."""
        if self.step < self.recipe.vision_steps + 2 * EVERY or self.step % EVERY:
            return False
        return all(min(line["exact"].values()) == 1.0 for line in self.told()[-2:])

    def told(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        text = (self.output / "log.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def card(self) -> None:
        """Write README.md with the accuracy of the saved weights, answering token by token in float32."""
        checkpoint = FolderCheckpoint(self.output)
        model = Model.load(Weights(checkpoint, self.config))
        session = TorchSession(model, small_tasks.LONGEST, (32,))
        stop = (self.data.stop,)
        contract = Contract(small_tasks.LONGEST, (32,), small_tasks.IMAGE_SIZES, self.config.image_token_id, stop, 32)
        scores = small_tasks.evaluate(
            self.name, generator(session, contract), self.data.tokenizer, samples=ANSWERED
        )
        count = sum(tensor.numel() for tensor in self.tensors.values())
        small_files.readme(self.output, self.name, self.recipe, count, scores)
