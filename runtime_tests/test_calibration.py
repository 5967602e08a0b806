"""What the gates are calibrated on: right bundles of trained checkpoints pass, those that lose their task do not.

A cheap selection runs by default, the whole matrix of checkpoints, targets and recipes with `-m slow`. The sweep behind
both is `runtime_tests.calibration`, which prints margins as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime_tests import calibration, calibration_tables
from runtime_tests.calibration_tables import Record, share

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
