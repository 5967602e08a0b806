"""Function-preserving twins of a checkpoint, with the activations that trained large models have.

    python -m runtime_tests.twins SRC DST --stream 1024 --vision-stream 64 --outliers 32 --mlp-outliers 32 --concentrate

In float32 a twin answers as its source does; float16, int8 activations and coarse groups meet other numbers. Every
twin is untied and float32, so that one without options is what the others are compared with. Letters: D hidden size.

What is exact. `stream` and `vision_stream` are powers of two, so that no weight is rounded. The epsilons of the norms
stay as published (vision's is no setting, and the text decoder has one for norms that see the stream and for DeltaNet's
gated norm, which does not): the twin is the source with epsilon / stream², a relative change of at most
epsilon / (2 · mean square) of a norm's input, below 1e-6 for streams of order one and none where epsilon is negligible.
`outliers`, `mlp_outliers` and `concentrate` are computed in float64 and rounded to float32 once: about 1e-6 of a logit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.checkpoint import Checkpoint, open_checkpoint
from export.checkpoint.names import EMBEDDING, HEAD, expected
from export.checkpoint.published import CONFIG, TEXT_TYPE
from export.checkpoint.weights import TEXT, VISION
from export.model.config import ModelConfig
from export.sizes import CUSTOM
from export.spec import ExportError, ExportSpec
from runtime_tests.activations import axes, statistics

Tensors = dict[str, Tensor]


class TwinError(ExportError):
    """A twin that would not answer as its source."""


@dataclass(frozen=True)
class Kinds:
    """What a twin differs in.

    Attributes:
        stream: the text residual stream is so many times larger; a power of two.
        vision_stream: the vision encoder's is.
        outliers: `channels` channels of every norm's output (text, DeltaNet, vision, merger) are so many times larger,
            and the columns of the next matrices that read them smaller.
        mlp_outliers: the same for the inner activation of the text MLPs. Vision's have a GELU between the matrices,
            which no factor passes.
        concentrate: norms are folded into the next matrices and the text stream is rotated, so that its energy lies in
            few channels, and the stream of delimiter tokens in one each.
        channels: how many channels become outliers.
        seed: which ones do.
    """

    stream: float = 1.0
    vision_stream: float = 1.0
    outliers: float = 1.0
    mlp_outliers: float = 1.0
    concentrate: bool = False
    channels: int = 4
    seed: int = 0


def write(source: Path | str | Checkpoint, destination: Path | str, **kinds: Any) -> Path:
    """Write the twin of a checkpoint folder (or of a checkpoint held otherwise) into a new folder, which is returned.

    Args:
        source: any folder that `open_checkpoint` reads, in any spelling. A decoder alone, or one whose vision weights
            are missing, becomes what Qwen3_5ForCausalLM.save_pretrained writes.
        destination: an empty or absent folder.
        kinds: fields of `Kinds`.

    Raises:
        TwinError: a stream that is no power of two, a factor that is not positive, more outliers than channels,
            a destination with content. ExportError: the source cannot be read.
    """
    chosen, folder = Kinds(**kinds), Path(destination)
    checkpoint = _opened(source)
    config = checkpoint.model_config
    _check(chosen, config, folder)
    tensors = {name: checkpoint.read(name) for name in expected(config)}
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    if chosen.concentrate:
        basis = axes(checkpoint)
        _fold(tensors, config)
        _rotate(tensors, config, basis)
    _outliers(tensors, config, chosen)
    _streams(tensors, config, chosen)
    _save(folder, checkpoint, config, tensors)
    return folder


def _opened(source: Path | str | Checkpoint) -> Checkpoint:
    if not isinstance(source, Path | str):
        return source
    return open_checkpoint(ExportSpec(target="onnx", size=CUSTOM, checkpoint=str(source)))


def _check(kinds: Kinds, config: ModelConfig, folder: Path) -> None:
    for name in ("stream", "vision_stream"):
        value = getattr(kinds, name)
        if value <= 0 or math.frexp(value)[0] != 0.5:
            raise TwinError(f"{name} {value}: only a power of two rounds no weight; give such as 1024")
    for name in ("outliers", "mlp_outliers"):
        value = getattr(kinds, name)
        if not 0 < value < math.inf:
            raise TwinError(f"{name} {value}: a channel is scaled back by 1 / factor; give a finite one above 0")
    widths = [config.text.hidden_size, config.text.intermediate_size, config.text.linear_value_head_dim]
    widths += [] if config.vision is None else [config.vision.hidden_size]
    if not 0 <= kinds.channels <= min(widths):
        raise TwinError(f"channels {kinds.channels}: the narrowest norm has {min(widths)}; give 0 to {min(widths)}")
    if folder.exists() and any(folder.iterdir()):
        raise TwinError(f"{folder} is not empty; give a new folder")


# --- who reads and writes what --------------------------------------------------------------------------------


def _norms(tensors: Tensors, config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(norm, matrices that read it and nothing else) of the text decoder."""
    for i in range(config.text.num_hidden_layers):
        layer = f"{TEXT}.layers.{i}"
        mixer = [f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "a", "b")]
        mixer += [f"self_attn.{x}_proj" for x in "qkv"]
        names = [f"{layer}.{x}.weight" for x in mixer]
        yield f"{layer}.input_layernorm.weight", [name for name in names if name in tensors]
        yield f"{layer}.post_attention_layernorm.weight", [f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up")]
    yield f"{TEXT}.norm.weight", [HEAD]


def _written(tensors: Tensors) -> tuple[list[str], list[str]]:
    """Matrices and biases [D, ...] that add to the text stream, and to the vision stream. The embedding is [V, D]."""
    ends = (".o_proj.weight", ".out_proj.weight", ".down_proj.weight")
    text = [n for n in tensors if n.startswith(TEXT) and n.endswith(ends)]
    text += [n for n in tensors if n.startswith(f"{VISION}.merger.linear_fc2.")]
    parts = (".attn.proj.", ".mlp.linear_fc2.", ".patch_embed.proj.", ".pos_embed.")
    return text, [n for n in tensors if n.startswith(VISION) and any(part in n for part in parts)]


def _scale(tensors: Tensors, name: str, factor: Tensor) -> None:
    """Multiply a tensor in float64 and round once."""
    tensors[name] = (tensors[name].double() * factor).float()


# --- the kinds ------------------------------------------------------------------------------------------------


def _streams(tensors: Tensors, config: ModelConfig, kinds: Kinds) -> None:
    """Scale all that adds to a residual stream; norms do not see it, and the head reads a norm."""
    text, vision = _written(tensors)
    for name in [*text, EMBEDDING]:
        tensors[name] = tensors[name] * kinds.stream
    for name in vision:
        tensors[name] = tensors[name] * kinds.vision_stream


def _outliers(tensors: Tensors, config: ModelConfig, kinds: Kinds) -> None:
    """Scale channels up where they are produced and down where they are read."""
    generator = torch.Generator().manual_seed(kinds.seed)

    def factors(width: int, factor: float) -> Tensor:
        scale = torch.ones(width, dtype=torch.float64)
        scale[torch.randperm(width, generator=generator)[: kinds.channels]] = factor
        return scale

    for norm, readers in _norms(tensors, config):
        scale = factors(config.text.hidden_size, kinds.outliers)
        tensors[norm] = ((1 + tensors[norm].double()) * scale - 1).float()
        for name in readers:
            _scale(tensors, name, 1 / scale)
    for i in range(config.text.num_hidden_layers):
        layer = f"{TEXT}.layers.{i}"
        scale = factors(config.text.intermediate_size, kinds.mlp_outliers)
        _scale(tensors, f"{layer}.mlp.up_proj.weight", scale[:, None])
        _scale(tensors, f"{layer}.mlp.down_proj.weight", 1 / scale)
        if f"{layer}.linear_attn.norm.weight" in tensors:  # one weight for all heads, not zero-centred
            scale = factors(config.text.linear_value_head_dim, kinds.outliers)
            _scale(tensors, f"{layer}.linear_attn.norm.weight", scale)
            every = scale.repeat(config.text.linear_num_value_heads)
            _scale(tensors, f"{layer}.linear_attn.out_proj.weight", 1 / every)
    if config.vision is None:
        return
    pairs = [("merger.norm", "merger.linear_fc1")]
    for i in range(config.vision.depth):
        pairs += [(f"blocks.{i}.norm1", f"blocks.{i}.attn.qkv"), (f"blocks.{i}.norm2", f"blocks.{i}.mlp.linear_fc1")]
    for norm, reader in pairs:
        scale = factors(config.vision.hidden_size, kinds.outliers)
        for part in ("weight", "bias"):
            _scale(tensors, f"{VISION}.{norm}.{part}", scale)
        columns = tensors[f"{VISION}.{reader}.weight"].shape[1]  # the merger reads merge² neighbours side by side
        _scale(tensors, f"{VISION}.{reader}.weight", 1 / scale.repeat(columns // len(scale)))


def _fold(tensors: Tensors, config: ModelConfig) -> None:
    """Move the weights of the norms that see the text stream into the matrices behind them."""
    for norm, readers in _norms(tensors, config):
        for name in readers:
            _scale(tensors, name, 1 + tensors[norm].double())
        tensors[norm] = torch.zeros_like(tensors[norm])


def _rotate(tensors: Tensors, config: ModelConfig, basis: Tensor) -> None:
    """Give the text stream the coordinates x · basis, basis [D, D] orthogonal; its norms are folded."""
    for name in [EMBEDDING, *(name for _, readers in _norms(tensors, config) for name in readers)]:
        tensors[name] = (tensors[name].double() @ basis).float()
    for name in _written(tensors)[0]:
        tensors[name] = (basis.T @ tensors[name].double()).float()


# --- files ----------------------------------------------------------------------------------------------------


def _save(folder: Path, checkpoint: Checkpoint, config: ModelConfig, tensors: Tensors) -> None:
    """Write model.safetensors and config.json in the published form, and copy what lies beside the source's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    document["text_config"] = {**document["text_config"], "tie_word_embeddings": False, "dtype": "float32"}
    document |= {"tie_word_embeddings": False, "architectures": ["Qwen3_5ForConditionalGeneration"]}
    if config.vision is None:
        # Given a whole config without weights for an encoder, transformers would make up a random one.
        document = document["text_config"] | {"model_type": TEXT_TYPE, "architectures": ["Qwen3_5ForCausalLM"]}
        tensors = {name.replace(f"{TEXT}.", "model."): tensor for name, tensor in tensors.items()}
    source = checkpoint.folder
    for file in [] if source is None else sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") or file.name.endswith(".index.json")
        if file.is_file() and file.name != CONFIG and not weights:
            shutil.copyfile(file, folder / file.name)
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a twin, and tell its statistics beside the source's as JSON."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.twins", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("destination")
    for name, default in asdict(Kinds()).items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    source, destination = options.pop("source"), options.pop("destination")
    write(source, destination, **options)
    told = {name: asdict(statistics(_opened(folder))) for name, folder in (("source", source), ("twin", destination))}
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
