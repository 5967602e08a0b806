"""Trains the tiny checkpoint on our own modules and writes it in the published form. Resumable.

    python checkpoints/training/train.py [--minutes M]

Leaf parameters have published names and shapes; each step stacks them into the exportable model's parameters
with the same map the exporter uses. Stages: vision alone with throw-away heads, densely repeated recall with
arithmetic, then every task in chat form, the last part with a falling learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import files  # noqa: E402

from export.chat.template import load_tokenizer, render  # noqa: E402
from export.checkpoint.names import expected  # noqa: E402
from export.checkpoint.weights import assemble, parameters  # noqa: E402
from export.model import state  # noqa: E402
from export.model.config import ModelConfig  # noqa: E402
from export.model.positions import PositionCounter  # noqa: E402
from export.model.session import Model  # noqa: E402
from export.validate import task  # noqa: E402

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "tiny"
STATE = HERE / "state.pt"
LOG = HERE / "log.jsonl"

STAGES: list[dict[str, Any]] = [
    {"name": "vision", "steps": 5500, "lr": 2e-3, "final": 0.1},
    {"name": "pairs", "steps": 600, "lr": 2e-3, "final": 1.0},
    {"name": "chat", "steps": 9000, "lr": 2e-3, "final": 0.5},
    {"name": "anneal", "steps": 5000, "lr": 1e-3, "final": 0.0},
]
VISION_SHARE = 0.4
"""The vision encoder's learning rate relative to the decoder's, once both train."""


class Forward(nn.Module):
    """What one training step computes, over the exportable modules with a batch dimension."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Model(config)

    def forward(self, images: Tensor | None, ids: Tensor | None, positions: Tensor | None) -> Tensor:
        if self.model.vision is None:
            raise ValueError("the tiny checkpoint has a vision encoder")
        if ids is None:
            return self.model.vision(images)
        text = self.model.config.text
        rows = self.model.embedding(ids)
        if images is not None:
            encoded = self.model.vision(images)
            rows = rows.masked_scatter((ids == self.model.config.image_token_id).unsqueeze(-1), encoded)
        count = ids.shape[1]
        states = [
            torch.zeros(len(ids), *s.shape) for s in state.layout(text, count)
        ]
        start, valid = torch.zeros(1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
        return self.model.decoder(rows, positions, start, valid, states, all_rows=True)[0]


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


def initial(config: ModelConfig) -> dict[str, Tensor]:
    """Published tensors at the start. The embedding is large, or the residual stream drowns it."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in expected(config).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        tensor = torch.randn(shape) * fan_in**-0.5
        if name.endswith("embed_tokens.weight"):
            tensor = torch.randn(shape)
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor *= 0.4
        elif name.endswith("A_log"):
            tensor = torch.empty(shape).uniform_(0.5, 8).log()
        elif name.endswith("dt_bias"):  # inverse softplus of log-uniform steps (Gu & Dao 2023)
            step = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)))
            tensor = step + torch.log(-torch.expm1(-step))
        elif name.endswith("pos_embed.weight"):
            tensor = torch.randn(shape) * 0.3
        elif name.endswith("linear_attn.norm.weight") or ("visual" in name and "norm" in name and "weight" in name):
            tensor = torch.ones(shape)
        elif name.endswith("language_model.norm.weight"):
            tensor = torch.full(shape, -0.9)  # the tied head would shout: start with small logits
        elif len(shape) == 1:
            tensor = torch.zeros(shape)
        tensors[name] = tensor
    return tensors


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

    def chat(self, name: str, random: np.random.Generator, count: int, hardness: float) -> Any:
        """One task in chat form: pictures, ids [B, T], targets [B, T], positions [B, 3, T]."""
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
            prompt = task.expand(
                render(self.tokenizer, case.messages, enable_thinking=False), case.images, token
            )
            answer = [*self.encode(case.answer), self.stop]
            grids = [(i.shape[0] // 32, i.shape[1] // 32) for i in case.images]
            everything = prompt + answer
            places = PositionCounter().prompt(everything, token, grids)
            rows.append((everything, [-100] * len(prompt) + answer, places))
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
        names = list(task.TASKS)
        # The tasks with more errors get more samples, none less than a share.
        need = np.array([0.08 + 1 - self.scores.get(name, 0.0) for name in names])
        name = str(random.choice(names, p=need / need.sum()))
        hardness = min(1.0, 0.15 + 1.2 * self.step / 3000) if stage in ("pairs", "chat") else 1.0
        if stage == "pairs":
            hardness = 0.15
        count = 12 if name == "recall" and hardness > 0.5 else 24 if name == "recall" else 48
        images, ids, goals, positions = self.data.chat(name, random, count, hardness)
        logits = self.call(images, ids, positions)
        return F.cross_entropy(logits.flatten(0, 1), goals.flatten()), name

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
                images, ids, goals, positions = self.data.chat(name, random, samples // 4, 1.0)
                best = self.call(images, ids, positions).argmax(-1)
                right += int(((best == goals) | (goals == -100)).all(-1).sum())
            scores[name] = right / samples
        return scores

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
                nn.utils.clip_grad_norm_([*self.tensors.values(), *self.heads.parameters()], 1.0)
                self.optimizer.step()
                recent[name] = 0.9 * recent.get(name, float(loss)) + 0.1 * float(loss)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=480, help="stop after this long; run again to go on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer().train(options.minutes)


if __name__ == "__main__":
    main()
