"""Shared fixtures: small random checkpoints of the true architecture, kept in memory."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from export.model.config import ModelConfig
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.validate import bench, latency, reference
from export.validate.case import Rung, make_plan
from export.validate.lowered import compare_files
from export.validate.probe import make_probe
from runtime_tests.once import Memory
from targets import load_target
from targets.base import Job, Lowered

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers share the processors: threads of torch's own would wait for each other, in child processes too.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def pytest_runtest_call() -> None:
        """An export without --threads takes all processors, and leaves them to the tests behind it."""
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are so small that two threads of torch would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def memory() -> Memory:
    return Memory()


@pytest.fixture(scope="module")
def traced_once(memory: Memory) -> Iterator[None]:
    """Programs of one config and size are traced once, for all files that ask for this."""
    with pytest.MonkeyPatch.context() as patch:
        memory.traces(patch)
        yield


@pytest.fixture(scope="module")
def judged_once(memory: Memory) -> Iterator[None]:
    """transformers computes each sequence and picture once, for all files that ask for this."""
    with pytest.MonkeyPatch.context() as patch:
        memory.transformers(patch)
        yield


@pytest.fixture(scope="module")
def compared_once(memory: Memory) -> Iterator[None]:
    """Our modules compute each sequence, picture and answer once. Not for files that test the modules."""
    with pytest.MonkeyPatch.context() as patch:
        memory.modules(patch)
        memory.answers(patch)
        yield


@pytest.fixture(scope="module")
def hints_once() -> Iterator[None]:
    """ExecuTorch's serialiser looks up the same type hints for every node: most of the time of a small lowering."""
    from executorch.exir._serialize import _dataclass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dataclass, "get_type_hints", functools.cache(_dataclass.get_type_hints))
        yield


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask nothing of speed: the bandwidth of memory is read over 16 MiB, because 2 GiB take seconds to
    fill, and a bundle is measured in this process, because another one takes seconds to import torch.
    """
    monkeypatch.setattr(latency, "BUFFER_BYTES", 2**24)
    monkeypatch.setattr(bench, "measure_apart", bench.measure_here)


BASE: dict[str, Any] = {
    "model_type": "qwen3_5",
    "image_token_id": 5,
    "video_token_id": 8,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 30000.0,  # not the default, which a reader that ignores it would take
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "model_type": "qwen3_5_vision",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
    },
}


class MemoryCheckpoint:
    """A checkpoint held in memory: transformers' own initialisation, made lively by noise."""

    preprocessor: dict[str, Any] | None = None
    folder: Path | None = None

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

        self.config = config
        self.notices: list[str] = []
        self.source = {"kind": "random", "id": "memory", "revision": None, "seed": seed}
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**copy.deepcopy(config)))
        model.train(False)
        self.hf = model
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            # Fresh norms and biases are all ones or zeros; noise makes a swapped or missing one visible.
            if tensor.ndim == 1 or "weight" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            self.tensors[name] = tensor

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.config)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.tensors[name][start:stop].float().clone()

    def sidecar(self, name: str) -> Path | None:
        return None

    def content_key(self) -> str:
        content = hashlib.sha256(repr(self.config).encode())
        for name, tensor in self.tensors.items():
            content.update(name.encode() + tensor.numpy().tobytes())
        return f"memory:{content.hexdigest()}"


def variant(**changes: Any) -> dict[str, Any]:
    """BASE with fields of text_config replaced; `vision` and `tied` reach the other places."""
    config = copy.deepcopy(BASE)
    config["vision_config"].update(changes.pop("vision", {}))
    if "tied" in changes:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = changes.pop("tied")
    rope = changes.pop("rope", {})
    config["text_config"]["rope_parameters"].update(rope)
    config["text_config"].update(changes)
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    return config


VARIANTS: dict[str, dict[str, Any]] = {
    "base": variant(),
    "equal-heads-untied": variant(
        linear_num_key_heads=4, linear_num_value_heads=4, tied=False, intermediate_size=160, num_hidden_layers=4
    ),
    "wide-values-9-layers": variant(
        linear_num_value_heads=8, linear_value_head_dim=16, num_hidden_layers=9, hidden_size=96
    ),
    "head-dim-128-7-layers": variant(
        head_dim=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=7,
        linear_key_head_dim=64,
        rope={"mrope_section": [6, 5, 5]},
        vision={"hidden_size": 96, "num_heads": 2, "num_position_embeddings": 144, "depth": 1},
    ),
    "no-gqa-6-layers": variant(
        num_key_value_heads=4, num_hidden_layers=6, head_dim=32, rope={"mrope_section": [2, 1, 1]}
    ),
}


SIZES = ((64, 96), (96, 64))
LENGTHS = (16, 64)
CONTEXT = 128


def build(
    checkpoint: Any,
    folder: Path,
    recipe: Recipe,
    target: str = "onnx",
    *,
    context: int = CONTEXT,
    lengths: tuple[int, ...] = LENGTHS,
    **limits: Any,
) -> tuple[Lowered, dict[str, Any], Quantizer]:
    """Lower a checkpoint; the manifest holds what sessions and the ladder read of it."""
    chosen = load_target(target)
    weights = weights_for(checkpoint, checkpoint.model_config, recipe.conditioning)
    quantizer = Quantizer(weights, recipe, chosen.capabilities.smallest_scale)
    limits = {"profile": chosen.capabilities.profiles[0], **limits}
    lowered = chosen.lower(Job(weights.config, quantizer, context, lengths, SIZES, folder, try_out=False, **limits))
    manifest = {
        "signatures": lowered.signatures,
        "states": lowered.states,
        "context_length": context,
        "prefill_lengths": list(lengths),
        "image_sizes": [list(s) for s in SIZES],
        "target": {
            "name": target,
            "min_version": chosen.min_version,
            "profile": limits["profile"],
        },
        "session_options": lowered.session_options,
        "tokenizer": {"stop_token_ids": [1], "special_token_ids": {"image": 5}},
    }
    return lowered, manifest, quantizer


def climb_l1(
    checkpoint: Any, folder: Path, target: str = "onnx", *, lengths: tuple[int, ...] = LENGTHS, **limits: Any
) -> Rung:
    """Lower without quantisation and compare with our modules."""
    _, manifest, quantizer = build(checkpoint, folder, Recipe.unquantised(), target, lengths=lengths, **limits)
    probe = make_probe(checkpoint.model_config, CONTEXT, SIZES)
    rows = reference.embed(checkpoint, probe.ids)
    plan = make_plan(CONTEXT, lengths)
    weights, runtime = quantizer.weights, load_target(target)
    return compare_files(runtime, folder, manifest, 1, weights, probe, plan, rows, lengths, probe.images)


@pytest.fixture(scope="session", params=list(VARIANTS))
def checkpoint(request: pytest.FixtureRequest) -> MemoryCheckpoint:
    return MemoryCheckpoint(VARIANTS[request.param])


@pytest.fixture(scope="session")
def small() -> MemoryCheckpoint:
    return MemoryCheckpoint(VARIANTS["base"])
