"""The bundle's own answers judge it: right bundles pass, and what answers garbage, nothing or one token does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.__main__ import main
from export.sizes import shipped_tiny
from export.validate import judge, transformers_model
from export.validate.amounts import Amounts
from export.validate.scores import Scores
from runtime_tests.faults import always, blurred, lost_between_chunks, shuffled, spoiled
from targets.to_onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("one_thread", "judged_once", "compared_once")

FEW = Amounts(probe=48, drift=24, chats=8, positions=120)
Checks = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny as a folder of somebody's: without its task, it has prose before it that it never learned."""
    return Path(shutil.copytree(shipped_tiny(), tmp_path_factory.mktemp("source") / "my-model"))


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("answers") / "int4"
    words = ["--target", "onnx", "--checkpoint", str(source), "--skip-validation", "--quiet", "--threads", "1"]
    assert main([*words, "-o", str(output)]) == 0
    return output


def climbed(bundle: Path, source: Path, patch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """Exit code and L3 of `validate --rung L3` with few answers."""
    patch.setattr(judge, "amounts_for", lambda weights: FEW)
    report = bundle.parent / "report.json"
    words = ["validate", str(bundle), "--checkpoint", str(source), "--rung", "L3", "--quiet", "--threads", "1"]
    code = main([*words, "--report", str(report)])
    return code, json.loads(report.read_text(encoding="utf-8"))["rungs"]["L3"]


def by_name(rung: dict[str, Any]) -> Checks:
    return {check["name"]: check for check in rung["checks"]}


def failing(rung: dict[str, Any]) -> set[str]:
    return {name.removeprefix("L3.") for name, check in by_name(rung).items() if check["status"] == "FAIL"}


def test_a_right_bundle_of_a_checkpoint_that_knows_no_prose_passes(
    bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, rung = climbed(bundle, source, monkeypatch)
    checks, notes = by_name(rung), " ".join(rung["notes"])
    assert code == 0 and failing(rung) == set()
    assert 0.001 < checks["L3.own_kl"]["value"] < 0.2
    assert checks["L3.own_positions"]["value"] == checks["L3.given_positions"]["value"] == 120
    assert checks["L3.kl_mean"]["status"] == checks["L3.drift"]["status"] == "RECORDED"
    assert "never learned the text of the probe: transformers' perplexity on it is" in notes
    assert "scored 120 positions of the bundle's own answers to 8 conversations and 120 of the reference's" in notes
    assert "given by this project's modules in float32 and read by transformers" in notes
    assert checks["L3.reference_agrees"]["value"] == 1
    series = rung["series"]
    assert len(series["chats"]) == len(series["own_kl"]) == len(series["given_kl"]) == 8
    assert len(series["kl"]) == len(series["rows"]) and len(series["picture_kl"]) == len(series["picture_rows"])


FAULTS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "a blurred head": (blurred, {"own_kl", "own_top1", "own_perplexity", "given_kl", "given_top1"}),
    "shuffled logits": (shuffled, {"own_kl", "own_top1", "own_perplexity", "given_kl", "given_top1"}),
    "answers that stop at once": (always(394), {"answered", "stopped_at_once", "given_kl"}),  # <|im_end|>
    "answers of one token": (always(65), {"one_token", "own_kl", "own_perplexity", "given_kl"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_garbage_fails(fault: str, bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, wanted = FAULTS[fault]
    spoiled(OnnxSession, spoil)(monkeypatch)
    code, rung = climbed(bundle, source, monkeypatch)
    assert code == 3
    assert failing(rung) >= wanted


@pytest.mark.parametrize("kind", ["recurrent", "key", "value"])
def test_a_state_lost_between_chunks_shows_in_the_answers(
    kind: str, bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_between_chunks(OnnxSession, kind)(monkeypatch)
    code, rung = climbed(bundle, source, monkeypatch)
    assert code == 3
    assert failing(rung) & {"own_kl", "given_kl"}, by_name(rung)["L3.own_kl"]


def test_the_reference_is_left_out_where_it_does_not_fit(
    bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_model, "bytes_needed", lambda *given: 2**60)
    code, rung = climbed(bundle, source, monkeypatch)
    assert code == 0
    assert "L3.own_kl" in by_name(rung) and "L3.given_kl" not in by_name(rung)
    assert any("The reference gave no answers of its own: its 1152921504.6 GB do not fit" in n for n in rung["notes"])


def test_a_position_weighs_as_much_as_the_reference_is_sure() -> None:
    """Sure and untouched, against lost among 64 tokens and wrong."""
    sure = np.zeros((1, 64), np.float32)
    sure[0, 3] = 30.0
    vague = np.zeros((1, 64), np.float32)
    moved = vague.copy()
    moved[0, :32] = 3.0
    found = Scores.of(np.concatenate([sure, vague]), np.concatenate([sure, moved]), [3, None])
    assert found.weights == pytest.approx([1, 1 / 64])
    assert found.kl[0] == pytest.approx(0, abs=1e-9) and found.kl[1] > 0.5
    assert found.kl_mean == pytest.approx(found.kl[1] / 65, rel=1e-3)
    assert found.perplexity_reference == pytest.approx(1)


def test_a_text_on_which_the_reference_is_worse_than_chance_is_lost() -> None:
    logits = np.zeros((2, 64), np.float32)
    logits[:, 5] = 9.0  # sure of a token that does not come
    assert Scores.of(logits, logits, [1, 2]).lost(64)
    assert not Scores.of(logits, logits, [5, 5]).lost(64)


def test_near_ties_are_ambiguous_and_a_nan_passes_no_gate() -> None:
    reference = np.zeros((2, 8), np.float32)
    reference[:, 1], reference[:, 2] = [9.0, 9.0], [8.97, 5.0]
    bundle = reference.copy()
    bundle[:, 2] = 9.5
    found = Scores.of(reference, bundle, [1, 1])
    assert list(found.tie) == [1, 0] and found.top1 == 0
    assert found[:1].top1 == 1
    assert np.isnan(Scores.of(reference, bundle * np.float32("nan"), [1, 1]).kl_mean)
