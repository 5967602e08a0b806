"""What a bundle is, how large and how fast: the numbers of the manifest and of latency.json as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from export.report.plots import amount

RUNTIMES = {"onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch", "coreml": "Core ML"}
BESIDES = ("report", "card", "chat_tests")
"""Roles of files that describe a bundle and that an app does not need."""


def facts(manifest: dict[str, Any], report: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """(what, value) of the bundle: model, runtime, weights, room, size, memory, work of a token."""
    model, target = manifest["model"], manifest["target"]
    origin = {"random": "random weights", "path": f"from {model['source']['id']}"}
    came = origin.get(model["source"]["kind"], f"from {model['source']['id']}")
    adapter = f", with the adapter {model['source']['adapter']} merged" if model["source"].get("adapter") else ""
    yield (
        "Model",
        f"Qwen3.5 {model['size']} ({model['variant']}), {count(model['num_parameters'])} parameters, {came}{adapter}",
    )
    profile = f", profile {target['profile']}" if target.get("profile") else ""
    yield "Runtime", f"{RUNTIMES.get(target['runtime'], target['runtime'])} {target['min_version']} or newer{profile}"
    yield "Weights", f"recipe {manifest['quantization']['recipe']}: {settings(manifest)}"
    lengths = ", ".join(map(str, manifest["prefill_lengths"]))
    chunks = f", read in chunks of {lengths}" if lengths else ", read one token at a time"
    yield "Context", f"{manifest['context_length']:,} tokens{chunks}"
    sizes = ", ".join(f"{height} × {width}" for height, width in manifest["image_sizes"])
    yield "Pictures", f"{sizes} pixels (height × width)" if sizes else "none"
    size = needed_bytes(manifest)
    if size:
        yield "Size", f"{megabytes(size)} of files that an app needs"
    yield "Memory", memory(manifest, size)
    latency = (report or {}).get("latency", {}).get("bundle", {})
    if "decode_bytes" in latency:
        work = f"reads {megabytes(latency['decode_bytes'])}"
        if "decode_macs" in latency:
            work += f" and takes {count(latency['decode_macs'])} multiply-accumulates"
        yield "A new token", f"{work}, behind about {latency['prefill']['prompt_tokens']:,} others"
    task = ((report or {"rungs": {}})["rungs"].get("L3") or {"series": {}})["series"].get("task")
    if task:
        before, after = (100 * sum(task[who].values()) / len(task[who]) for who in ("reference", "bundle"))
        yield "Own task", f"{after:.1f} % of the answers right, {before:.1f} % in the original"


def settings(manifest: dict[str, Any]) -> str:
    """Bits and groups, with the roles that have them: "4 bits in groups of 128 (decoder, head), 8 bits … (vision)"."""
    found: dict[str, list[str]] = {}
    for role, each in manifest["quantization"]["roles"].items():
        group = f" in groups of {each['group_size']}" if each.get("group_size") else " by channel"
        bits = f"{each['bits']} bits{group if each['bits'] < 16 else ''}"
        found.setdefault(bits, []).append(role.replace("_", " ").replace("lm head", "head"))
    return "; ".join(f"{bits} for {', '.join(roles)}" for bits, roles in found.items())


def needed_bytes(manifest: dict[str, Any]) -> int:
    """Files that an app ships: all but those that only describe the bundle."""
    return sum(int(each["bytes"]) for each in manifest["files"] if each["role"] not in BESIDES)


def memory(manifest: dict[str, Any], size: int) -> str:
    """What a session holds, computed: the states of its context, beside the weights."""
    states = sum(math.prod(each["shape"]) * np.dtype(each["dtype"]).itemsize for each in manifest["states"])
    weights = "those files, which a system may map and drop," if size else "the files"
    return f"{weights} and {megabytes(states)} for the states of a full context; the runtime's own comes on top"


def speed(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the bundle and PyTorch as in latency.json, if they were timed; never of an emulation, whose speed says
    nothing of a runtime.
    """
    latency: dict[str, Any] | None = (report or {}).get("latency")
    if latency is None or latency["bundle"]["decode"]["source"] != "host":
        return None
    return latency


def emulated(report: dict[str, Any] | None) -> bool:
    """Whether a latency was measured that is not shown."""
    return "latency" in (report or {}) and speed(report) is None


def megabytes(size: int) -> str:
    """Bytes in decimal units, as disks and stores count."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1.0, "bytes"))
    return f"{amount(size / unit)} {name}"


def count(number: int) -> str:
    """A large number: "873 million"."""
    unit, name = next(((u, n) for u, n in ((1e9, " billion"), (1e6, " million")) if number >= u), (1.0, ""))
    return f"{number / unit:.3g}{name}" if name else f"{number:,}"
