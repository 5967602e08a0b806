"""Speed of a bundle on this host, beside the PyTorch reference and the bound of memory bandwidth.

All numbers are wall-clock on the host that ran the command; they say nothing of a phone by themselves.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from export.chat.conversation import chunks
from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import VISION
from export.model.config import FULL, ModelConfig
from export.model.state import cache_rows
from export.validate.transformers_model import cut, hf_config, on_meta, without_deprecations

BUFFER_BYTES = 2**30
WARMUP_STEPS = 4
BURST = 8
"""Decode steps between two readings of the bandwidth."""
SETTLE_SECONDS = 0.05
"""Pause after decode steps: the runtime's threads spin for a while when their work is done."""


def summary(seconds: list[float], tokens: int, warmups: int, threads: int) -> dict[str, Any]:
    """Median, p90 (slow end) and best of repeated runs, in milliseconds and tokens/s."""
    times = np.asarray(seconds)
    return {
        "tokens_per_s_median": tokens / float(np.median(times)),
        "tokens_per_s_p90": tokens / float(np.quantile(times, 0.9)),
        "tokens_per_s_best": tokens / float(times.min()),
        "ms_median": 1e3 * float(np.median(times)),
        "runs": len(seconds),
        "warmups": warmups,
        "threads": threads,
        "source": "host",
    }


def timed(call: Callable[[], Any], runs: int, warmups: int) -> list[float]:
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def example_inputs(manifest: dict[str, Any], signature: str, start: int) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder signature for a call at `start` with no padding: random rows, positions of text."""
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in manifest["signatures"][signature]["inputs"]:
        name, shape = tensor["name"], tensor["shape"]
        if name == "embeddings":
            inputs[name] = np.random.default_rng(0).standard_normal(shape).astype(tensor["dtype"]) * 0.02
        elif name == "position_ids":
            inputs[name] = np.tile(np.arange(start, start + shape[1], dtype=np.int32), (3, 1))
        else:
            rows = manifest["signatures"][signature]["inputs"][0]["shape"][1]
            inputs[name] = np.asarray([start if name == "start" else rows], np.int32)
    return inputs


class Workload:
    """A prompt of random ids and the decode steps after it, on an open session.

    `step` cycles through the rows of the context behind the prompt, so that any number of steps fits.
    """

    def __init__(self, session: Any, manifest: dict[str, Any], prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._session = session
        self._context = int(manifest["context_length"])
        self._plan = list(chunks(prompt_tokens, manifest["prefill_lengths"]))
        random = np.random.default_rng(0)
        vocabulary = min(manifest["model"]["vocab_size"], 2**16)
        self._token = random.integers(0, vocabulary, (1, 1))
        ids = random.integers(0, vocabulary, (1, prompt_tokens))
        self._rows = session.run("embed", {"input_ids": ids})["embeddings"][0]
        self._place = prompt_tokens

    def prefill(self) -> None:
        """The whole prompt, from an empty context."""
        self._session.reset()
        first = 0
        for length, valid in self._plan:
            self._call(first, length, valid)
            first += valid
        self._place = self.prompt_tokens

    def step(self) -> None:
        """Embed and decode one token."""
        if self._place == self._context:
            self._place = self.prompt_tokens
        self._session.run("embed", {"input_ids": self._token})
        self._call(self._place, None, 1)
        self._place += 1

    def _call(self, first: int, length: int | None, valid: int) -> None:
        size = length or 1
        chunk = np.zeros((1, size, self._rows.shape[1]), self._rows.dtype)
        chunk[0, :valid] = self._rows[:valid]
        inputs: dict[str, NDArray[Any]] = {
            "embeddings": chunk,
            "position_ids": np.tile(np.arange(first, first + size, dtype=np.int32), (3, 1)),
            "start": np.asarray([first], np.int32),
        }
        if length is not None:
            inputs["valid"] = np.asarray([valid], np.int32)
        self._session.run("decode" if length is None else f"prefill_{length}", inputs)


def measure_speed(work: Workload, threads: int, runs: int, steps: int, *, warm: bool = True) -> dict[str, Any]:
    """Prefill, `runs` times, then `steps` decode steps in a row; `warm`: each behind some that do not count."""
    before, steps_before = (1, WARMUP_STEPS) if warm else (0, 0)
    prefill_seconds = timed(work.prefill, runs, before)
    decode_seconds = timed(work.step, steps, steps_before)
    return {
        "prefill": {
            **summary(prefill_seconds, work.prompt_tokens, before, threads),
            "prompt_tokens": work.prompt_tokens,
        },
        "decode": summary(decode_seconds, 1, steps_before, threads),
    }


def measure_bursts(work: Workload, bandwidth: Bandwidth, count: int) -> list[dict[str, Any]]:
    """Decode speed beside the memory's: seconds a step, bytes/s by kind of page.

    Memory is read before and after every `BURST` decode steps, because a shared host may change its speed
    twofold within seconds; a burst is held to the mean of its own two readings.
    """
    timed(work.step, 0, WARMUP_STEPS)
    bursts = []
    before = bandwidth.read()
    for _ in range(count):
        seconds = timed(work.step, BURST, 0)
        after = bandwidth.read()
        rates = {name: (before[name] + after[name]) / 2 for name in after}
        bursts.append({"step_s": float(np.median(seconds)), "bytes_per_s": rates})
        before = after
    return bursts


def cache_row_bytes(manifest: dict[str, Any]) -> int:
    """Bytes that one token of context adds to the KV cache, all layers together."""
    rows = cache_rows(manifest["context_length"], tuple(manifest["prefill_lengths"]))
    total = 0
    for state in manifest["states"]:
        if state["kind"] in ("key", "value"):
            total += math.prod(state["shape"]) // rows * np.dtype(state["dtype"]).itemsize
    return total


@without_deprecations()
def measure_reference(
    checkpoint: Checkpoint, config: ModelConfig, threads: int, prompt_tokens: int, runs: int, steps: int
) -> dict[str, Any] | None:
    """transformers in float32 on the same host, or None where it would not fit the free memory.

    Also None for models cut to their first linear layers: transformers' cache cannot count tokens without a
    full-attention layer.
    """
    if FULL not in config.text.layer_types:
        return None
    from transformers import Qwen3_5ForConditionalGeneration

    settings = cut(hf_config(checkpoint, config), config.text.layer_types, vision=config.vision is not None)
    model = on_meta(lambda: Qwen3_5ForConditionalGeneration(settings))
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > 0.5 * psutil.virtual_memory().available:
        return None
    names = {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    if config.vision is None:  # a decoder saved alone has no tensors of the encoder, and no picture is shown
        names = {name for name in names if not name.startswith(VISION)}
    if not config.text.tie_word_embeddings:
        names.add("lm_head.weight")
    model = model.to_empty(device="cpu")
    model.load_state_dict({n: checkpoint.read(n) for n in names}, strict=False, assign=True)
    model.tie_weights()
    rope = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rope)(settings.text_config)
    if config.vision is not None:
        rope = model.model.visual.rotary_pos_emb
        model.model.visual.rotary_pos_emb = type(rope)(rope.config)
    model.eval()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = torch.randint(0, min(config.text.vocab_size, 2**16), (1, prompt_tokens))
        with torch.inference_mode():
            prefill_seconds = timed(lambda: model(input_ids=ids, logits_to_keep=1), runs, 1)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            step = lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # noqa: E731
            decode_seconds = timed(step, steps, 2)
    finally:
        torch.set_num_threads(before)
    return {
        "prefill": {**summary(prefill_seconds, prompt_tokens, 1, threads), "prompt_tokens": prompt_tokens},
        "decode": summary(decode_seconds, 1, 2, threads),
    }


class Bandwidth:
    """Speed of reading memory with `threads` threads, over 4 KiB pages and, where the host has them, huge ones.

    A context manager: it holds a private anonymous buffer of 1 GiB for each kind of page.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # Not torch's threads: those spin long enough after a pass to take 10 % off the next decode steps.
        self._pool = ThreadPoolExecutor(threads)
        self._regions: dict[str, mmap.mmap] = {}

    def __enter__(self) -> Bandwidth:
        for name, advice in (("pages_4k", "MADV_NOHUGEPAGE"), ("pages_huge", "MADV_HUGEPAGE")):
            # Without that advice (macOS) the system's ordinary pages are all there is to read.
            if name == "pages_huge" and not hasattr(mmap, advice):
                continue
            region = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, advice):
                region.madvise(getattr(mmap, advice))
            np.frombuffer(region, np.int64)[:] = 1
            self._regions[name] = region
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        for region in self._regions.values():
            region.close()

    def read(self) -> dict[str, float]:
        """Bytes/s by kind of page, of one pass each."""
        time.sleep(SETTLE_SECONDS)
        rates = {}
        for name, region in self._regions.items():
            parts = np.array_split(np.frombuffer(region, np.int64), self._threads)
            begin = time.perf_counter()
            list(self._pool.map(np.sum, parts))  # numpy lets go of the interpreter's lock
            rates[name] = BUFFER_BYTES / (time.perf_counter() - begin)
            del parts
        return rates
