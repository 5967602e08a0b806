"""Which published tensors make up each parameter of the exportable model, read in row blocks.

A parameter is rows of published tensors, stacked, then one elementwise transform. Stacked rows keep their
order, so that a quantiser working row by row sees the same rows whatever is stacked with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from export.checkpoint.base import Checkpoint
from export.model.config import FULL, ModelConfig, TextConfig, VisionConfig

TEXT = "model.language_model"
VISION = "model.visual"
HEAD_BASIS = "decoder.basis.weight"
"""The one parameter that is computed: only `export.quantize.conditioned` makes models that have it."""

BLOCK_ELEMENTS = 4 * 2**20
"""Elements read at a time: 16 MiB in float32, far below what a runtime needs to start."""


@dataclass(frozen=True)
class Segment:
    """Rows start…stop-1 of one published tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """A parameter of the exportable model: its shape, its source rows and its role in a recipe.

    Roles are the finest that recipes know (export.quantize.recipe), or kept (never quantised).
    """

    name: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    role: str = "kept"
    transform: str = "none"


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _sum_over_time(x: Tensor) -> Tensor:
    """[n, 3, T, p, p] -> [n, 3·p·p]: a still picture is the same frame T times."""
    return x.sum(2).reshape(x.shape[0], -1)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "plus_one": lambda x: x + 1.0,
    "negative_exp": lambda x: -x.exp(),
    "flatten": _flatten,
    "sum_over_time": _sum_over_time,
}


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the exportable model by name: `embedding.weight`, `decoder.…`, `vision.…`.

    A tied head reads the embedding's tensor.
    """
    entries = _text(config.text)
    if config.vision is not None:
        entries += _vision(config.vision)
    return {entry.name: entry for entry in entries}


def _whole(name: str, tensor: str, *shape: int, role: str = "kept", transform: str = "none") -> Parameter:
    return Parameter(name, shape, (Segment(tensor, 0, shape[0]),), role, transform)


def _text(config: TextConfig) -> list[Parameter]:
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = f"{TEXT}.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    entries = [
        _whole("embedding.weight", embedding, vocab, hidden, role="embedding"),
        _whole("decoder.norm.weight", f"{TEXT}.norm.weight", hidden, transform="plus_one"),
        _whole("decoder.head.weight", head, vocab, hidden, role="lm_head"),
    ]
    if config.head_basis:
        source = Segment(f"{TEXT}.norm.weight", 0, hidden)
        entries.append(Parameter(HEAD_BASIS, (hidden, hidden), (source,), transform="head_basis"))
    for index, kind in enumerate(config.layer_types):
        ours, theirs = f"decoder.layers.{index}", f"{TEXT}.layers.{index}"
        entries += _attention(config, ours, theirs) if kind == FULL else _delta(config, ours, theirs)
        for norm, published in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")):
            entries.append(
                _whole(f"{ours}.{norm}.weight", f"{theirs}.{published}.weight", hidden, transform="plus_one")
            )
        width = config.intermediate_size
        entries += [
            _whole(f"{ours}.mlp.gate.weight", f"{theirs}.mlp.gate_proj.weight", width, hidden, role="mlp"),
            _whole(f"{ours}.mlp.up.weight", f"{theirs}.mlp.up_proj.weight", width, hidden, role="mlp"),
            _whole(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight", hidden, width, role="mlp_down"),
        ]
    return entries


def _delta(config: TextConfig, ours: str, theirs: str) -> list[Parameter]:
    hidden, heads, values = config.hidden_size, config.linear_num_value_heads, config.linear_value_dim
    ours, theirs = f"{ours}.mixer", f"{theirs}.linear_attn"
    return [
        _whole(
            f"{ours}.qkv.weight", f"{theirs}.in_proj_qkv.weight", config.conv_dim, hidden, role="linear_attention"
        ),
        _whole(f"{ours}.z.weight", f"{theirs}.in_proj_z.weight", values, hidden, role="linear_attention"),
        # One row per head: too small to be worth quantising, and the gates are what drifts first.
        _whole(f"{ours}.b.weight", f"{theirs}.in_proj_b.weight", heads, hidden),
        _whole(f"{ours}.a.weight", f"{theirs}.in_proj_a.weight", heads, hidden),
        _whole(
            f"{ours}.conv_weight",
            f"{theirs}.conv1d.weight",
            config.conv_dim,
            config.linear_conv_kernel_dim,
            transform="flatten",
        ),
        _whole(f"{ours}.decay_scale", f"{theirs}.A_log", heads, transform="negative_exp"),
        _whole(f"{ours}.dt_bias", f"{theirs}.dt_bias", heads),
        _whole(f"{ours}.norm_weight", f"{theirs}.norm.weight", config.linear_value_head_dim),
        _whole(f"{ours}.out.weight", f"{theirs}.out_proj.weight", hidden, values, role="linear_attention_out"),
    ]


def _attention(config: TextConfig, ours: str, theirs: str) -> list[Parameter]:
    hidden, width = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    ours, theirs = f"{ours}.mixer", f"{theirs}.self_attn"
    # q_proj interleaves per head: width rows of query, then width rows of gate.
    heads = range(config.num_attention_heads)
    q = tuple(Segment(f"{theirs}.q_proj.weight", 2 * h * width, (2 * h + 1) * width) for h in heads)
    gate = tuple(Segment(f"{theirs}.q_proj.weight", (2 * h + 1) * width, (2 * h + 2) * width) for h in heads)
    return [
        Parameter(f"{ours}.q.weight", (queries, hidden), q, "attention"),
        _whole(f"{ours}.k.weight", f"{theirs}.k_proj.weight", keys, hidden, role="attention"),
        _whole(f"{ours}.v.weight", f"{theirs}.v_proj.weight", keys, hidden, role="attention"),
        Parameter(f"{ours}.gate.weight", (queries, hidden), gate, "attention"),
        _whole(f"{ours}.q_norm.weight", f"{theirs}.q_norm.weight", width, transform="plus_one"),
        _whole(f"{ours}.k_norm.weight", f"{theirs}.k_norm.weight", width, transform="plus_one"),
        _whole(f"{ours}.out.weight", f"{theirs}.o_proj.weight", hidden, queries, role="attention_out"),
    ]


def _vision(config: VisionConfig) -> list[Parameter]:
    hidden, width = config.hidden_size, config.intermediate_size
    merged = hidden * config.spatial_merge_size**2

    def affine(ours: str, theirs: str, rows: int, columns: int, role: str = "vision") -> list[Parameter]:
        return [
            _whole(f"vision.{ours}.weight", f"{VISION}.{theirs}.weight", rows, columns, role=role),
            _whole(f"vision.{ours}.bias", f"{VISION}.{theirs}.bias", rows),
        ]

    def norm(ours: str, theirs: str) -> list[Parameter]:
        return [
            _whole(f"vision.{ours}.{part}", f"{VISION}.{theirs}.{part}", hidden) for part in ("weight", "bias")
        ]

    patch = f"{VISION}.patch_embed.proj"
    entries = [
        _whole(
            "vision.patch.weight",
            f"{patch}.weight",
            hidden,
            3 * config.patch_size**2,
            transform="sum_over_time",
        ),
        _whole("vision.patch.bias", f"{patch}.bias", hidden),
        _whole(
            "vision.position_weight", f"{VISION}.pos_embed.weight", config.num_position_embeddings, hidden
        ),
        *norm("merger_norm", "merger.norm"),
        *affine("merger_up", "merger.linear_fc1", merged, merged, "vision_merger"),
        *affine("merger_down", "merger.linear_fc2", config.out_hidden_size, merged, "vision_merger"),
    ]
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"blocks.{i}"
        entries += norm(f"{ours}.norm1", f"{theirs}.norm1") + norm(f"{ours}.norm2", f"{theirs}.norm2")
        entries += affine(f"{ours}.qkv", f"{theirs}.attn.qkv", 3 * hidden, hidden)
        entries += affine(f"{ours}.out", f"{theirs}.attn.proj", hidden, hidden)
        entries += affine(f"{ours}.up", f"{theirs}.mlp.linear_fc1", width, hidden)
        entries += affine(f"{ours}.down", f"{theirs}.mlp.linear_fc2", hidden, width)
    return entries


def assemble(parameter: Parameter, tensors: Callable[[str], Tensor]) -> Tensor:
    """A whole parameter from whole published tensors; differentiable, for training."""
    parts = [tensors(s.tensor)[s.start : s.stop] for s in parameter.segments]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return TRANSFORMS[parameter.transform](joined)


class Weights:
    """The parameters of the exportable model over a checkpoint, read row block by row block."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.parameters = parameters(config)

    @property
    def count(self) -> int:
        """Weights to be written, a tied matrix counted once."""
        seen = {(each.transform, each.segments): math.prod(each.shape) for each in self.parameters.values()}
        return sum(seen.values())

    def parameter(self, name: str) -> Parameter:
        return self.parameters[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop-1 of a parameter as float32 [stop-start, …]."""
        parameter = self.parameters[name]
        parts, first = [], 0
        for segment in parameter.segments:
            count = segment.stop - segment.start
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(
                    self.checkpoint.read(segment.tensor, segment.start + low, segment.start + high)
                )
            first += count
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return TRANSFORMS[parameter.transform](joined)

    def to_stream(self, rows: Tensor) -> Tensor:
        """Published rows [T, D] of the text's residual stream (embeddings, pictures') as this model's own has them."""
        return rows

    def tensor(self, name: str) -> Tensor:
        """A whole parameter as float32."""
        return self.rows(name, 0, self.parameters[name].shape[0])

    def blocks(self, name: str, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 [rows, …]) covering rows first…stop-1 of the parameter (all of them by default) in
        order, about 16 MiB at a time; blocks have an even number of rows, so that 4-bit values of them fill bytes.
        """
        shape = self.parameters[name].shape
        columns = 1
        for extent in shape[1:]:
            columns *= extent
        step = max(2, BLOCK_ELEMENTS // columns // 2 * 2)
        stop = shape[0] if stop is None else stop
        for start in range(first, stop, step):
            yield start, self.rows(name, start, min(start + step, stop))
