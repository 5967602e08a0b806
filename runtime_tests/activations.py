"""What a checkpoint's activations look like on text it knows: the numbers that quantisers and float16 meet.

Letters: T tokens, D hidden size, F width of the MLPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.chat.template import load_tokenizer
from export.checkpoint import Checkpoint
from export.checkpoint.weights import Weights
from export.model import state
from export.model.decoder import RMSNorm
from export.model.session import Model
from export.sizes import shipped_tiny
from export.validate import task
from export.validate.probe import Probe, make_probe
from runtime_tests import small_tasks

TOKENS = 384
"""Length of the sequence that the axes of `concentrate` and the statistics come from."""
PICTURES = ((64, 96), (96, 64))
DELIMITERS = ("<|im_start|>", "<|im_end|>", "\n", "\n\n")
PASSAGE = """<|im_start|>user
Why do rivers bend? Please answer in three lines, with a number.<|im_end|>
<|im_start|>assistant
Water runs faster on the outer side of a bend and carries soil away there.
On the inner side it is slow, and drops what it carries.

So a bend of 2 metres becomes one of 40; then the river cuts through, and begins again.<|im_end|>
<|im_start|>user
def area(r): return 3.14159 * r ** 2  # Was ist das? "Eine Fläche", dit-elle.
| r | area |
| 1 | 3.14 |<|im_end|>
"""


@dataclass(frozen=True)
class Statistics:
    """Of the text residual stream [T, D] before every norm: what quantisers and float16 meet.

    Attributes:
        peak: the largest magnitude.
        channel_ratio: root mean square of the largest channel over that of the median channel.
        energy_in_4: share of the energy in the four largest channels.
        delimiter_peak: the largest magnitude at delimiter tokens over the median magnitude everywhere.
        delimiters_lead: share of the norms at whose input the largest magnitude is a delimiter's.
        mlp_ratio: as channel_ratio, of the inner activation of the text MLPs, the worst layer.
        norm_ratio: as channel_ratio, of the outputs of the norms before mixers and MLPs, the worst.
        vision_peak: the largest magnitude of the vision encoder's residual stream; 0 without pictures.
    """

    peak: float
    channel_ratio: float
    energy_in_4: float
    delimiter_peak: float
    delimiters_lead: float
    mlp_ratio: float
    norm_ratio: float
    vision_peak: float


@dataclass(frozen=True)
class Activations:
    """One sequence through our decoder in float32.

    Attributes:
        ids: tokens [T]; delimiters: ids among them that delimit (the first token always does, by its place).
        streams: the input [T, D] of every norm that sees the text residual stream, in order.
        norms, inner: the outputs of those norms [T, D], and the inner activations of the MLPs [T, F].
        vision_peak: see `Statistics`.
    """

    ids: list[int]
    delimiters: frozenset[int]
    streams: list[Tensor]
    norms: list[Tensor]
    inner: list[Tensor]
    vision_peak: float

    def groups(self) -> list[Tensor]:
        """Places [n] of the first token, then of each kind of delimiter that occurs."""
        ids = torch.tensor(self.ids)
        places = [(ids == token).nonzero().flatten() for token in sorted(self.delimiters)]
        return [torch.zeros(1, dtype=torch.int64), *(p for p in places if len(p))]


def axes(checkpoint: Checkpoint) -> Tensor:
    """An orthogonal matrix [D, D] (float64) whose columns are the new channels of the text residual stream.

    First the mean streams of the first token and of each kind of delimiter (as attention sinks have in trained models:
    Sun et al. 2024, arXiv:2402.17762), then the principal axes of what is left of all streams, uncentred. Channels are
    shuffled, because neighbours in a group of weights would otherwise be of like size, which is the easy case.
    """
    found = activations(checkpoint)
    streams = torch.cat(found.streams).double()
    every = torch.stack(found.streams).double()  # [N, T, D]
    means = torch.stack([every[:, places].mean((0, 1)) for places in found.groups()], dim=1)
    first, _ = torch.linalg.qr(means)
    rest = streams - (streams @ first) @ first.T
    _, vectors = torch.linalg.eigh(rest.T @ rest)
    # The eigenvectors of the smallest values span `first` again: a QR of all drops them.
    basis, _ = torch.linalg.qr(torch.cat([first, vectors.flip(1)], dim=1)[:, : streams.shape[1]])
    shuffled = torch.randperm(basis.shape[1], generator=torch.Generator().manual_seed(0))
    return basis[:, shuffled]


def statistics(checkpoint: Checkpoint) -> Statistics:
    """What the text residual stream of a checkpoint looks like on `TOKENS` tokens of text it knows and two pictures."""
    found = activations(checkpoint)
    streams = torch.cat(found.streams)
    energy = streams.double().pow(2).mean(0)
    places = torch.cat(found.groups())
    everywhere = torch.stack([stream.abs().max() for stream in found.streams])
    delimited = torch.stack([stream[places].abs().max() for stream in found.streams])
    return Statistics(
        peak=float(streams.abs().max()),
        channel_ratio=_ratio(streams),
        energy_in_4=float(energy.topk(4).values.sum() / energy.sum()),
        delimiter_peak=float(delimited.max() / streams.abs().median()),
        delimiters_lead=float((delimited == everywhere).double().mean()),
        mlp_ratio=max(_ratio(x) for x in found.inner),
        norm_ratio=max(_ratio(x) for x in found.norms),
        vision_peak=found.vision_peak,
    )


def _ratio(x: Tensor) -> float:
    """Root mean square of the largest channel of x [T, D] over the median channel's."""
    channels = x.double().pow(2).mean(0).sqrt()
    return float(channels.max() / channels.median())


@torch.inference_mode()
def activations(checkpoint: Checkpoint) -> Activations:
    """Run text that the checkpoint knows, and two pictures, through our modules and keep what passes by."""
    config = checkpoint.model_config
    model = Model.load(Weights(checkpoint, config))
    probe, delimiters = known_text(checkpoint)
    streams: list[Tensor] = []
    norms: list[Tensor] = []
    inner: list[Tensor] = []
    vision = [0.0]

    def norm_seen(module: Any, inputs: Any, output: Tensor) -> None:
        streams.append(inputs[0])
        norms.append(output)

    def vision_seen(module: Any, inputs: Any) -> None:
        vision[0] = max(vision[0], float(inputs[0].abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and name.endswith(("input_norm", "post_norm", "decoder.norm")):
            module.register_forward_hook(norm_seen)
        elif name.endswith("mlp.down"):
            module.register_forward_pre_hook(lambda m, inputs: inner.append(inputs[0]))
        elif name.startswith("vision.") and name.endswith(("norm1", "norm2", "merger_norm")):
            module.register_forward_pre_hook(vision_seen)
    ids = torch.tensor(probe.ids)
    rows = model.embedding(ids)
    if probe.images and model.vision is not None:
        pictures = torch.cat([model.vision(torch.from_numpy(image)) for image in probe.images])
        rows = rows.masked_scatter((ids == config.image_token_id)[:, None], pictures)
    start, valid = torch.zeros(1, dtype=torch.int32), torch.tensor([len(ids)], dtype=torch.int32)
    states = state.zeros(config.text, len(ids))
    model.decoder(rows, torch.from_numpy(probe.positions), start, valid, states, all_rows=True)
    return Activations(probe.ids, delimiters, streams, norms, inner, vision[0])


def known_text(checkpoint: Checkpoint) -> tuple[Probe, frozenset[int]]:
    """`TOKENS` tokens of text that the checkpoint knows, with two pictures; and the ids of delimiters.

    Without a tokenizer the text is seeded random ids, and delimiters are what opens and closes a picture.
    """
    config, file = checkpoint.model_config, checkpoint.sidecar("tokenizer.json")
    if file is None:
        marks = {config.vision_start_token_id, config.vision_end_token_id}
        return make_probe(config, TOKENS, PICTURES), frozenset(marks)
    tokenizer = load_tokenizer(file.parent)
    spelled = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in DELIMITERS]
    probe = make_probe(config, TOKENS, PICTURES, text=_words(file, tokenizer))
    return probe, frozenset(ids[0] for ids in spelled if len(ids) == 1)


def _words(file: Path, tokenizer: Any) -> list[int]:
    """Text of the tasks of a checkpoint of ours, which its tokenizer.json tells; else `PASSAGE`."""
    content = file.read_bytes()
    if content == (shipped_tiny() / file.name).read_bytes():
        return task.text(tokenizer, TOKENS)
    for name in small_tasks.TASKS:
        if content == (small_tasks.folder(name) / file.name).read_bytes():
            return small_tasks.text(name, tokenizer, TOKENS)
    ids: list[int] = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"]
    return ids
