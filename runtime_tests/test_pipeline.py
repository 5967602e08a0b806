"""Whole exports through the command line: bytes, resume, interrupts, rejected bundles, full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.__main__ import main
from export.bundle.reader import Bundle
from export.checkpoint import open_checkpoint
from export.pace import Pace
from export.spec import ExportSpec
from export.validate import bench, judge, latency
from runtime_tests.once import Memory
from targets import load_target
from targets.to_onnx import OnnxTarget, graph, operators
from targets.to_onnx.session import OnnxSession

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "judged_once", "compared_once")

MEASURED = {"latency.json", "report.html", "README.md", "parity.json", "manifest.json"}
EXPORT = ["--target", "onnx", "--size", "tiny", "--checkpoint", "random", "--num-layers", "4", "--quiet"]


def export(output: Path, *more: str) -> int:
    return main([*EXPORT, "--threads", "1", "-o", str(output), *more])


def contents(bundle: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in bundle.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "bundle"
    assert export(output, "--skip-validation") == 0
    return output


def test_two_exports_are_byte_identical(plain: Path, memory: Memory, tmp_path: Path) -> None:
    memory.forget()
    assert export(tmp_path / "again", "--skip-validation") == 0
    assert contents(plain) == contents(tmp_path / "again")


def test_manifest_holds_the_contract(plain: Path) -> None:
    manifest = Bundle.open(plain).manifest
    assert manifest["status"] == "unvalidated"
    assert set(manifest["signatures"]) == {
        "embed", "decode", "prefill_64", "vision_64x64", "vision_64x96", "vision_96x64",
    }  # fmt: skip
    rows = {tuple(s["shape"]) for s in manifest["states"] if s["kind"] == "key"}
    assert all(shape[2] == 1024 + 64 - 1 for shape in rows)
    listed = {entry["path"] for entry in manifest["files"]}
    assert listed == {p.name for p in plain.iterdir()} - {"manifest.json"}
    assert not any("journal" in path or "resume" in path for path in listed)
    tests = json.loads((plain / "chat_tests.json").read_text())
    assert {t["name"] for t in tests} >= {"plain", "image", "thinking", "no-thinking", "tools"}


@pytest.mark.parametrize("after", [1, 7, 30])
def test_an_interrupted_export_resumes_to_the_same_bytes(
    after: int, plain: Path, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "bundle", graph.WeightFile.write
    written: list[str] = []

    def interrupted(self: Any, key: str, dtype: Any, pieces: Any) -> Any:
        if len(written) == after:
            self._file.write(b"half a tensor")
            raise KeyboardInterrupt
        written.append(key)
        return write(self, key, dtype, pieces)

    monkeypatch.setattr(graph.WeightFile, "write", interrupted)
    assert export(output, "--skip-validation") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.partial"]
    again: list[str] = []

    def counted(self: Any, key: str, dtype: Any, pieces: Any) -> Any:
        again.append(key)
        return write(self, key, dtype, pieces)

    monkeypatch.setattr(graph.WeightFile, "write", counted)
    memory.forget()
    assert export(output, "--skip-validation", "--resume") == 0
    assert not set(again) & set(written), "finished tensors are not written twice"
    assert contents(output) == contents(plain)


def test_resume_refuses_another_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph.WeightFile, "write", stop)
        assert export(tmp_path / "b", "--skip-validation") == 130
    assert export(tmp_path / "b", "--skip-validation", "--resume", "--recipe", "int8") == 2
    assert "belongs to another export" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(graph.WeightFile, "write", full)
    assert export(tmp_path / "b", "--skip-validation") == 1
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_any_other_failure_leaves_nothing_and_keeps_the_old_bundle(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(plain, tmp_path / "b")
    monkeypatch.delitem(operators.EMITTERS, "mobile.rotary.default")
    with pytest.raises(ValueError, match=r"no emitter for operator mobile\.rotary\.default"):
        export(tmp_path / "b", "--skip-validation", "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert contents(tmp_path / "b") == contents(plain)


@pytest.mark.usefixtures("small_buffer")
def test_a_failed_gate_rejects_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = operators.EMITTERS["mobile.delta_gates.default"]

    def unmasked(low: Any, node: Any) -> None:
        node.args = (*node.args[:-1], None)
        right(low, node)

    monkeypatch.setitem(operators.EMITTERS, "mobile.delta_gates.default", unmasked)
    assert export(tmp_path / "b", "--json") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["b.rejected"]
    bundle = Bundle.open(tmp_path / "b.rejected")
    assert bundle.manifest["status"] == "unvalidated"
    parity = json.loads((bundle.path / "parity.json").read_text())
    assert parity["rungs"]["L1"]["status"] == "FAIL"
    assert parity["rungs"]["L0"]["status"] == parity["rungs"]["L2"]["status"] == "PASS"
    assert "L1.states is" in capsys.readouterr().err


@pytest.mark.usefixtures("small_buffer")
def test_infinite_logits_are_rejected_with_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = OnnxSession.run

    def run(self: OnnxSession, signature: str, inputs: Any) -> Any:
        outputs = right(self, signature, inputs)
        if "logits" in outputs:
            outputs["logits"][0, 0] = np.nan
        return outputs

    monkeypatch.setattr(OnnxSession, "run", run)
    assert export(tmp_path / "b") == 3
    parity = json.loads((tmp_path / "b.rejected" / "parity.json").read_text())
    assert {c["name"]: c["value"] for c in parity["rungs"]["L1"]["checks"]}["L1.logits"] == "inf"
    assert re.search(r"L1\.logits is inf, must be at most \d[\d.e-]*", capsys.readouterr().err)


def test_a_recipe_changed_between_interrupt_and_resume_is_another_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my.toml"
    roles = ("decoder", "linear_attention", "lm_head", "embedding", "vision")
    text = "".join(f"[mine.{role}]\nbits = {{}}\n".replace("{}", "{0}") for role in roles)
    recipe.write_text(text.format(8))

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph.WeightFile, "write", stop)
        assert export(tmp_path / "b", "--skip-validation", "--recipe", str(recipe)) == 130
    recipe.write_text(text.format(32))
    assert export(tmp_path / "b", "--skip-validation", "--recipe", str(recipe), "--resume") == 2
    assert "belongs to another export (roles:" in capsys.readouterr().err


def test_termination_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(graph.WeightFile, "write", terminated)
    assert export(tmp_path / "b", "--skip-validation") == 130
    assert [p.name for p in tmp_path.iterdir()] == ["b.partial"]


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("more", [("--context-length", "4", "--prefill-lengths", "2"), ("--num-layers", "1")])
def test_the_smallest_exports_are_validated(more: tuple[str, ...], tmp_path: Path) -> None:
    assert export(tmp_path / "b", "--no-vision", *more) == 0
    assert Bundle.open(tmp_path / "b").manifest["status"] == "validated"


@pytest.mark.usefixtures("small_buffer")
def test_run_and_bench_refuse_a_tampered_bundle(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain, tmp_path / "b")
    with open(tmp_path / "b" / "weights.bin", "r+b") as file:
        file.seek(5000)
        file.write(b"tampered")
    for words in (["run", str(tmp_path / "b"), "--prompt", "x"], ["bench", str(tmp_path / "b")]):
        assert main(words) == 1
        assert "weights.bin was changed: its sha256" in capsys.readouterr().err
        assert main([*words, *([] if words[0] == "run" else ["--steps", "8", "--runs", "1"]), "--no-verify"]) == 0


def test_bench_prints_what_it_measured(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(plain), "--runs", "2", "--steps", "10", "--threads", "1", "--prompt-tokens", "100"]
    assert main([*words, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["prefill"]["prompt_tokens"] == 100
    assert (entry["prefill"]["runs"], entry["decode"]["runs"]) == (2, 10)
    assert entry["peak_memory_bytes"] > 0
    for share in entry["bandwidth"].values():
        assert share["bound_tokens_per_s"] == pytest.approx(share["bytes_per_s"] / entry["decode_bytes"])
        assert 0 < share["share"] < 1
    assert main([*words[:-1], "1024"]) == 2
    assert "--prompt-tokens 1024: the bundle's context of 1024 must hold" in capsys.readouterr().err


def test_an_export_measures_its_bundle_in_a_process_of_its_own(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process of the ladder the peak of memory would be what the ladder took, less what it had before: 0."""
    asked: list[Any] = []

    def apart(folder: Path, manifest: dict[str, Any], threads: int) -> dict[str, Any]:
        asked.append((folder, manifest["name"], threads))
        return {"prefill": {"prompt_tokens": 100}, "peak_memory_bytes": 7 * 2**20}

    monkeypatch.setattr(bench, "measure_apart", apart)
    bundle = Bundle.open(plain)
    checkpoint = open_checkpoint(ExportSpec(target="onnx", size="tiny"))
    found = judge.measure(checkpoint, checkpoint.model_config, plain, bundle.manifest, 1, Pace())
    assert asked == [(plain, bundle.manifest["name"], 1)]
    assert found["bundle"]["peak_memory_bytes"] == 7 * 2**20
    assert found["reference"]["prefill"]["prompt_tokens"] == 100


def test_an_emulation_is_timed_once_and_the_runtime_after_warming_up(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(plain).manifest
    monkeypatch.setattr(OnnxTarget, "measured", "emulated")
    once = bench.measure_here(plain, manifest, 1)
    assert [(once[name]["runs"], once[name]["warmups"]) for name in ("prefill", "decode")] == [(1, 0), (1, 0)]
    assert once["bandwidth"] == {} and once["decode"]["source"] == "emulated"
    monkeypatch.setattr(OnnxTarget, "measured", "host")
    monkeypatch.setattr(latency, "BUFFER_BYTES", 2**24)
    often = bench.measure_here(plain, manifest, 1)
    assert [(often[name]["runs"], often[name]["warmups"]) for name in ("prefill", "decode")] == [(3, 1), (24, 4)]
    assert often["decode_bytes"] > once["decode_bytes"], "behind the same prompt, but half of 24 steps later"


def test_reports_stay_out_of_the_bundle(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(plain), "--report", str(plain / "manifest.json")]) == 2
    assert "lies inside the bundle" in capsys.readouterr().err
    assert main(["validate", str(plain), "--report", str(tmp_path / "no" / "r.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.usefixtures("small_buffer")
def test_a_validated_export_passes_and_validates_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "b", "--json") == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["status"] == "validated"
    assert {s["stage"] for s in result["stages"]} >= {"lower", "validate L0", "validate L3"}
    bundle = Bundle.open(tmp_path / "b")
    assert set(bundle.manifest["reports"]) == {"parity", "latency"}
    page = (bundle.path / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ), "the page is self-contained"
    before = contents(bundle.path)
    assert main(["validate", str(bundle.path), "--rung", "L2", "--quiet", "--threads", "1"]) == 0
    assert "L2.mismatches" in capsys.readouterr().out
    assert contents(bundle.path) == before, "validate never edits"
    assert main(["validate", str(bundle.path), "--quiet", "--threads", "1", "--update"]) == 0
    after = contents(bundle.path)
    assert {name for name in before if before[name] != after[name]} <= MEASURED
    assert Bundle.open(bundle.path).manifest["status"] == "validated"
    assert main(["validate", str(bundle.path), "--rung", "L2", "--update"]) == 2
    assert "--update writes the verdict of the whole ladder" in capsys.readouterr().err


def test_a_bundle_answers_on_its_session(plain: Path) -> None:
    bundle = Bundle.open(plain)
    session = load_target("onnx").open(bundle.path, bundle.manifest, 1)
    picture = np.full((1, 3, 64, 96), 0.5, np.float32)
    assert session.run("vision_64x96", {"image": picture})["image_embeddings"].shape == (1, 6, 128)


def test_run_streams_an_answer(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(plain), "--prompt", "What is 1+1?", "--max-new-tokens", "5", "--json", "--threads", "1"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["turns"][0]["new_tokens"] <= 5
    assert result["turns"][0]["ttft_ms"] > 0
    assert result["load_s"] > 0
