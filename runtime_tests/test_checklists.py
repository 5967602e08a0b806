"""Every check of a whole ladder is on one of two closed lists, and what several bundles share is computed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.pace import Pace
from export.quantize.recipe import load_recipe
from export.validate import judge, reference
from export.validate.amounts import Amounts
from runtime_tests import checklists
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from targets import load_target

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "hints_once")


@contextmanager
def silent(name: str, total: float | None = None) -> Iterator[Pace]:
    yield Pace()


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_checks_of_random_weights_are_on_the_lists(target: str, tmp_path: Path) -> None:
    """Those of Core ML are in test_coreml_ladder.py, those of tiny in the files of its exports."""
    model, recipe = MemoryCheckpoint(variant(num_hidden_layers=4, vision={"depth": 1})), load_recipe("int8")
    _, manifest, _ = build(model, tmp_path, recipe, target, context=96, lengths=(16,))
    manifest |= {"model": {"source": {"kind": "random", "id": "m"}}, "quantization": recipe.as_manifest()}
    manifest["tokenizer"]["files"] = []
    place = load_target(target), tmp_path, manifest
    amounts = Amounts(64, 8)
    found = judge.judge(model, model.model_config, recipe, *place, 1, silent, with_latency=False, amounts=amounts)
    has = ("float32", "pictures", "calls that end in pictures", "drift")
    checklists.hold(json.loads(json.dumps(found)), *has, learned=False)


def test_the_lists_refuse_what_they_do_not_know() -> None:
    def report(*checks: tuple[str, str, float | None]) -> dict[str, Any]:
        keys = ("name", "status", "limit")
        found = [{**dict(zip(keys, check, strict=True)), "reason": "a reason"} for check in checks]
        return {"rungs": {"L0": {"checks": found}, **{rung: {"checks": []} for rung in ("L1", "L2", "L3")}}}

    right: list[tuple[str, str, float | None]]
    right = [(name, "PASS", 1.0) for name in (*checklists.GATED[""], *checklists.GATED["float32"])]
    right += [(name, "RECORDED", None) for name in checklists.RECORDED[""]]
    checklists.hold(report(*right), "float32", learned=True)
    for wrong in (
        right[1:],
        right[:-1],
        [*right, ("L3.new", "PASS", 1.0)],
        [*right, ("L3.new", "RECORDED", None)],
        [(right[0][0], "RECORDED", None), *right[1:]],
        [(right[0][0], "RECORDED", 1.0), *right[1:]],
    ):
        with pytest.raises(AssertionError):
            checklists.hold(report(*wrong), "float32", learned=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two recipes of the first layers of the shipped checkpoint, unvalidated."""
    folder = tmp_path_factory.mktemp("pair")
    words = ["--target", "onnx", "--size", "tiny", "--num-layers", "4", "--no-vision", "--context-length", "64"]
    for recipe in ("int4", "int8"):
        more = ["--prefill-lengths", "16", "--skip-validation", "--quiet", "--threads", "1"]
        assert main([*words, *more, "--recipe", recipe, "-o", str(folder / recipe)]) == 0
    return [folder / "int4", folder / "int8"]


def test_bundles_of_one_checkpoint_need_l0_once(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    right = reference.hf_sequence

    def counted(*inputs: Any, **told: Any) -> Any:
        asked.append(inputs)
        return right(*inputs, **told)

    monkeypatch.setattr(reference, "hf_sequence", counted)
    words = ["--rung", "L0", "--json", "--quiet", "--threads", "1"]
    assert main(["validate", str(pair[0]), *words]) == 0
    alone = json.loads(capsys.readouterr().out)["rungs"]["L0"]
    assert len(asked) == 1
    assert main(["validate", *map(str, pair), *words]) == 0
    both = [entry["report"]["rungs"]["L0"] for entry in json.loads(capsys.readouterr().out)["bundles"]]
    assert len(asked) == 2, "one more for two bundles"
    assert both == [alone, alone]


def test_validate_says_which_rungs_were_climbed_and_the_status_of_the_bundle(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rung", "L2", "--quiet", "--threads", "1"]
    assert main(["validate", str(pair[0]), *words]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == (
        "climbed L2, without L0, L1, L3; status of the bundle: unvalidated"
    )
    assert main(["validate", str(pair[0]), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["climbed"], found["status"]) == (True, ["L2"], "unvalidated")
    assert main(["validate", *map(str, pair), *words]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines() if line}
    assert rows["of the rungs"] == ["L2", "L2"] and rows["status of the bundle"] == ["unvalidated"] * 2
    assert main(["validate", *map(str, pair), *words, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["bundles"]
    assert [(e["climbed"], e["status"]) for e in entries] == [(["L2"], "unvalidated")] * 2
