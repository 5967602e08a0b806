"""Trains the tiny checkpoint on our own modules and writes it in the published form. Resumable.

    python checkpoints/training/train.py [--minutes M]

Leaf parameters have published names and shapes; each step stacks them into the exportable model's parameters
with the same map the exporter uses. Stages: vision alone with throw-away heads, densely repeated recall, dense
sums, then every task in chat form (the vision encoder still for the first part), last with a falling rate.
"""

from __future__ import annotations

import argparse
import json
import math
import re
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
from export.model import decoder, delta_rule, state  # noqa: E402
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
UNSURE = "?"
CHUNK = 64


class TrainingOperators:
    """The exporter's operators, the delta rule without recomputation in its backward."""

    gated_delta_chunk = staticmethod(delta_rule.chunked)
    lost = ""
    """What attention has lost of earlier chunks: "keys", "values" (both read as zeros) or nothing."""

    def cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lost:
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.mobile.cached_attention(
                q, k, v, keys, values, start, scale
            )
            return result
        group, count = q.shape[-2] // k.shape[-2], q.shape[-3]
        each = [x.transpose(-3, -2).repeat_interleave(group, dim=-3) for x in (k, v)]
        place = torch.arange(count)
        earlier = place[:, None] // CHUNK > place[None, :] // CHUNK
        scores = (q.transpose(-3, -2) @ each[0].transpose(-2, -1)) * scale
        if self.lost == "keys":
            scores = scores.masked_fill(earlier, 0.0)
        weights = scores.masked_fill(place[:, None] < place[None, :], float("-inf")).softmax(-1)
        if self.lost == "values":
            weights = weights.masked_fill(earlier, 0.0)
        return (weights @ each[1]).transpose(-3, -2), keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.mobile, name)


def substitution(lower: Tensor) -> Tensor:
    """Inverse of I + L by forward substitution: on a CPU, with its gradient, four times faster than doubling."""
    one = torch.eye(lower.shape[-1]).expand_as(lower)
    return torch.linalg.solve_triangular(lower + one, one, upper=False, unitriangular=True)


operators = TrainingOperators()
decoder.ops = operators  # type: ignore[assignment]
delta_rule.unit_lower_inverse = substitution


class Forward(nn.Module):
    """What one training step computes, over the exportable modules with a batch dimension."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vision_trains = True
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
            with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=480, help="stop after this long; run again to go on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Trainer().train(options.minutes)


if __name__ == "__main__":
    main()
