"""Whole Core ML exports of the shipped tiny checkpoint, emulated: task gates, conversations, drift over 1,024 steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import arguments, plan
from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.chat import Chat
from export.chat.conversation import Contract, Conversation, chunks
from export.chat.template import load_tokenizer
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.weights import Weights
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import load_recipe
from export.validate import metrics, reference, task
from export.validate.probe import make_probe
from export.validate.replay import replay
from runtime_tests import checklists
from targets import load_target
from targets.base import Job

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
WORDS = ["--target", "coreml", "--size", "tiny", "--quiet", "--threads", "1"]


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("coreml") / "bundle"
    assert main([*WORDS, "--recipe", "int8", "--profile", "ane", "--skip-validation", "-o", str(output)]) == 0
    return Bundle.open(output)


def test_a_bundle_lists_every_file_and_answers(unchecked: Bundle) -> None:
    listed = {entry["path"]: entry["role"] for entry in unchecked.manifest["files"]}
    inside = "Data/com.apple.CoreML"
    for package in ("decoder", "vision"):
        for file in ("Manifest.json", f"{inside}/model.mlmodel", f"{inside}/weights/weight.bin"):
            assert listed[f"{package}.mlpackage/{file}"] == package
    assert unchecked.manifest["target"] == {
        "name": "coreml", "runtime": "coreml", "min_version": "iOS18", "profile": "ane"
    }  # fmt: skip
    assert unchecked.manifest["session_options"] == {"computeUnits": "cpuAndNeuralEngine"}
    session = load_target("coreml").open(unchecked.path, unchecked.manifest, 1)
    chat = Chat(Conversation(session, Contract.of(unchecked.manifest)), load_tokenizer(unchecked.path))
    sample = task.sample("glyphs", task.HELD_OUT)
    content: Any = [{"type": "image"}, {"type": "text", "text": "Read."}]
    answer = chat.answer([{"role": "user", "content": content}], list(sample.images), max_new_tokens=16)[1]
    assert load_tokenizer(unchecked.path).decode(answer, skip_special_tokens=True) == sample.answer


def test_the_plan_is_close_to_what_is_written(unchecked: Bundle) -> None:
    words = [*WORDS[:4], "--recipe", "int8", "--profile", "ane", "--dry-run"]
    planned = plan.make(arguments.spec_from(arguments.build_parser().parse_args(words)))
    written = sum(entry["bytes"] for entry in unchecked.manifest["files"] if entry["path"].endswith("weight.bin"))
    assert planned.bundle_bytes == pytest.approx(written, rel=0.05)
    states = unchecked.manifest["states"]
    assert planned.state_bytes == sum(math.prod(s["shape"]) * np.dtype(s["dtype"]).itemsize for s in states)


def test_an_emulation_is_never_called_a_host(unchecked: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(unchecked.path), "--runs", "1", "--steps", "2", "--prompt-tokens", "64", "--quiet"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "emulated numbers" in printed
    assert "GB/s" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "profile", "most_drop"),
    [("fp32", "gpu", 0.5), ("int8", "gpu", 1), ("int4", "gpu", 3), ("fp32", "ane", 0.5), ("int8", "ane", 1)],
)
def test_recipes_pass_every_gate(recipe: str, profile: str, most_drop: float, tmp_path: Path) -> None:
    assert main([*WORDS, "--recipe", recipe, "--profile", profile, "-o", str(tmp_path / "bundle")]) == 0
    report = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    checks = {c["name"]: c["value"] for rung in report["rungs"].values() for c in rung["checks"]}
    sys.stdout.write(f"{recipe} {profile} {checks}\n")
    assert report["passed"]
    if recipe != "fp32":
        has = ("pictures", "text", "drift", "layouts", "chats", "task", "observed", "stress")
        checklists.hold(report, "float16", *has, learned=True)
    assert checks["L3.task_drop"] <= most_drop


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "most"), [("separate", 1e-4), ("explicit", 3e-5)])
@pytest.mark.parametrize("profile", ["gpu", "ane"])
def test_drift_over_1024_steps(profile: str, layout: str, most: float, tmp_path: Path) -> None:
    """KL of the last 256 of 1,024 decode steps, with a float16 and a float32 recurrent state (decision 011)."""
    checkpoint, steps, tokens = FolderCheckpoint(TINY), 1024, 1088
    config = checkpoint.model_config
    probe = make_probe(config, tokens, (), seed=1, text=task.text(load_tokenizer(TINY), tokens))
    rows = reference.embed(checkpoint, probe.ids)
    truth, _ = reference.hf_sequence(checkpoint, config, rows, probe.positions, tokens - steps)
    quantizer = Quantizer(Weights(checkpoint, config), load_recipe("fp32"))
    job = Job(config, quantizer, tokens, (64,), (), tmp_path, profile=profile, state_layout=layout)
    lowered = load_target("coreml").lower(job)
    manifest = {
        "signatures": lowered.signatures,
        "states": lowered.states,
        "context_length": tokens,
        "target": {"profile": profile},
        "session_options": lowered.session_options,
    }
    session = load_target("coreml").open(tmp_path, manifest, 1)
    plan = [*chunks(tokens - steps, (64,)), *[(None, 1)] * steps]
    logits = np.stack(replay(session, rows.astype(np.float16), probe.positions, plan, junk=0.0))[-steps:]
    kl = metrics.kl(truth[-steps:], logits)
    sys.stdout.write(f"{profile} {layout}: KL {kl[:256].mean():.1e} first, {kl[-256:].mean():.1e} last 256 steps\n")
    assert kl[-256:].mean() <= most
