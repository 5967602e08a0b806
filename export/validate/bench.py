"""Speed, load time and memory of a bundle on this host, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from export.progress import MemorySampler, quiet_libraries
from export.spec import ExportError, UsageError
from export.validate import latency
from targets import load_target
from targets.base import Target


def measure_apart(folder: Path, manifest: dict[str, Any], threads: int) -> dict[str, Any]:
    """`measure_bundle` in a fresh process.

    In the process that climbed the ladder the heap has grown already and hides what a bundle needs: there the
    peaks of the tiny bundles read 0.3 MiB, here 38 MiB. An emulation, whose times nobody is shown, runs once.

    Raises:
        ExportError: the process was killed, or failed.
    """
    # -P and this process's own search path: the other one must find what this one found, whatever folder it is in. No
    # process of multiprocessing's, which runs a script that calls this a second time.
    command = [sys.executable, "-P", "-m", "export.validate.bench", str(folder.absolute()), str(threads)]
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        input=json.dumps(manifest),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        killed = "was killed, likely for lack of memory"
        reason = killed if done.returncode < 0 else f"failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
        raise ExportError(
            f"the process that measured {folder} {reason}; close other programs, or leave the measurement out: "
            "export with --skip-validation, validate with --rung"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_here(folder: Path, manifest: dict[str, Any], threads: int) -> dict[str, Any]:
    """What `measure_apart` has done, in this process."""
    target = load_target(manifest["target"]["name"])
    once: dict[str, Any] = {} if target.measured == "host" else {"runs": 1, "steps": 1, "warm": False}
    return measure_bundle(target, folder, manifest, threads, **once)


def measure_bundle(
    target: Target,
    folder: Path,
    manifest: dict[str, Any],
    threads: int,
    runs: int = 3,
    prompt_tokens: int | None = None,
    steps: int = 24,
    warm: bool = True,
) -> dict[str, Any]:
    """Speed, load time and peak memory of a bundle, and its share of the bound that read bandwidth, measured
    between decode steps in the same run, sets on the bytes a token must read; that share not of an emulation.

    Args:
        prompt_tokens: by default 512, or half of a shorter context. warm: whether calls go before those that count.

    Raises:
        UsageError: a prompt that leaves no room to decode.
    """
    context = int(manifest["context_length"])
    if prompt_tokens is None:
        prompt_tokens = min(512, context // 2)
    if prompt_tokens >= context:
        raise UsageError(
            f"--prompt-tokens {prompt_tokens}: the bundle's context of {context} must hold the prompt and at least "
            f"one more token; give at most {context - 1}"
        )
    sampler = MemorySampler()
    before = sampler.start_bytes
    sampler.start()
    session = target.open(folder, manifest, threads)
    work = latency.Workload(session, manifest, prompt_tokens)
    result = latency.measure_speed(work, threads, runs, steps, warm=warm)
    result["peak_memory_bytes"] = sampler.stop() - before
    result["load_s"] = session.load_seconds
    cache = latency.cache_row_bytes(manifest) * (prompt_tokens + min(steps, context - prompt_tokens) // 2)
    result["decode_bytes"] = target.decode_bytes(folder, manifest) + cache
    result["bursts"], result["bandwidth"] = [], {}
    for name in ("prefill", "decode"):
        result[name]["source"] = target.measured
    if target.measured == "host":  # what bounds an emulation is no memory
        with latency.Bandwidth(threads) as bandwidth:
            result["bursts"] = latency.measure_bursts(work, bandwidth, max(3, steps // latency.BURST))
        result["bandwidth"] = bandwidth_share(result["bursts"], result["decode_bytes"])
    session.close()
    return result


def measure_operators(
    target: Target, folder: Path, manifest: dict[str, Any], threads: int, start: int
) -> dict[str, list[dict[str, Any]]]:
    """Where the time of `decode` behind `start` tokens, and of the longest prefill, goes by kind of operator."""
    longest = [f"prefill_{max(manifest['prefill_lengths'])}"] if manifest["prefill_lengths"] else []
    found = {}
    for signature in ["decode", *longest]:
        first = start if signature == "decode" else 0
        inputs = latency.example_inputs(manifest, signature, first)
        found[signature] = [asdict(t) for t in target.operator_times(folder, manifest, threads, signature, inputs)]
    return found


def bandwidth_share(bursts: list[dict[str, Any]], decode_bytes: int) -> dict[str, Any]:
    """For each kind of page the median bandwidth, the bound it sets on decode, and the share of its own bound
    that the median burst of decode steps reached.
    """
    shares = {}
    for name in bursts[0]["bytes_per_s"]:
        rates = [burst["bytes_per_s"][name] for burst in bursts]
        rate = statistics.median(rates)
        shares[name] = {
            "bytes_per_s": rate,
            "bytes_per_s_least": min(rates),
            "bytes_per_s_most": max(rates),
            "bursts": len(bursts),
            "bound_tokens_per_s": rate / decode_bytes,
            "share": statistics.median(
                decode_bytes / burst["step_s"] / burst["bytes_per_s"][name] for burst in bursts
            ),
        }
    return shares


def main() -> None:
    """Of that process: the manifest comes in, the numbers go out."""
    torch.set_num_threads(int(sys.argv[2]))
    quiet_libraries()
    sys.stdout.write(json.dumps(measure_here(Path(sys.argv[1]), json.load(sys.stdin), int(sys.argv[2]))) + "\n")


if __name__ == "__main__":
    main()
