"""Published checkpoints as they are: export, validate and run folders of the published form at true widths.

Weights are random, so that the quality gates of L3 say nothing about them at low bits: L0 to L2 are climbed, and L3
without quantisation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from runtime_tests import published, published_tokenizer
from targets import TARGETS

DEMO = Path(__file__).parents[1] / "docs" / "demo.png"
SHAPES = ["--context-length", "128", "--prefill-lengths", "32", "--image-sizes", "64x96", "--threads", "1"]
HEAD_ROWS = 32_768
"""Of the 9B in slow tests: its untied head and embedding are 2 GB each."""

pytestmark = pytest.mark.usefixtures("one_thread")


def build(checkpoint: Path, target: str, output: Path, *more: str) -> dict[str, Any]:
    words = ["--target", target, "--checkpoint", str(checkpoint), *SHAPES, *more, "-o", str(output), "--quiet"]
    assert main([*words, "--skip-validation"]) == 0
    return Bundle.open(output, verify=False).manifest


def climb(bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], *rungs: str) -> dict[str, float]:
    """Values of all checks of some rungs, which must pass."""
    words = [word for rung in rungs for word in ("--rung", rung)]
    capsys.readouterr()
    words += ["--checkpoint", str(checkpoint), "--threads", "1", "--json", "--quiet"]
    done = main(["validate", str(bundle), *words])
    out, err = capsys.readouterr()
    assert done == 0, err
    found = json.loads(out)["rungs"]
    return {check["name"]: check["value"] for rung in found.values() for check in rung["checks"]}


def counts(bundle: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[int]:
    """Tokens of a prompt and of the answer to it."""
    capsys.readouterr()
    more = ["--json", "--quiet", "--no-verify", "--threads", "1", "--max-new-tokens", "4", *words]
    assert main(["run", str(bundle), "--prompt", "What is written?", *more]) == 0
    turn = json.loads(capsys.readouterr().out)["turns"][0]
    return [turn["prompt_tokens"], turn["new_tokens"]]


@pytest.mark.parametrize("target", TARGETS)
def test_a_published_0_8b_is_exported_validated_and_run(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, bundle = published.folder("0.8b"), tmp_path / "bundle"
    assert not (checkpoint / "generation_config.json").exists()
    manifest = build(checkpoint, target, bundle)
    assert (manifest["model"]["size"], manifest["model"]["license"]) == ("custom", "apache-2.0")
    assert (manifest["model"]["vocab_size"], manifest["model"]["hidden_size"]) == (248_320, 1024)
    tokenizer = manifest["tokenizer"]
    assert tokenizer["stop_token_ids"] == [248_046, 248_044]
    assert tokenizer["num_tokens"] == published_tokenizer.NUM_TOKENS == 248_077
    assert tokenizer["never_sampled_ids"] == [248_053, 248_054, 248_055, 248_056, 248_057]
    assert tokenizer["special_token_ids"] == {"image": 248_056, "vision_start": 248_053, "vision_end": 248_054}
    assert tokenizer["template"]["thinking"] == {"switch": True, "default": False}
    assert tokenizer["template"]["pictures"] and tokenizer["template"]["tools"]
    # L0 does not depend on the target; L1 of the others takes a minute each and is a slow test.
    values = climb(bundle, checkpoint, capsys, *(["L0", "L1", "L2"] if target == "onnx" else ["L2"]))
    assert values["L2.mismatches"] == 0 and values["L2.missing"] == 0 and values["L2.weights"] > 290e6
    if target == "onnx":
        assert 0 < values["L0.whole_model"] < 2e-4
    text = counts(bundle, capsys)
    picture = counts(bundle, capsys, "--image", str(DEMO))
    assert picture[0] == text[0] + 6 + 2, "six tokens of a picture between its start and its end"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("size", "rows"), [("0.8b", None), ("2b", None), ("4b", None), ("9b", HEAD_ROWS)])
def test_every_published_size_is_exported_validated_and_run(
    size: str, rows: int | None, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, bundle = published.folder(size, rows), tmp_path / "bundle"
    manifest = build(checkpoint, target, bundle, "--size", f"{size}-2-layers")
    assert manifest["model"]["size"] == f"{size}-2-layers"
    assert manifest["tokenizer"]["template"]["thinking"] == {"switch": True, "default": size in ("4b", "9b")}
    values = climb(bundle, checkpoint, capsys, "L0", "L1", "L2")
    assert values["L2.mismatches"] == 0 and values["L2.missing"] == 0
    assert 0 < values["L0.whole_model"] < 2e-4
    assert counts(bundle, capsys, "--image", str(DEMO))[0] == counts(bundle, capsys)[0] + 8


@pytest.mark.slow
def test_without_quantisation_a_published_0_8b_passes_the_whole_ladder(tmp_path: Path) -> None:
    words = ["--target", "onnx", "--recipe", "fp32", "--checkpoint", str(published.folder("0.8b")), *SHAPES]
    assert main([*words, "-o", str(tmp_path / "bundle"), "--quiet"]) == 0
