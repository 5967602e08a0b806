"""Speed of the recipe `int4` on 0.8B shapes: ONNX beside onnxruntime-genai's own builder, ExecuTorch beside
ONNX, each pair in the same run.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.__main__ import main
from export.bundle.reader import Bundle
from export.checkpoint.random import RandomCheckpoint
from export.sizes import SIZES
from export.validate import bench
from targets import load_target

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
CONTEXT, PROMPT, STEPS, THREADS, ROUNDS = 1024, 512, 96, 2, 5
COMPARED = ("onnx", "executorch")  # Core ML is interpreted here: its speed says nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def bundles(folder: Path) -> dict[str, Path]:
    for target in COMPARED:
        words = ["--target", target, "--size", "0.8b", "--checkpoint", "random", "--context-length", str(CONTEXT)]
        words += ["--recipe", "int4", "--no-vision", "--skip-validation", "--quiet"]
        assert main([*words, "-o", str(folder / target)]) == 0
    return {target: folder / target for target in COMPARED}


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Path:
    """The same random weights as a published-form folder, built by the other runtime's int4 CPU default."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    pytest.importorskip("onnx_ir", reason="the builder of onnxruntime-genai needs onnx-ir")
    source = folder / "published"
    source.mkdir()
    config = SIZES["0.8b"].config
    assert config is not None
    checkpoint = RandomCheckpoint(config, 0, "0.8b")
    tensors = {name: checkpoint.read(name).to(torch.bfloat16) for name in checkpoint.names()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(checkpoint.config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, source / name)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
    command += ["-o", str(folder / "theirs"), "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder / "theirs"


def measure_theirs(path: Path) -> tuple[float, float]:
    """(prefill, decode) tokens/s, medians, as that runtime's own benchmark times them."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    options = {"intra_op_num_threads": THREADS, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    ids = np.random.default_rng(0).integers(0, 2**16, PROMPT).astype(np.int32)
    prefill, decode = [], []
    for run in range(4):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        generator = og.Generator(model, parameters)
        begin = time.perf_counter()
        generator.append_tokens(ids)
        prefill.append(time.perf_counter() - begin)
        for _ in range(STEPS // 3 if run else 4):
            begin = time.perf_counter()
            generator.generate_next_token()
            decode.append(time.perf_counter() - begin)
        if not run:
            prefill.clear()
            decode.clear()
        del generator
    return PROMPT / statistics.median(prefill), 1 / statistics.median(decode)


def measure_ours(path: Path) -> dict[str, Any]:
    bundle = Bundle.open(path, verify=False)
    target = load_target(bundle.manifest["target"]["name"])
    return bench.measure_bundle(target, path, bundle.manifest, THREADS, 3, PROMPT, STEPS)


def test_executorch_keeps_up_with_onnx(bundles: dict[str, Path]) -> None:
    """Decode at least 80 % and a prefill of 512 tokens at least 65 % of the ONNX bundle's, medians of the rounds."""
    rows = []
    for _ in range(ROUNDS):
        found = {target: measure_ours(path) for target, path in bundles.items()}
        rows.append(
            {
                f"{target} {phase}": entry[phase]["tokens_per_s_median"]
                for target, entry in found.items()
                for phase in ("prefill", "decode")
            }
        )
    sys.stdout.write(json.dumps([{k: round(v, 2) for k, v in row.items()} for row in rows], indent=1))
    ratio = {
        phase: statistics.median(row[f"executorch {phase}"] / row[f"onnx {phase}"] for row in rows)
        for phase in ("prefill", "decode")
    }
    sys.stdout.write(json.dumps(ratio))
    assert ratio["decode"] >= 0.8, rows
    assert ratio["prefill"] >= 0.65, rows


def test_faster_than_the_other_builder_and_near_the_bandwidth_bound(bundles: dict[str, Path], theirs: Path) -> None:
    rows = []
    for _ in range(ROUNDS):  # in turn, so that a slow minute of the machine hits both
        mine = measure_ours(bundles["onnx"])
        prefill, decode = measure_theirs(theirs)
        rows.append(
            {
                "prefill": mine["prefill"]["tokens_per_s_median"],
                "decode": mine["decode"]["tokens_per_s_median"],
                "their prefill": prefill,
                "their decode": decode,
                "share": mine["bandwidth"]["pages_4k"]["share"],
                "GB/s": mine["bandwidth"]["pages_4k"]["bytes_per_s"] / 1e9,
            }
        )
    sys.stdout.write(json.dumps([{k: round(v, 2) for k, v in row.items()} for row in rows], indent=1))
    # Of each round's pair, not of the columns: the machine changes between rounds by more than the margins.
    ratio = {key: statistics.median(row[key] / row[f"their {key}"] for row in rows) for key in ("prefill", "decode")}
    ratio["share"] = statistics.median(row["share"] for row in rows)
    sys.stdout.write(json.dumps(ratio))
    assert ratio["decode"] >= 1.25, rows
    assert ratio["prefill"] >= 1.8, rows
    # Fails where the host gives the two cores a memory link each (51 GB/s): see docs/LOG.md, "Where we stand".
    assert ratio["share"] >= 0.6, rows
