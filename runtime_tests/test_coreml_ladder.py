"""The whole ladder, as an export climbs it, on a Core ML bundle of several packages; what its report says of it.

An untied head in pieces, one layer a package, two pictures, drift by layout, stress: small enough for every test run.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import commands
from export.__main__ import main
from export.pace import Pace
from export.quantize.recipe import load_recipe
from export.report import card, comparison, page
from export.validate import drift, judge
from export.validate.amounts import Amounts
from export.validate.case import Case
from export.validate.ladder import l3
from export.validate.probe import make_probe
from runtime_tests import checklists
from runtime_tests.conftest import MemoryCheckpoint, build, variant
from targets import load_target
from targets.base import Activations, Finding, Target

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "judged_once")

LINEAR, FULL = "linear_attention", "full_attention"
CONFIG = variant(
    num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR], tied=False, vocab_size=256, vision={"depth": 1}
)
CUT = {"max_file_layers": 1, "max_head_columns": 128}
RECIPE = load_recipe("int8")
CONTEXT, LENGTHS = 96, (16,)
STEPS = 100
"""Of drift: more than the context holds."""
EMULATED = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs bundles on Core ML itself")
WARNING = Finding("overflow", "warning", "a.mlpackage", "decode", "add_1", "a text", "nobody")


@contextmanager
def silent(name: str, total: float | None = None) -> Iterator[Pace]:
    yield Pace()


@pytest.fixture(scope="module")
def model() -> MemoryCheckpoint:
    return MemoryCheckpoint(CONFIG)


def built(model: MemoryCheckpoint, folder: Path) -> dict[str, Any]:
    """A bundle's files; the manifest holds what the ladder and the reports read of it."""
    _, manifest, _ = build(model, folder, RECIPE, "coreml", context=CONTEXT, lengths=LENGTHS, **CUT)
    target = load_target("coreml")
    manifest["target"] |= {"runtime": target.runtime, "min_version": "iOS18"}
    manifest["tokenizer"]["files"] = []
    return manifest | {
        "name": "small-coreml",
        "status": "unvalidated",
        "model": {"size": "0.8b", "variant": "instruct", "license": "unknown", "num_parameters": 1,
                  "source": {"kind": "random", "id": "m"}},
        "quantization": RECIPE.as_manifest(),
        "files": [],
    }


@pytest.fixture(scope="module")
def bundle(model: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ladder") / "bundle"
    folder.mkdir()
    return folder, built(model, folder)


@pytest.fixture(scope="module")
def report(model: MemoryCheckpoint, bundle: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What an export writes into parity.json, read back. One finding is made up: the bundle may have none."""
    folder, manifest = bundle
    target, config = load_target("coreml"), model.model_config
    seen: list[Any] = []

    def lint(self: Target, *place: Any) -> list[Finding]:
        return [*(right(self, *place) or []), WARNING]

    def observe(self: Target, *place: Any) -> Activations | None:
        seen.append(place[2:4])
        return looked(self, *place)

    right, looked = type(target).lint, type(target).observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "lint", lint)
        patch.setattr(type(target), "observe", observe)
        found = judge.judge(
            model, config, RECIPE, target, folder, manifest, 1, silent, with_latency=False, amounts=Amounts(64, STEPS)
        )
    ((prompts, pictures),) = seen
    assert [len(prompt.images) for prompt in prompts] == [2, 0], "the probe, then what the bundle can say"
    assert [picture.shape[1:] for picture in pictures] == [tuple(size) for size in manifest["image_sizes"]]
    return json.loads(json.dumps(found))


def checks(report: dict[str, Any], rung: str) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in report["rungs"][rung]["checks"]}


def test_the_bundle_has_several_stages(bundle: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = bundle
    assert sorted(path.name for path in folder.glob("decoder*")) == [f"decoder_{n}.mlpackage" for n in range(3)]
    assert len(manifest["signatures"]["decode"]["stages"]) == 3
    assert [t["shape"] for t in manifest["signatures"]["decode"]["outputs"]] == [[1, 128], [1, 128]]


def test_every_rung_passes(report: dict[str, Any]) -> None:
    assert {name: rung["status"] for name, rung in report["rungs"].items()} == dict.fromkeys(
        ("L0", "L1", "L2", "L3"), "PASS"
    )
    assert report["passed"] is True
    assert checks(report, "L0")["L0.pictures_in_text"]["value"] == 2
    assert checks(report, "L1").keys() >= {"L1.exact.logits", "L1.float16.states", "L1.exact.vision"}
    quality = checks(report, "L3")
    assert quality["L3.kl_mean"]["status"] == "RECORDED", "the weights are random"
    assert 0 < quality["L3.kl_mean"]["value"] < quality["L3.kl_mean"]["limit"]
    assert quality["L3.vision"]["value"] < quality["L3.vision"]["limit"]


def test_every_check_is_on_the_lists(report: dict[str, Any]) -> None:
    has = ("float16", "pictures", "calls that end in pictures", "drift", "layouts", "observed")
    checklists.hold(report, *has, *(("stress",) if sys.platform != "darwin" else ()), learned=False)


def test_the_drift_says_over_how_many_steps(report: dict[str, Any]) -> None:
    """Of the bundle, as many as its context holds; of every layout, all."""
    rung = report["rungs"]["L3"]
    layouts = load_target("coreml").capabilities.state_layouts
    assert checks(report, "L3")["L3.drift_steps"]["value"] == len(rung["series"]["drift_kl"]) == CONTEXT - 1
    assert {name: len(kl) for name, kl in rung["series"]["drift_kl_by_layout"].items()} == dict.fromkeys(layouts, STEPS)
    assert all(np.isfinite(kl).all() for kl in rung["series"]["drift_kl_by_layout"].values())
    notes = "\n".join(rung["notes"])
    assert "L3.drift is over 95 decode steps, all that a context of 96 holds behind a first token." in notes
    assert "layouts of the states is over 100 decode steps, by decoders lowered for it alone" in notes


def test_a_large_model_is_not_compared_by_layout_and_says_so(
    model: MemoryCheckpoint, bundle: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "shallow", lambda config: config.truncated(1))
    config, target = model.model_config, load_target("coreml")
    found = judge.judge(
        model, config, RECIPE, target, *bundle, 1, silent, rungs=("L3",), with_latency=False, amounts=Amounts(64, 8)
    )
    rung = found["rungs"]["L3"]
    assert "lint" not in found, "only the whole ladder is"
    assert rung["series"]["drift_kl_by_layout"] == {}
    assert checks(found, "L3")["L3.drift_steps"]["value"] == 8
    assert "L3.drift is over 8 decode steps." in rung["notes"]
    html = page.render(bundle[1], found)
    assert "The drift of other layouts of the states was not measured: lowering a model of this size" in html
    assert "KL over 8 decode steps" in html


@EMULATED
def test_the_stress_of_float16_sums_is_recorded(report: dict[str, Any]) -> None:
    quality, series = checks(report, "L3"), report["rungs"]["L3"]["series"]
    stressed = quality["L3.stress_kl"]
    assert stressed["status"] == "RECORDED"
    count = len(series["stress_kl"])
    assert 16 < count < len(series["kl"])
    assert stressed["value"] == pytest.approx(np.mean(series["stress_kl"]))
    assert 1e-9 < stressed["value"] < 1e-2
    assert any("shows sensitivity and is no model of any device" in note for note in report["rungs"]["L3"]["notes"])


@EMULATED
def test_the_page_shows_drift_linter_stress_and_source(
    bundle: tuple[Path, dict[str, Any]], report: dict[str, Any]
) -> None:
    html = page.render(bundle[1], report)
    (drawing,) = re.findall(r"<h3>KL over 100 decode steps: drift \(nats\)</h3>.*?(<svg.*?</svg>)", html, re.DOTALL)
    for label in ("bundle", *(f"{name} states" for name in load_target("coreml").capabilities.state_layouts)):
        assert f">{label}</text>" in drawing
    assert f">{WARNING.rule}</th>" in html and WARNING.where in html
    nothing = "Nothing found that devices are known to object to."
    assert nothing not in html and nothing in page.render(bundle[1], {**report, "lint": []})
    assert "Linter" not in page.render(bundle[1], {name: part for name, part in report.items() if name != "lint"})
    assert "<code>L3.stress_kl</code>" in html and "no model of any device" in html
    assert "over 95 decode steps" in html
    for rung in ("L1", "L3"):
        heading = re.search(rf"<h3>{rung}: .*?</h3>\s*<p.*?</p>", html, re.DOTALL)
        assert heading and "emulated" in heading[0] and "never those of a device" in heading[0]
    assert "emulated" not in (re.search(r"<h3>L2: .*?</p>", html, re.DOTALL) or [""])[0]


@EMULATED
def test_no_number_of_an_emulation_is_shown_without_that_word(
    bundle: tuple[Path, dict[str, Any]], report: dict[str, Any]
) -> None:
    """Without a latency, whose own label would say it."""
    folder, manifest = bundle
    assert report["measured"] == load_target("coreml").measured == "emulated"
    readme = card.render(manifest, report, "as told")
    rows = [line for line in readme.splitlines() if line.startswith(("| L1 |", "| L3 |"))]
    assert len(rows) > 20 and all(row.endswith("| emulated |") for row in rows)
    assert "never those of a device" in readme
    lines = commands.parity_table(report).splitlines()
    assert all(line.endswith(" emulated") == line.startswith(("L1.", "L3.")) for line in lines[1:])
    other = {**report, "measured": "host"}
    stated = {**manifest, "status": "unvalidated"}
    columns = [comparison.Column(name, folder, stated, r) for name, r in (("mine", report), ("host's", other))]
    assert re.search(r"^L3 source +emulated +host$", comparison.table(columns), re.MULTILINE)
    html = comparison.render(columns)
    assert html.count(">emulated</span>") == html.count(">host</span>") == 2


@pytest.mark.parametrize("measured", ["host", None])
def test_what_ran_on_a_host_says_so_and_old_reports_claim_nothing(
    measured: str | None, bundle: tuple[Path, dict[str, Any]], report: dict[str, Any]
) -> None:
    old = copy.deepcopy(report)
    del old["measured"]
    for rung in old["rungs"].values():
        del rung["notes"]
        rung["checks"] = [check for check in rung["checks"] if not check["name"].startswith("L1.exact")]
    given = old if measured is None else {**old, "measured": measured}
    word = measured or "unknown"
    for text in (page.render(bundle[1], given), card.render(bundle[1], given, ""), commands.parity_table(given)):
        assert word in text and "emulated" not in text.replace("an emulation", "")
    assert f">{word}</span></h3>" in page.render(bundle[1], given)


def test_a_conversation_goes_on_bit_for_bit(bundle: tuple[Path, dict[str, Any]], model: MemoryCheckpoint) -> None:
    """From a snapshot of the states of all packages, after another conversation, and in a session that is new."""
    folder, manifest = bundle
    ids = make_probe(model.model_config, 24, ()).ids

    def call(session: Any, first: int, tokens: int) -> list[Any]:
        embedded = session.run("embed", {"input_ids": np.asarray([ids[first : first + tokens]], np.int64)})
        inputs = {
            "embeddings": embedded["embeddings"],
            "position_ids": np.tile(np.arange(first, first + tokens, dtype=np.int32), (3, 1)),
            "start": np.asarray([first], np.int32),
        }
        if tokens == 1:
            return list(session.run("decode", inputs).values())
        return list(session.run("prefill_16", inputs | {"valid": np.asarray([tokens], np.int32)}).values())

    target = load_target("coreml")
    with closing(target.open(folder, manifest, 1)) as session, closing(target.open(folder, manifest, 1)) as fresh:
        call(session, 0, 16)
        kept = session.snapshot()
        expected = [call(session, place, 1) for place in range(16, 20)]
        session.reset()
        call(session, 0, 16)
        for opened in (session, fresh):
            opened.restore(kept)
            again = [call(opened, place, 1) for place in range(16, 20)]
            for before, after in zip(expected, again, strict=True):
                assert len(before) == 2
                assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_package_of_other_weights_is_caught(
    bundle: tuple[Path, dict[str, Any]], model: MemoryCheckpoint, tmp_path: Path
) -> None:
    folder, manifest = bundle
    other = tmp_path / "other"
    mixed = tmp_path / "mixed"
    other.mkdir()
    built(MemoryCheckpoint(CONFIG, seed=1), other)
    shutil.copytree(folder, mixed)
    shutil.rmtree(mixed / "decoder_1.mlpackage")
    shutil.copytree(other / "decoder_1.mlpackage", mixed / "decoder_1.mlpackage")
    target = load_target("coreml")

    def failing(place: Path) -> set[str]:
        rung = l3(Case(model, model.model_config, RECIPE, target, place, manifest, 1, tokens=64))
        return {c.name for c in rung.checks if c.status == "FAIL"}

    assert "L3.kl_mean" not in failing(folder)
    assert "L3.kl_mean" in failing(mixed)


# -- the linter in a verdict, on the target that is fastest to export ------------------------------------
EXPORT = ["--target", "onnx", "--size", "tiny", "--checkpoint", "random", "--num-layers", "1", "--no-vision"]
SMALL = ["--context-length", "64", "--prefill-lengths", "16", "--quiet", "--threads", "1"]


def held_against(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(type(load_target("onnx")), "lint", lambda *_, **__: list(findings))


def test_an_update_keeps_the_findings_of_the_linter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b"
    assert main([*EXPORT, *SMALL, "--skip-validation", "-o", str(path)]) == 0
    held_against(monkeypatch, WARNING, WARNING)
    right = judge.judge  # which takes seconds to measure the latency, of which nothing is asked here
    monkeypatch.setattr(judge, "judge", lambda *given, **more: right(*given, **{**more, "with_latency": False}))
    assert main(["validate", str(path), "--quiet", "--threads", "1", "--update"]) == 0
    found = json.loads((path / "parity.json").read_text())
    assert [(f["rule"], f["count"]) for f in found["lint"]] == [(WARNING.rule, 2)]
    assert found["measured"] == "host"
    assert "L3.kl_mean" in checks(found, "L3") and "L3.stress_kl" not in checks(found, "L3")
    assert WARNING.where in (path / "report.html").read_text()
    assert "| host |" in (path / "README.md").read_text()


@pytest.mark.parametrize("more", [[], ["--skip-validation"]])
def test_an_error_of_the_linter_stops_an_export_before_the_ladder(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def climb(*_: Any) -> Any:
        raise AssertionError("the ladder is climbed")

    monkeypatch.setattr(judge, "climb", climb)
    held_against(monkeypatch, WARNING, Finding("dtype", "error", "b.mlpackage", "", "", "wrong", "somebody"))
    assert main([*EXPORT, *SMALL, *more, "-o", str(tmp_path / "b")]) == 1
    assert "the linter found 1 error(s): b.mlpackage: wrong [dtype: somebody]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_linter_is_a_failed_gate_of_a_finished_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ladder is climbed all the same, and the report says both."""
    path, out = tmp_path / "b", tmp_path / "report.json"
    assert main([*EXPORT, *SMALL, "--skip-validation", "-o", str(path)]) == 0
    right = judge.judge
    monkeypatch.setattr(judge, "judge", lambda *given, **more: right(*given, **{**more, "with_latency": False}))
    words = ["validate", str(path), "--quiet", "--threads", "1", "--report", str(out)]
    assert main(words) == 0
    assert "lint" not in json.loads(out.read_text()), "onnx has no linter"
    held_against(monkeypatch)
    assert main(words) == 0
    assert json.loads(out.read_text())["lint"] == []
    held_against(monkeypatch, WARNING, Finding("dtype", "error", "b.mlpackage", "", "", "wrong", "somebody"))
    capsys.readouterr()
    assert main(words) == 3
    shown = capsys.readouterr()
    assert "gates failed: b.mlpackage wrong [dtype]" in shown.err
    assert "linter error, dtype (1): wrong" in shown.out and f"linter warning, {WARNING.rule} (1)" in shown.out
    found = json.loads(out.read_text())
    assert found["passed"] is False and set(found["rungs"]) == {"L0", "L1", "L2", "L3"}
