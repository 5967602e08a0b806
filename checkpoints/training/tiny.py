"""Trains the tiny checkpoint. Resumable.

Stages: vision alone with throw-away heads, densely repeated recall, dense sums, then every task in chat form (the
vision encoder still for the first part), last with a falling rate.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import files
import numpy as np
import torch
import torch.nn.functional as F
from model import Forward, initial, operators
from safetensors.torch import load_file, save_file
from tiny_data import Data
from torch import Tensor, nn
from torch.func import functional_call

from export.chat.template import load_tokenizer
from export.checkpoint.weights import assemble, parameters
from export.model.config import ModelConfig
from export.validate import task

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "tiny"
STATE = HERE / "state.pt"
LOG = HERE / "log.jsonl"

STAGES: list[dict[str, Any]] = [
    {"name": "vision", "steps": 5500, "lr": 2e-3, "final": 0.1},
    {"name": "pairs", "steps": 600, "lr": 2e-3, "final": 1.0},
    {"name": "sums", "steps": 800, "lr": 2e-3, "final": 1.0},
    {"name": "chat", "steps": 3600, "lr": 2e-3, "final": 0.5},
    {"name": "anneal", "steps": 2000, "lr": 1e-3, "final": 0.0},
]
VISION_SHARE = 0.4
"""The vision encoder's learning rate relative to the decoder's, once both train."""
FROZEN = 2000
"""Chat steps before the vision encoder trains on: the decoder must learn to read what it already sees."""


SPOILED = 0.2
"""Share of late batches with a fault, to which the right answer is UNSURE: keys or values of earlier chunks
lost, or a picture's tokens positioned as text. Without them the recurrent state makes up for a lost KV cache
and the vision encoder's own positions for wrong ones, and a broken runtime would go unnoticed."""

class Heads(nn.Module):
    """Throw-away heads of the vision stage: attention pooling, one query per thing to name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8, width))
        self.key = nn.Linear(width, width)
        self.place = nn.Parameter(torch.randn(16, width) * 0.3)
        self.hidden = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(8))
        self.glyph = nn.Linear(2 * width, len(task.GLYPHS) + 1)
        self.colour = nn.Linear(2 * width, len(task.COLOURS) + 1)
        self.shape = nn.Linear(2 * width, len(task.SHAPES) + 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = tokens + self.place[: tokens.shape[1]]
        weights = (self.query @ self.key(tokens).transpose(1, 2) * tokens.shape[-1] ** -0.5).softmax(-1)
        pooled = weights @ tokens
        hidden = torch.stack([F.gelu(layer(pooled[:, i])) for i, layer in enumerate(self.hidden)], 1)
        return self.glyph(hidden[:, :4]), self.colour(hidden[:, 4:]), self.shape(hidden[:, 4:])


class Trainer:
    def __init__(self) -> None:
        raw = files.write(OUTPUT)
        self.config = ModelConfig.from_dict(raw)
        self.data = Data(self.config, load_tokenizer(OUTPUT))
        self.forward = Forward(self.config)
        self.map = parameters(self.config)
        self.tensors = {n: nn.Parameter(t) for n, t in initial(self.config).items()}
        self.heads = Heads(self.config.text.hidden_size)
        self.stage, self.step, self.cpu = 0, 0, 0.0
        self.scores: dict[str, float] = {}
        self.optimizer = self.new_optimizer()
        if STATE.exists():
            saved = torch.load(STATE, weights_only=True)
            for name, tensor in saved["tensors"].items():
                self.tensors[name].data.copy_(tensor)
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.stage, self.step, self.cpu = saved["stage"], saved["step"], saved["cpu"]
            self.scores = saved["scores"]
        elif LOG.exists() and (OUTPUT / "model.safetensors").exists():
            self.adopt()

    def adopt(self) -> None:
        """Go on from the committed weights and log where the optimizer's state was not kept."""
        for name, tensor in load_file(OUTPUT / "model.safetensors").items():
            self.tensors[name].data.copy_(tensor)
        entry = json.loads(LOG.read_text().splitlines()[-1])
        self.stage = [stage["name"] for stage in STAGES].index(entry["stage"])
        self.step, self.cpu = entry["step"], entry["cpu_s"]

    def new_optimizer(self) -> torch.optim.Optimizer:
        groups: dict[str, list[nn.Parameter]] = {"embed": [], "vision": [], "matrix": [], "vector": []}
        for name, tensor in self.tensors.items():
            kind = "embed" if "embed_tokens" in name else "vision" if "visual" in name else None
            groups[kind or ("matrix" if tensor.ndim == 2 else "vector")].append(tensor)
        decay = {"embed": 0.0, "vision": 0.05, "matrix": 0.1, "vector": 0.0}
        entries: list[dict[str, Any]] = [
            {"params": p, "kind": k, "weight_decay": decay[k]} for k, p in groups.items()
        ]
        entries.append({"params": list(self.heads.parameters()), "kind": "heads", "weight_decay": 0.0})
        return torch.optim.AdamW(entries, lr=1e-3, betas=(0.9, 0.98))

    def call(self, *inputs: Tensor | None) -> Tensor:
        tensors = {f"model.{n}": assemble(p, self.tensors.__getitem__) for n, p in self.map.items()}
        result: Tensor = functional_call(self.forward, tensors, inputs)
        return result

    def learning_rates(self, stage: dict[str, Any]) -> None:
        done = self.step / stage["steps"]
        scale = stage["lr"] * (stage["final"] + (1 - stage["final"]) * 0.5 * (1 + math.cos(math.pi * done)))
        scale *= min(1.0, (self.step + 1) / 100)
        for group in self.optimizer.param_groups:
            share = {"embed": 3.0, "vision": VISION_SHARE}.get(group["kind"], 1.0)
            if stage["name"] == "vision":
                share = {"vision": 1.0, "heads": 1.0}.get(group["kind"], 0.0)
            group["lr"] = scale * share

    def loss(self, stage: str, random: np.random.Generator) -> tuple[Tensor, str]:
        if stage == "vision":
            images, goals = self.data.vision(random, 64)
            outputs = self.heads(self.call(images, None, None))
            losses = [F.cross_entropy(o.flatten(0, 1), g.flatten()) for o, g in zip(outputs, goals, strict=True)]
            return sum(losses, torch.zeros(())), "vision"
        if stage == "pairs" and self.step % 4 < 3:
            ids, goals = self.data.pairs(random, 24, 96)
            positions = torch.arange(96, dtype=torch.int32).expand(24, 3, 96)
            logits = self.call(None, ids, positions)
            return F.cross_entropy(logits.flatten(0, 1), goals.flatten()), "pairs"
        if stage == "sums" and self.step % 4 < 3:
            ids, goals = self.data.sums(random, 32, 64)
            positions = torch.arange(64, dtype=torch.int32).expand(32, 3, 64)
            logits = self.call(None, ids, positions)
            return F.cross_entropy(logits.flatten(0, 1), goals.flatten()), "sums"
        names = list(task.TASKS)
        # The tasks with more errors get more samples, none less than a share.
        need = np.array([0.08 + 1 - self.scores.get(name, 0.0) for name in names])
        name = str(random.choice(names, p=need / need.sum()))
        hardness = {"pairs": 0.15, "sums": 0.15, "chat": min(1.0, 0.15 + 1.2 * self.step / 3000)}.get(stage, 1.0)
        count = 12 if name == "recall" and hardness > 0.5 else 24 if name == "recall" else 48
        self.forward.vision_trains = stage == "anneal" or (stage == "chat" and self.step >= FROZEN)
        late = stage == "anneal" or (stage == "chat" and self.step >= 3000)
        spoiled = bool(late and name != "arithmetic" and random.random() < SPOILED)
        more = 0 if spoiled else int(random.integers(0, 7))
        images, ids, goals, positions = self.data.chat(name, random, count, hardness, more, spoiled)
        operators.lost = str(random.choice(["keys", "values"])) if spoiled and name == "recall" else ""
        name += " spoiled" if spoiled else ""
        loss = F.cross_entropy(self.call(images, ids, positions).flatten(0, 1), goals.flatten())
        return loss, name

    @torch.no_grad()
    def evaluate(self, samples: int = 64) -> dict[str, float]:
        """Exact answers on held-out seeds, all answer tokens right under teacher forcing = greedy exact."""
        scores = {}
        random = np.random.default_rng(task.HELD_OUT + 10**6 + self.step)
        if STAGES[self.stage]["name"] == "vision":
            images, goals = self.data.vision(random, 128)
            outputs = self.heads(self.call(images, None, None))
            right = [(o.argmax(-1) == g).all(-1) for o, g in zip(outputs, goals, strict=True)]
            named = right[1] & right[2]
            return {"glyphs": float(right[0][1::2].float().mean()), "objects": float(named[::2].float().mean())}
        for name in task.TASKS:
            right = 0
            for _ in range(4):
                right += self.exact(self.data.chat(name, random, samples // 4, 1.0))
            scores[name] = right / samples
        for lost in ("keys", "values"):
            operators.lost = lost
            scores[f"{lost} lost"] = self.exact(self.data.chat("recall", random, 16, 1.0, spoiled=True)) / 16
        operators.lost = ""
        scores["objects as text"] = self.exact(self.data.chat("objects", random, 32, 1.0, spoiled=True)) / 32
        return scores

    def exact(self, batch: Any) -> int:
        """Rows of a batch whose every target is the best token."""
        images, ids, goals, positions = batch
        best = self.call(images, ids, positions).argmax(-1)
        return int(((best == goals) | (goals == -100)).all(-1).sum())

    def save(self) -> None:
        torch.save(
            {
                "tensors": {n: t.data for n, t in self.tensors.items()},
                "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "stage": self.stage,
                "step": self.step,
                "cpu": self.cpu,
                "scores": self.scores,
            },
            STATE.with_suffix(".tmp"),
        )
        STATE.with_suffix(".tmp").replace(STATE)
        weights = {n: t.data.to(torch.bfloat16).contiguous() for n, t in self.tensors.items()}
        save_file(weights, OUTPUT / "model.safetensors", metadata={"format": "pt"})

    def train(self, minutes: float) -> None:
        end = time.monotonic() + 60 * minutes
        last, begin = time.process_time(), time.monotonic()
        recent: dict[str, float] = {}
        while self.stage < len(STAGES):
            stage = STAGES[self.stage]
            while self.step < stage["steps"]:
                self.learning_rates(stage)
                random = np.random.default_rng([self.stage, self.step])
                loss, name = self.loss(stage["name"], random)
                self.optimizer.zero_grad()
                loss.backward()
                operators.lost = ""
                nn.utils.clip_grad_norm_([*self.tensors.values(), *self.heads.parameters()], 1.0)
                self.optimizer.step()
                value = float(loss.detach())
                recent[name] = 0.9 * recent.get(name, value) + 0.1 * value
                self.step += 1
                if self.step % 200 == 0 or self.step == stage["steps"] or time.monotonic() > end:
                    found = self.evaluate()
                    if stage["name"] != "vision":
                        self.scores = found
                    now = time.process_time()
                    self.cpu, last = self.cpu + now - last, now
                    self.save()
                    entry = {
                        "stage": stage["name"],
                        "step": self.step,
                        "cpu_s": round(self.cpu),
                        "wall_s": round(time.monotonic() - begin),
                        "loss": {k: round(v, 4) for k, v in recent.items()},
                        "exact": {k: round(v, 3) for k, v in found.items()},
                    }
                    with LOG.open("a") as log:
                        log.write(json.dumps(entry) + "\n")
                if time.monotonic() > end:
                    return
            self.stage, self.step = self.stage + 1, 0
