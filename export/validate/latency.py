"""Speed of a bundle on this host, beside the PyTorch reference and the bound of memory bandwidth.

All numbers are wall-clock on the host that ran the command; they say nothing of a phone by themselves.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from export.checkpoint.base import Checkpoint
from export.model.config import ModelConfig
from export.validate.reference import _on_meta, hf_config

BUFFER_BYTES = 2**30


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


def measure_session(
    session: Any, manifest: dict[str, Any], threads: int, prompt_tokens: int, runs: int, steps: int
) -> dict[str, Any]:
    """Prefill of `prompt_tokens` from an empty context and `steps` single decode steps after it."""
    from export.chat.conversation import chunks

    context = manifest["context_length"]
    prompt_tokens = min(prompt_tokens, context - 1)
    steps = min(steps, context - prompt_tokens - 4)
    vocab = manifest["model"]["vocab_size"]
    random = np.random.default_rng(0)
    ids = random.integers(0, min(vocab, 2**16), (1, prompt_tokens))
    rows = session.run("embed", {"input_ids": ids})["embeddings"][0]
    plan = list(chunks(prompt_tokens, manifest["prefill_lengths"]))

    def call(first: int, length: int | None, valid: int) -> None:
        size = length or 1
        chunk = np.zeros((1, size, rows.shape[1]), rows.dtype)
        chunk[0, :valid] = rows[:valid]
        inputs: dict[str, NDArray[Any]] = {
            "embeddings": chunk,
            "position_ids": np.tile(np.arange(first, first + size, dtype=np.int32), (3, 1)),
            "start": np.asarray([first], np.int32),
        }
        if length is not None:
            inputs["valid"] = np.asarray([valid], np.int32)
        session.run("decode" if length is None else f"prefill_{length}", inputs)

    def prefill() -> None:
        session.reset()
        first = 0
        for length, valid in plan:
            call(first, length, valid)
            first += valid

    prefill_seconds = timed(prefill, runs, 1)
    place = iter(range(prompt_tokens, context))
    token = random.integers(0, min(vocab, 2**16), (1, 1))

    def step() -> None:
        session.run("embed", {"input_ids": token})
        call(next(place), None, 1)

    decode_seconds = timed(step, max(1, steps), 4)
    return {
        "prefill": {**summary(prefill_seconds, prompt_tokens, 1, threads), "prompt_tokens": prompt_tokens},
        "decode": summary(decode_seconds, 1, 4, threads),
        "cache_bytes": cache_row_bytes(manifest) * (prompt_tokens + len(decode_seconds) // 2),
    }


def cache_row_bytes(manifest: dict[str, Any]) -> int:
    """Bytes that one token of context adds to the KV cache, all layers together."""
    total = 0
    for state in manifest["states"]:
        if state["kind"] in ("key", "value"):
            *_, heads, _, width = state["shape"]
            total += heads * width * np.dtype(state["dtype"]).itemsize
    return total


def measure_reference(
    checkpoint: Checkpoint, config: ModelConfig, threads: int, prompt_tokens: int, runs: int, steps: int
) -> dict[str, Any] | None:
    """transformers in float32 on the same host, or None where it would not fit the free memory."""
    from transformers import Qwen3_5ForConditionalGeneration

    settings = hf_config(checkpoint, config)
    model = _on_meta(lambda: Qwen3_5ForConditionalGeneration(settings))
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > 0.5 * psutil.virtual_memory().available:
        return None
    names = {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
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


def read_bandwidth(threads: int, huge_pages: bool, runs: int = 5) -> list[float]:
    """Bytes/s of summing a 1 GiB anonymous buffer, run by run; empty where pages cannot be chosen."""
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE", None)
    if advice is None and huge_pages:
        return []
    with mmap.mmap(-1, BUFFER_BYTES) as region:
        if advice is not None:
            region.madvise(advice)
        buffer = torch.frombuffer(region, dtype=torch.int64)
        buffer.fill_(1)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            seconds = timed(buffer.sum, runs, 1)
        finally:
            torch.set_num_threads(before)
        del buffer
    return [BUFFER_BYTES / each for each in seconds]
