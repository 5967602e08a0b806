"""The vision encoder for one fixed image size: patches, a ViT with full attention, 2×2 merge.

Letters: N patches, Dv vision width, D decoder width, p patch side. Normalisation of the picture, patch
order and the repeated frame are inside: the caller gives RGB in 0…1. A still picture is the same frame
twice, so that the published temporal kernel [Dv, 3, 2, p, p] acts as its sum over time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from export.model.config import VisionConfig
from export.model.decoder import Linear, weight
from export.model.operators import ops

LAYER_NORM_EPS = 1e-6


class LayerNorm(nn.Module):
    """Of a residual stream that was multiplied by `config.stream_scale`, which only the eps must know."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = weight(config.hidden_size)
        self.bias = weight(config.hidden_size)
        self.eps = LAYER_NORM_EPS * config.stream_scale**2

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block over all N patches of one picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.norm1 = LayerNorm(config)
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.norm2 = LayerNorm(config)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x [N, Dv] -> [N, Dv]."""
        config = self.config
        heads = (*x.shape[:-1], config.num_heads, config.head_dim)
        q, k, v = self.qkv(self.norm1(x)).split([config.hidden_size] * 3, dim=-1)
        merge, theta = config.spatial_merge_size, config.rope_theta
        q = ops.grid_rotary(q.reshape(heads), rows, columns, merge, theta).transpose(-3, -2)
        k = ops.grid_rotary(k.reshape(heads), rows, columns, merge, theta).transpose(-3, -2)
        v = v.reshape(heads).transpose(-3, -2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """Picture [..., 3, H, W] in 0…1 -> image embeddings [..., N/merge², D] in the order of image tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        merged = config.hidden_size * config.spatial_merge_size**2
        self.patch = Linear(3 * config.patch_size**2, config.hidden_size, bias=True)
        self.position_weight = weight(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger_norm = LayerNorm(config)
        self.merger_up = Linear(merged, merged, bias=True)
        self.merger_down = Linear(merged, config.out_hidden_size, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        config = self.config
        rows, columns = image.shape[-2] // config.patch_size, image.shape[-1] // config.patch_size
        merge = config.spatial_merge_size
        image = ops.normalize_image(image, list(config.image_mean), list(config.image_std))
        x = self.patch(ops.patchify(image, config.patch_size, merge))
        x = x + ops.resample_positions(self.position_weight, rows, columns, merge)
        for block in self.blocks:
            x = block(x, rows, columns)
        x = self.merger_norm(x).reshape(*x.shape[:-2], -1, merge**2 * config.hidden_size)
        return self.merger_down(F.gelu(self.merger_up(x)))
