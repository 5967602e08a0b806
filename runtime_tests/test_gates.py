"""The table of gates, and the quality rung on the trained checkpoint: good recipes pass, spoiled ones do not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.validate.gates import (
    ACTIVATIONS,
    FLOOR,
    GATES,
    MOST_NOISE,
    RECORDED,
    UnknownCheckError,
    failed,
    gated,
    recorded,
)
from runtime_tests import checklists
from runtime_tests.faults import blurred, fading, lost_between_chunks, spoiled
from targets.to_onnx.session import OnnxSession

# The bundle's session is at fault in this file: the other side of each comparison is the same for all tests.
pytestmark = pytest.mark.usefixtures("judged_once", "compared_once")

ANSWERS = ("own_kl", "own_top1", "own_perplexity", "given_kl", "given_top1", "given_perplexity")
QUALITY = ("kl_mean", "sqnr_db", "top1", "top5", "drift", "chunking", "task_drop", *ANSWERS)
Checks = dict[str, dict[str, Any]]


@pytest.mark.parametrize("name", list(GATES))
def test_every_gate_has_a_reason_and_rejects(name: str) -> None:
    gate = GATES[name]
    worse = -1e-9 if gate.at_least else 1e-9
    hold = partial(gated, name, rounding=1.0 if gate.in_roundings else None, noise=1e-3 if gate.of_noise else None)
    limit = hold(0.0).limit
    assert limit is not None and len(gate.reason) > 10
    assert hold(limit).status == "PASS"
    assert hold(limit + worse).status == "FAIL"
    assert hold(float("nan")).status == "FAIL"
    assert not failed([hold(limit + worse, enforced=False)])


def test_a_check_of_an_unknown_name_is_an_error() -> None:
    with pytest.raises(
        UnknownCheckError,
        match=r"check L3\.kl_mean: there is no gate called L3\.int4\.kl_means \(did you mean L3\.kl_mean\?\); "
        r"add it to GATES, or use `recorded`",
    ):
        gated("L3.kl_mean", 0.1, "L3.int4.kl_means")
    with pytest.raises(UnknownCheckError, match=r"L3\.kl_p98: there is no value without a gate called L3\.kl_p98 "):
        recorded("L3.kl_p98", 0.1)
    with pytest.raises(UnknownCheckError, match=r"there is no gate called L3\.kl_p99"):
        gated("L3.kl_p99", 0.1)
    assert set(GATES).isdisjoint(RECORDED)
    assert all(len(reason) > 5 for reason in RECORDED.values())
    assert recorded("L3.task.recall", 1.0, "L3.task").reason == RECORDED["L3.task"]


def test_rounding_may_add_up_over_layers() -> None:
    limit = GATES["L0.whole_model"].limit
    deep = gated("L0.whole_model", 2.9 * limit, layers=24)
    assert deep.status == "PASS" and deep.limit == pytest.approx(3 * limit) and deep.reason.endswith("here 24")
    assert gated("L0.whole_model", 3.1 * limit, layers=24).status == "FAIL"
    assert gated("L0.whole_model", 1.1 * limit, layers=2).status == "FAIL"


def test_some_limits_count_roundings() -> None:
    times = GATES["L0.states"].limit
    lively = gated("L0.states", 7.9e-5, rounding=1e-5)
    assert lively.status == "PASS" and lively.limit == pytest.approx(times * 1e-5)
    assert lively.reason.startswith(f"{times:g} roundings, here of 1.0e-05: ")
    assert gated("L0.states", 8.1e-5, rounding=1e-5).status == "FAIL"
    assert gated("L0.states", 0.9 * times * FLOOR, rounding=0).status == "PASS"
    assert gated("L0.states", 1e-3, rounding=float("inf")).status == "FAIL", "an overflow is no rounding"
    assert gated("L0.states", float("inf"), rounding=float("nan")).status == "FAIL"
    with pytest.raises(ValueError, match=r"check L0\.states: its gate counts roundings; measure one"):
        gated("L0.states", 1e-6)


def test_some_limits_count_the_noise_of_weights() -> None:
    times = GATES["L3.given_kl"].limit
    small = gated("L3.given_kl", 0.9 * times * 1e-3, noise=1e-3)
    assert small.status == "PASS" and small.limit == pytest.approx(times * (1e-3 + ACTIVATIONS))
    assert small.reason.startswith(f"{times:g} times the noise of weights and activations, here of 1.1e-03: ")
    assert gated("L3.given_kl", 1.2 * times * 1e-3, noise=1e-3).status == "FAIL"
    assert gated("L3.given_kl", times * ACTIVATIONS, noise=0).status == "PASS"
    assert gated("L3.given_kl", 0.9, noise=1).limit == MOST_NOISE, "destroyed weights excuse nothing"
    assert gated("L3.given_kl", 0.1, noise=float("nan")).status == "FAIL"
    share = GATES["L3.state_noise"].limit * (1e-3 + ACTIVATIONS)
    assert gated("L3.state_noise", 0, noise=1e-3, layers=24).limit == pytest.approx(3 * share)
    assert gated("L3.state_noise", 0, noise=0.02, layers=24).limit == MOST_NOISE
    with pytest.raises(ValueError, match=r"check L3\.own_kl: its gate counts the noise of weights; measure it"):
        gated("L3.own_kl", 0.1)


def test_every_kind_of_recipe_has_every_gate() -> None:
    for kind in ("fp32", "fp16", "int8", "int4"):
        names = [name for name in QUALITY if f"L3.{kind}.{name}" not in GATES]
        assert all(f"L3.{name}" in GATES for name in names)
        assert kind.startswith("int") or not names, "what nothing rounds has gates of its own"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gates") / "int4"
    words = ["--target", "onnx", "--size", "tiny", "--recipe", "int4", "-o", str(output)]
    assert main([*words, "--skip-validation", "--quiet", "--threads", "1", "--no-vision"]) == 0
    return output


def quality(bundle: Path) -> tuple[int, Checks]:
    """Exit code and checks of `python -m export validate BUNDLE --rung L3`."""
    report = bundle.parent / "report.json"
    code = main(["validate", str(bundle), "--rung", "L3", "--quiet", "--threads", "1", "--report", str(report)])
    checks = json.loads(report.read_text(encoding="utf-8"))["rungs"]["L3"]["checks"]
    return code, {c["name"]: c for c in checks}


def test_the_default_recipe_passes(bundle: Path) -> None:
    code, checks = quality(bundle)
    assert code == 0
    assert {f"L3.{name}" for name in QUALITY} <= set(checks)
    assert [c for c in checks.values() if c["status"] == "FAIL"] == []
    assert checks["L3.task_drop"]["limit"] == 3.0
    report = json.loads((bundle.parent / "report.json").read_text(encoding="utf-8"))
    checklists.hold(report, "text", "drift", "chats", "task", learned=True)


def test_a_state_that_fades_is_caught_by_drift(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fading(OnnxSession)(monkeypatch)
    code, checks = quality(bundle)
    assert code == 3
    for name in ("L3.drift", "L3.chunking", "L3.state_noise"):
        assert checks[name]["status"] == "FAIL", checks[name]


@pytest.mark.parametrize("kind", ["recurrent", "key", "value"])
def test_a_bundle_that_loses_a_state_between_chunks_fails_its_task(
    kind: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_between_chunks(OnnxSession, kind)(monkeypatch)
    code, checks = quality(bundle)
    assert code == 3
    assert checks["L3.task_drop"]["status"] == "FAIL"
    assert checks["L3.task.recall"]["value"] <= 0.5


def test_a_blurred_head_is_caught_by_every_quality_gate(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(OnnxSession, blurred)(monkeypatch)
    code, checks = quality(bundle)
    wrong = {name for name in QUALITY if checks[f"L3.{name}"]["status"] == "FAIL"}
    assert code == 3
    assert wrong == set(QUALITY) - {"chunking"}
    assert checks["L3.state_noise"]["status"] == "PASS", "no state was touched"
