"""What the gates are calibrated on: right bundles of trained checkpoints pass, those that lose their task do not.

A cheap selection runs by default, the whole matrix of checkpoints, targets and recipes with `-m slow`. The sweep behind
both is `runtime_tests.calibration`, which prints margins as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.chat.conversation import Contract
from export.chat.template import load_tokenizer
from export.validate.answers import generator
from runtime_tests import calibration, calibration_faults, calibration_tables, small_tasks, twins
from runtime_tests.calibration import Built, Subject
from runtime_tests.calibration_tables import Record, gated, lost, share, values
from runtime_tests.faults import lost_between_chunks
from runtime_tests.once import Memory
from targets import load_target
from targets.to_onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "hints_once")

SAMPLES = 12
"""Of each task, in the cheap selection."""


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "limit", "at_least", "expected"),
    [
        ("L3.kl_mean", 0.05, 0.1, False, 0.5),
        ("L3.top1", 0.95, 0.9, True, 0.5),
        ("L3.sqnr_db", 30, 20, True, 0.1),
        ("L3.own_perplexity", 1.01, 1.01**4, False, 0.25),
        ("L2.mismatches", 0, 0, False, 0.0),
        ("L2.mismatches", 1, 0, False, float("inf")),
        ("L3.kl_mean", "nan", 0.1, False, float("inf")),
        ("L3.own_perplexity", "inf", 1.1, False, float("inf")),
        ("L3.own_perplexity", 0.99, 1.1, False, 0.0),
    ],
)
def test_a_share_of_a_limit(name: str, value: Any, limit: float, at_least: bool, expected: float) -> None:
    check = {"name": name, "value": value, "limit": limit, "at_least": at_least}
    assert share(check) == pytest.approx(expected)


def test_tables_tell_ratios_losses_and_margins() -> None:
    def record(checkpoint: str, kl: float, **more: Any) -> Record:
        names = ("L3.kl_mean", "L3.own_kl", "L3.given_kl")
        checks = [
            {"name": n, "value": kl, "limit": 0.1, "at_least": False, "status": "PASS" if kl <= 0.1 else "FAIL"}
            for n in names
        ]
        given = {"kind": "bundle", "checkpoint": checkpoint, "target": "onnx", "recipe": "int4", "checks": checks}
        accuracy = {"accuracy_fp32": {"a": 1.0, "b": 0.9}, "accuracy": {"a": 0.96, "b": 0.88}}
        return {**given, **accuracy, "weights_bytes": 2_500_000, **more}

    fault = record("text", 0.4, kind="fault", fault="keys lost", rung="L3")
    refused = {"kind": "bundle", "checkpoint": "wide", "target": "onnx", "recipe": "int4", "refused": "because"}
    bundles, twins, margins, faults = calibration_tables.tables(
        [record("plain", 0.02), record("outliers", 0.05), refused, fault, {**fault, "fault": "none"}]
    )
    rows = bundles.splitlines()
    assert rows[2].split() == ["plain", "onnx", "int4", "2.50", "0.02", "0.02", "0.02", "92.0", "+3.0", "none"]
    assert rows[4].endswith("refused: because")
    assert twins.splitlines()[2].split() == ["outliers", "onnx", "int4", *["2.50"] * 3, "+3.0", "beyond", "2"]
    wanted = ["L3.kl_mean", "(int4)", "0.50", "outliers", "onnx", "int4", "4", "keys", "lost", "(text,", "int4)"]
    assert wanted in [line.split() for line in margins.splitlines()]
    assert faults.splitlines()[2].split() == ["keys", "lost", "(text,", "int4)", "L3.kl_mean", "4"]


def test_what_a_sheet_holds_is_not_measured_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def compute() -> Record:
        asked.append(1)
        return {"value": float("inf")}

    for _ in range(2):
        sheet = calibration.Sheet(tmp_path / "sheet.jsonl")
        assert sheet.once({"kind": "bundle", "checkpoint": "text"}, compute)["value"] == "inf"
    sheet.once({"kind": "bundle", "checkpoint": "wide"}, compute)
    assert len(asked) == 2
    assert len((tmp_path / "sheet.jsonl").read_text().splitlines()) == 2


# --- bundles --------------------------------------------------------------------------------------------------

SHORT = {"text": ["--prefill-lengths", "64"], "heads": ["--prefill-lengths", "64", "--image-sizes", "64x64,64x96"]}
NO_CONDITIONING = """
[plain-int4]
decoder          = { bits = 4, group_size = 128 }
linear_attention = { bits = 4, group_size = 128 }
lm_head          = { bits = 4, group_size = 128 }
embedding        = { bits = 4, group_size = 128 }
vision           = { bits = 8 }
"""


def found(bundle: Path) -> dict[str, dict[str, Any]]:
    """Every check of parity.json by name."""
    report = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))
    return {check["name"]: check for rung in report["rungs"].values() for check in rung["checks"]}


def points(name: str, bundle: Path) -> float:
    """Share of exact answers of a bundle to a small checkpoint's tasks."""
    opened = Bundle.open(bundle)
    with closing(load_target("onnx").open(bundle, opened.manifest, 1)) as session:
        asked = generator(session, Contract.of(opened.manifest))
        scores = small_tasks.evaluate(name, asked, load_tokenizer(bundle), samples=SAMPLES)
    return sum(scores.values()) / len(scores)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of a small checkpoint in 8 bits through the whole ladder, once."""
    place = tmp_path_factory.mktemp("calibration")

    @cache
    def export(name: str) -> Path:
        words = ["--target", "onnx", "--checkpoint", str(small_tasks.folder(name)), *SHORT[name], "--recipe", "int8"]
        assert main([*words, "--threads", "1", "--quiet", "-o", str(place / name)]) == 0
        return place / name

    return export


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("name", ["text", pytest.param("heads", marks=pytest.mark.slow)])
def test_another_checkpoint_in_8_bits_passes_and_keeps_its_points(name: str, exported: Callable[[str], Path]) -> None:
    """It never learned the probe's prose, which judges nobody: its answers do."""
    bundle = exported(name)
    checks = found(bundle)
    assert Bundle.open(bundle).manifest["status"] == "validated"
    assert checks["L3.kl_mean"]["status"] == "RECORDED"
    for gate in ("L3.own_kl", "L3.given_kl", "L3.state_noise", "L3.own_top1"):
        assert checks[gate]["status"] == "PASS" and share(checks[gate]) < 0.8, checks[gate]
    assert points(name, bundle) >= 0.95


@pytest.mark.usefixtures("small_buffer")
def test_a_fault_on_another_checkpoint_fails(exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all states, a decoder that reverses digits misses its keys least."""
    bundle = exported("text")
    lost_between_chunks(OnnxSession, "key")(monkeypatch)
    report = bundle.parent / "report.json"
    words = ["validate", str(bundle), "--checkpoint", str(small_tasks.folder("text")), "--rung", "L3"]
    assert main([*words, "--quiet", "--threads", "1", "--report", str(report)]) == 3
    checks = {c["name"]: c for c in json.loads(report.read_text())["rungs"]["L3"]["checks"]}
    assert checks["L3.state_noise"]["status"] == checks["L3.given_kl"]["status"] == "FAIL"


def test_a_fine_tune_that_loses_its_own_task_is_refused(tmp_path: Path) -> None:
    """At 4 bits without conditioning, with channels that stand out. The passage, which it never learned, tells
    nothing, and neither do its tensors, stored right bit for bit: its answers and states do.
    """
    recipe = tmp_path / "plain-int4.toml"
    recipe.write_text(NO_CONDITIONING)
    folder = twins.write(small_tasks.folder("text"), tmp_path / "mine", outliers=32, mlp_outliers=32)
    words = ["--target", "onnx", "--checkpoint", str(folder), "--prefill-lengths", "64", "--recipe", str(recipe)]
    bundle = tmp_path / "bundle"
    assert main([*words, "--threads", "1", "--quiet", "--skip-validation", "-o", str(bundle)]) == 0
    report = tmp_path / "report.json"
    rungs = [word for rung in ("L2", "L3") for word in ("--rung", rung)]
    words = ["validate", str(bundle), "--checkpoint", str(folder), "--threads", "1", "--quiet", "--report", str(report)]
    assert main([*words, *rungs]) == 3
    checks = {c["name"]: c for r in json.loads(report.read_text())["rungs"].values() for c in r["checks"]}
    assert points("text", bundle) <= 0.92
    failing = {name for name, check in checks.items() if check["status"] == "FAIL"}
    assert failing >= {"L3.own_kl", "L3.given_kl"}
    assert checks["L2.tensor_error"]["status"] == checks["L2.mismatches"]["status"] == "PASS"
    assert {name for name in failing if not name.startswith(("L3.own", "L3.given"))} == {"L3.state_noise"}
    assert checks["L3.kl_mean"]["status"] == "RECORDED"


# --- the whole matrix -----------------------------------------------------------------------------------------

LOSE: dict[tuple[str, str, str], str] = {}
"""(checkpoint, target, recipe) of shipped recipes that a gate refuses, and what they lose: none."""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str, str], Record]]:
    """Records of the sweep, each bundle made and judged once."""
    place = tmp_path_factory.mktemp("matrix")
    sheet = calibration.Sheet(place / "sheet.jsonl")
    subjects = {name: Subject(name, place) for name in calibration.CHECKPOINTS}

    def record(checkpoint: str, target: str, recipe: str) -> Record:
        calibration.sweep(sheet, subjects[checkpoint], target, recipe)
        key = {"kind": "bundle", "checkpoint": checkpoint, "target": target, "recipe": recipe}
        return next(r for r in sheet.records if all(r.get(name) == value for name, value in key.items()))

    yield record
    print("\n" + "\n\n".join(calibration_tables.tables(sheet.records)))  # noqa: T201


SHIPPED = [
    (target, recipe)
    for target in calibration.TARGETS
    for recipe in (*calibration.RECIPES, *calibration.OTHERS)
    if (target, recipe) != ("executorch", "int4-asym")
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "recipe"), SHIPPED)
@pytest.mark.parametrize("checkpoint", calibration.CHECKPOINTS)
def test_right_bundles_pass_and_keep_their_points(
    checkpoint: str, target: str, recipe: str, matrix: Callable[[str, str, str], Record]
) -> None:
    record = matrix(checkpoint, target, recipe)
    assert record["passed"] is ((checkpoint, target, recipe) not in LOSE), record["failures"]
    assert lost(record) <= (3 if recipe.startswith("int4") else 1), record["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "recipe"), [(t, r) for t, r in SHIPPED if r != "fp32"])
@pytest.mark.parametrize("twin", calibration_tables.TWINS)
def test_twins_lose_at_most_twice_what_the_plain_one_loses(
    twin: str, target: str, recipe: str, matrix: Callable[[str, str, str], Record]
) -> None:
    """On the answers, the same for both: on prose that tiny never learned one token decides (docs/LOG.md)."""
    plain, found = values(matrix("plain", target, recipe)), values(matrix(twin, target, recipe))
    name = "L3.given_kl"
    assert found[name] <= calibration_tables.MOST_BY_TWIN * plain[name]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4-mlp"])
@pytest.mark.parametrize("checkpoint", ["text", "heads", "untied", "tiny"])
def test_every_fault_fails(checkpoint: str, recipe: str, tmp_path: Path) -> None:
    memory, subject = Memory(), Subject(checkpoint, tmp_path)
    built = Built.of(subject, "onnx", recipe)
    least: dict[str, float] = {}
    for fault in calibration_faults.of(built):
        report = calibration_faults.report_of(built, fault, memory)
        shares = {c["name"]: share(c) for c in gated({"checks": calibration.checks(report)}).values()}
        least[f"{fault.rung} {fault.name}"] = max(shares.values())
    right = least.pop(f"L3 {calibration_faults.NONE}")
    print(checkpoint, recipe, f"right: {right:.2f} of a limit", dict(sorted(least.items(), key=lambda x: x[1])[:5]))  # noqa: T201
    assert right <= 1
    assert {name: much for name, much in least.items() if much <= 1} == {}
