"""Bundles made before a change of the project still open, answer and are told apart from damaged ones.

`legacy/` holds one of each target, exported by commit 9eef24c from the shipped checkpoint (int4, pictures of 64x96,
context 256), before manifests said which ids are real. Whoever changes the contract adds bundles, and removes none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.conversation import Contract
from targets import TARGETS

LEGACY = Path(__file__).with_name("legacy")
DEMO = Path(__file__).parents[1] / "docs" / "demo.png"


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_of_the_commit_before_opens_and_answers(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(LEGACY / target)
    assert "num_tokens" not in bundle.manifest["tokenizer"], "the fixture is older than that field"
    assert Contract.of(bundle.manifest).context_length == 256
    words = ["run", str(LEGACY / target), "--image", str(DEMO), "--prompt", "Read.", "--prompt", "12+30=?"]
    assert main([*words, "--json", "--quiet", "--threads", "1", "--max-new-tokens", "12"]) == 0
    # What its own commit answered; four bits of tiny read well and add worse.
    assert json.loads(capsys.readouterr().out)["answers"] == ["K7X", "41"]


@pytest.mark.parametrize("target", TARGETS)
def test_its_weights_are_still_those_of_the_quantiser(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(LEGACY / target), "--rung", "L2", "--threads", "1", "--quiet", "--json"]) == 0
    rungs = json.loads(capsys.readouterr().out)["rungs"]
    checks = {check["name"]: check["value"] for check in rungs["L2"]["checks"]}
    assert checks["L2.mismatches"] == 0 and checks["L2.missing"] == 0 and checks["L2.weights"] > 3e6


def test_validate_asks_for_what_the_bundle_was_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(LEGACY / "onnx", tmp_path / "bundle"))
    words = ["validate", str(bundle), "--rung", "L2", "--threads", "1", "--quiet"]

    def error(*more: str) -> str:
        assert main([*words, *more]) == 2
        return capsys.readouterr().err

    assert "--adapter x: no adapter was merged into the bundle; leave it out" in error("--adapter", "x")
    assert "made from 'checkpoints/tiny', not from random weights" in error("--checkpoint", "random")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["source"]["adapter"] = "mine"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    for more in ([], ["--adapter", "none"]):
        assert "the adapter 'mine' was merged into the bundle; give it with --adapter PATH" in error(*more)
