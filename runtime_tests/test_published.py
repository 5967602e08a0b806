"""The published form at true widths and vocabulary: from the folder by the command line to a checked, running bundle.

0.8B on every target; the slow tests are the larger sizes, and the rungs that take long at this vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.__main__ import main
from export.chat.chat import Chat
from export.chat.conversation import Contract
from export.checkpoint import open_checkpoint
from export.checkpoint.check import MTP_NOTICE
from export.checkpoint.names import EMBEDDING, HEAD
from export.checkpoint.shards import INDEX
from export.spec import ExportSpec
from export.validate import judge
from export.validate.amounts import Amounts
from runtime_tests import published
from runtime_tests.test_scale import BUSY, MOST_GIB, watched
from targets import TARGETS

DEMO = Path(__file__).parents[1] / "docs" / "demo.png"
STOPS = "stops at <|im_end|> (248046, named by the template and the tokenizer) and <|endoftext|> (248044, named"
SHAPES = ["--context-length", "256", "--prefill-lengths", "64", "--image-sizes", "64x96", "--threads", "1"]
GIVEN_NEW = 4
RUNGS = {"onnx": ("L0", "L2", "L3"), "executorch": ("L2",), "coreml": ("L2",)}
"""Rungs of the default tests."""

pytestmark = pytest.mark.usefixtures("one_thread", "hints_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """0.8B, 650 MB, for the tests of this process."""
    made = published.write(tmp_path_factory.mktemp("published") / "qwen3.5-0.8b", "0.8b")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """For bundles; hundreds of megabytes each, so that nothing stays."""
    yield tmp_path
    shutil.rmtree(tmp_path)


class Answers:
    """What `run` generates: the ids of answers, and the likeliest three ids of every step before the mask."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ids: list[list[int]] = []
        self.unmasked: list[list[int]] = []
        answer, mask = Chat.answer, Contract.mask

        def told(chat: Chat, *given: Any, **options: Any) -> tuple[list[int], list[int]]:
            prompt, new = answer(chat, *given, **options)
            self.ids.append(new)
            return prompt, new

        def seen(contract: Contract, logits: NDArray[Any]) -> NDArray[Any]:
            self.unmasked.append(np.argsort(-logits)[:3].tolist())
            return mask(contract, logits)

        patch.setattr(Chat, "answer", told)
        patch.setattr(Contract, "mask", seen)


def manifest_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def check_manifest(bundle: Path, folder: Path, *, status: str, thinks: bool) -> None:
    manifest = manifest_of(bundle)
    model, tokenizer = manifest["model"], manifest["tokenizer"]
    assert manifest["status"] == status
    assert (model["size"], model["vocab_size"], model["license"]) == ("custom", 248_320, "apache-2.0")
    assert model["source"] == {"kind": "path", "id": folder.name, "revision": None, "seed": None}
    assert tokenizer["num_tokens"] == 248_077
    assert tokenizer["stop_token_ids"] == [248_046, 248_044]
    assert tokenizer["never_sampled_ids"] == [*range(248_053, 248_058)]
    assert tokenizer["special_token_ids"] == {"image": 248_056, "vision_start": 248_053, "vision_end": 248_054}
    assert tokenizer["template"] == {
        "list_content": True,
        "pictures": True,
        "thinking": {"default": thinks, "switch": True},
        "tools": True,
    }


def check_answers(bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question, and one about a picture: the forbidden rows are the likeliest and are never said."""
    last, manifest = published.last_token(folder), manifest_of(bundle)
    forbidden = [manifest["model"]["vocab_size"] - 1, manifest["tokenizer"]["special_token_ids"]["image"]]
    lengths = []
    for more in ([], ["--image", str(DEMO)]):
        with pytest.MonkeyPatch.context() as patch:
            answers = Answers(patch)
            words = ["--prompt", "What is written?", "--max-new-tokens", str(GIVEN_NEW), "--threads", "1", "--json"]
            assert main(["run", str(bundle), *words, *more, "--no-verify"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert answers.unmasked == [[*forbidden, last]] * GIVEN_NEW
        assert answers.ids == [[last] * GIVEN_NEW]
        assert said["turns"][0]["new_tokens"] == GIVEN_NEW
        lengths.append(said["turns"][0]["prompt_tokens"])
    assert lengths[1] - lengths[0] == 2 + 2 * 3  # start, end, and a token for every 32x32 pixels of 64x96


def test_the_folder_is_as_published(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    shards = {f"model-{i:05}-of-00002.safetensors" for i in (1, 2)}
    sidecars = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"}
    assert names == {"config.json", "README.md", INDEX, *shards, *sidecars}
    placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert "mtp.fc.weight" in placed and HEAD not in placed
    checkpoint = open_checkpoint(ExportSpec(target="onnx", size="custom", checkpoint=str(folder)))
    assert set(checkpoint.names()) == set(placed)
    assert checkpoint.shape(EMBEDDING) == (248_320, 1024)
    last = published.last_token(folder)
    row = checkpoint.read(EMBEDDING, last, last + 1)
    assert float(row.square().sum()) == pytest.approx(1.0, abs=0.2)
    assert float((checkpoint.read(EMBEDDING, 248_319, 248_320) / row).mean()) == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_the_published_form_is_exported_checked_and_runs(
    target: str,
    folder: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L0 has no part of a target in it and is climbed once. At this vocabulary the other rungs take longer than all
    else here: L1 everywhere, and L3 on the others, are in the slow tests. Probes are short for the same reason.
    """
    monkeypatch.setattr(judge, "amounts_for", lambda weights: Amounts(probe=24, drift=16, chats=3, positions=12))
    bundle = place / "bundle"
    words = ["--target", target, "--checkpoint", str(folder), *SHAPES, "--skip-validation", "-o", str(bundle)]
    assert main(words) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert MTP_NOTICE in told and STOPS in told and "error" not in told and "generation_config" not in told
    check_manifest(bundle, folder, status="unvalidated", thinks=False)
    rungs = [word for rung in RUNGS[target] for word in ("--rung", rung)]
    words = ["validate", str(bundle), "--checkpoint", str(folder), *rungs, "--threads", "1"]
    assert main(words) == 0
    found = {row.split()[0]: row for row in capsys.readouterr().out.splitlines() if row.startswith("L")}
    assert {name.split(".")[0] for name in found} == set(RUNGS[target])
    assert "PASS" in found["L2.mismatches"]
    if "L0" in RUNGS[target]:
        assert "PASS" in found["L0.whole_model"]
    check_answers(bundle, folder, capsys)


LIMITS = [
    # size, target, most seconds of processor time, most GiB. Processes beside an export slow its memory, and make the
    # time of 0.8B a third longer.
    ("0.8b", "executorch", 240, 6),
    ("0.8b", "coreml", 400, 12),
    ("2b", "onnx", 300, 8),
    ("4b", "onnx", 400, 10),
    ("9b", "onnx", 400, 10),
    ("9b", "executorch", 400, 10),
    ("9b", "coreml", 600, 16),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "target", "most_seconds", "most_gib"), LIMITS)
def test_larger_sizes_climb_the_whole_ladder(
    size: str, target: str, most_seconds: float, most_gib: float, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported and validated by default, then asked. 9B with a table and a head of 32,768 rows and tiny's tokenizer."""
    folder = published.write(place / f"qwen3.5-{size}", size, cut=size == "9b")
    bundle = place / "bundle"
    words = ["--target", target, "--checkpoint", str(folder), *SHAPES, "--quiet", "-o", str(bundle)]
    with capsys.disabled():  # with -s the figures are shown
        used = watched([sys.executable, "-m", "export", *words])
    assert used.processor_seconds <= most_seconds
    assert used.gib <= most_gib
    if size == "9b":
        manifest = manifest_of(bundle)
        assert (manifest["model"]["vocab_size"], manifest["tokenizer"]["num_tokens"]) == (published.CUT_ROWS, 412)
        assert manifest["tokenizer"]["stop_token_ids"] == [394, 392]
    else:
        check_manifest(bundle, folder, status="validated", thinks=size == "4b")
    capsys.readouterr()
    check_answers(bundle, folder, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "most_minutes"), [("onnx", 8), ("executorch", 8), ("coreml", 20)])
def test_a_whole_checkpoint_is_judged_in_time(
    target: str, most_minutes: float, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.8B with all its layers and by default in every option: texts are read and conversations answered, as with a
    real one. Held as in `test_scale`.
    """
    folder = published.write(place / "qwen3.5-0.8b-whole", "0.8b", whole=True)
    bundle = place / "bundle"
    words = ["--target", target, "--checkpoint", str(folder), "--quiet", "-o", str(bundle)]
    with capsys.disabled():
        used = watched([sys.executable, "-m", "export", *words])
    assert used.processor_seconds <= BUSY * 60 * most_minutes
    assert used.gib <= MOST_GIB
    checks = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))["rungs"]["L3"]["checks"]
    scored = {check["name"]: check["value"] for check in checks}
    assert min(scored["L3.own_positions"], scored["L3.given_positions"]) >= 240
    assert scored["L3.drift_steps"] == 256
