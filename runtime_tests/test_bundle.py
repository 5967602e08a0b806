"""The bundle: complete or absent when written, and nothing believed when read."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle import manifest as contract
from export.bundle.manifest import MANIFEST, BundleError, check_manifest, dump
from export.bundle.reader import Bundle
from export.bundle.writer import KEY, MARK, BundleWriter, check_output
from export.spec import ExportError, UsageError
from targets.contract import CallError
from targets.table import Table

GOLDEN = sorted((Path(contract.__file__).parent / "golden").glob("*.json"))
ONNX = [path for path in GOLDEN if path.stem.startswith("onnx")]
BASE: dict[str, Any] = {
    **json.loads(ONNX[0].read_text(encoding="utf-8")),
    "name": "small",
    "prefill_lengths": [],
    "image_sizes": [],
    "states": [],
    "signatures": {"decode": {"inputs": [], "outputs": [], "stages": [{"kind": "graph", "file": "pkg/a.bin"}]}},
    "tokenizer": {"files": [], "chat_template": None, "stop_token_ids": [1], "special_token_ids": {}},
    "files": [],
    "reports": {},
}
Change = Callable[[dict[str, Any]], Any]


def write(output: Path, content: bytes = b"weights", **options: Any) -> Path:
    """A bundle of one file in a package folder."""
    accepted = options.pop("accepted", True)
    with BundleWriter(output, {"size": "tiny"}, **{"overwrite": False, "resume": False, **options}) as writer:
        writer.add("pkg/a.bin", "weights").write_bytes(content)
        return writer.commit(copy.deepcopy(BASE), accepted=accepted)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_written_bundle_can_be_read(tmp_path: Path) -> None:
    assert write(tmp_path / "deep" / "b") == tmp_path / "deep" / "b"
    bundle = Bundle.open(tmp_path / "deep" / "b")
    assert bundle.file("pkg/a.bin").read_bytes() == b"weights"
    (entry,) = bundle.manifest["files"]
    assert entry == {
        "path": "pkg/a.bin",
        "bytes": 7,
        "role": "weights",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert names(tmp_path / "deep") == ["b"] and names(tmp_path / "deep" / "b") == [MANIFEST, "pkg"]
    with pytest.raises(BundleError, match=r"pkg/b.bin is not a file of .*see `files`"):
        bundle.file("pkg/b.bin")


def test_json_is_written_the_same_way_every_time(tmp_path: Path) -> None:
    assert dump({"b": 1, "a": ["é"]}) == '{\n "a": [\n  "é"\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump({"loss": float("nan")})
    for name in ("one", "two"):
        write(tmp_path / name)
    one, two = ((tmp_path / name / MANIFEST).read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="broken"), BundleWriter(
        tmp_path / "b", {}, overwrite=False, resume=False
    ) as writer:
        writer.add("a", "weights").write_text("x")
        raise ExportError("broken")
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(code: int, tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "b", {}, overwrite=False, resume=False)
    with pytest.raises(ExportError, match=r"no space left on the disk of .*; free some .*nothing was kept"), writer:
        writer.add("a", "weights").write_text("x")
        raise OSError(code, "No space left on device")
    assert names(tmp_path) == []


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = BundleWriter(tmp_path / "b", {}, overwrite=False, resume=False)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExportError, match="no space left"), writer:
        pass
    assert names(tmp_path) == []


def interrupted(output: Path, key: dict[str, Any], **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt), BundleWriter(
        output, key, **{"overwrite": False, "resume": False, **options}
    ) as writer:
        writer.add("pkg/a.bin", "weights").write_bytes(b"weights")
        writer.add("journal", "scratch").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupt_leaves_the_partial_folder_to_resume(tmp_path: Path) -> None:
    interrupted(tmp_path / "b", {"size": "tiny"})
    assert names(tmp_path) == ["b.partial"]
    with pytest.raises(BundleError, match=r"b.partial is not a bundle: .*continue its export with --resume"):
        Bundle.open(tmp_path / "b.partial")
    with BundleWriter(tmp_path / "b", {"size": "tiny"}, overwrite=False, resume=True) as writer:
        assert writer.resumed and (writer.path / "pkg/a.bin").read_bytes() == b"weights"
        writer.add("pkg/a.bin", "weights")
        writer.commit(copy.deepcopy(BASE), accepted=True)
    write(tmp_path / "c")
    # The journal of the interrupted run is gone, and the manifest is that of an uninterrupted one.
    assert (tmp_path / "b" / MANIFEST).read_bytes() == (tmp_path / "c" / MANIFEST).read_bytes()
    assert names(tmp_path / "b") == [MANIFEST, "pkg"]


@pytest.mark.parametrize("point", ["check_manifest", "sha256", "_sync"])
def test_an_interrupt_during_commit_can_be_resumed(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"export.bundle.writer.{point}", stop)
        write(tmp_path / "b")
    assert names(tmp_path) == ["b.partial"]
    assert Bundle.open(write(tmp_path / "b", resume=True)).manifest["name"] == "small"


def test_another_export_is_not_continued(tmp_path: Path) -> None:
    interrupted(tmp_path / "b", {"size": "tiny", "recipe": "int4"})
    with pytest.raises(UsageError, match=r"belongs to another export \(recipe: 'int4' then, 'int8' now\)"):
        BundleWriter(tmp_path / "b", {"size": "tiny", "recipe": "int8"}, overwrite=False, resume=True)
    (tmp_path / "b.partial" / KEY).write_text("{")
    with pytest.raises(UsageError, match=r"its key is missing or unreadable"):
        BundleWriter(tmp_path / "b", {"size": "tiny", "recipe": "int4"}, overwrite=False, resume=True)
    assert names(tmp_path) == ["b.partial"]


def test_without_resume_an_unfinished_export_is_replaced(tmp_path: Path) -> None:
    interrupted(tmp_path / "b", {"size": "tiny"})
    write(tmp_path / "b")
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == [MANIFEST, "pkg"]


def test_resume_starts_when_there_is_nothing_to_continue(tmp_path: Path) -> None:
    Bundle.open(write(tmp_path / "b", resume=True))


def test_an_old_bundle_outlives_a_failed_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "b", b"old")
    with pytest.raises(UsageError, match=r"b exists; choose another -o, or replace it with --overwrite"):
        write(output, b"new")
    with pytest.raises(ExportError, match="broken"), BundleWriter(output, {}, overwrite=True, resume=False):
        raise ExportError("broken")
    interrupted(output, {"size": "tiny"}, overwrite=True)
    assert Bundle.open(output).file("pkg/a.bin").read_bytes() == b"old"
    # The very last step fails: the old bundle was already aside and comes back.
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Path, "rename", fail)
        write(output, b"new", overwrite=True)
    assert Bundle.open(output).file("pkg/a.bin").read_bytes() == b"old"
    write(output, b"new", overwrite=True)
    assert Bundle.open(output).file("pkg/a.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["b"]


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    (write(tmp_path / "b") / MARK).touch()
    (tmp_path / "b").rename(tmp_path / "b.replaced")
    with pytest.raises(UsageError, match="exists"):
        check_output(tmp_path / "b", overwrite=False)
    assert names(tmp_path) == ["b"]
    Bundle.open(tmp_path / "b")  # without the mark
    (write(tmp_path / "c") / MARK).touch()
    (tmp_path / "c").rename(tmp_path / "b.replaced")
    check_output(tmp_path / "b", overwrite=True)
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("suffix", [".partial", ".replaced", ".rejected"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_neighbours_that_are_not_ours_are_left_alone(suffix: str, kind: str, tmp_path: Path) -> None:
    neighbour = tmp_path / f"b{suffix}"
    if kind == "folder":
        neighbour.mkdir()
        (neighbour / "thesis.tex").write_text("mine")
    else:
        neighbour.write_text("mine")
    with pytest.raises(UsageError, match=rf"b\{suffix} is in the way and no .* of ours; move it"):
        write(tmp_path / "b", overwrite=True)
    assert names(tmp_path) == [neighbour.name]
    (tmp_path / "b.old").mkdir()
    write(tmp_path / "c")
    assert names(tmp_path) == ["b.old", neighbour.name, "c"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_overwrite_replaces_nothing_but_a_bundle(kind: str, tmp_path: Path) -> None:
    output, other = tmp_path / "b", tmp_path / "other"
    if kind == "file":
        output.write_text("mine")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
    else:
        output.symlink_to(write(other))
    with pytest.raises(UsageError, match="exists and is no bundle; --overwrite only replaces bundles"):
        write(output, overwrite=True)
    assert output.exists()


def test_a_rejected_bundle_is_kept_under_another_name(tmp_path: Path) -> None:
    write(tmp_path / "b", b"good")
    for content in (b"bad", b"worse"):
        rejected = write(tmp_path / "b", content, overwrite=True, accepted=False)
        assert Bundle.open(rejected).file("pkg/a.bin").read_bytes() == content
    assert names(tmp_path) == ["b", "b.rejected"]
    assert Bundle.open(tmp_path / "b").file("pkg/a.bin").read_bytes() == b"good"


def test_a_manifest_that_breaks_the_contract_is_never_written(tmp_path: Path) -> None:
    broken = {**copy.deepcopy(BASE), "context_length": 0}
    with pytest.raises(BundleError, match="breaks the schema at context_length"), BundleWriter(
        tmp_path / "b", {}, overwrite=False, resume=False
    ) as writer:
        writer.add("pkg/a.bin", "weights").write_bytes(b"x")
        writer.commit(broken, accepted=True)
    assert names(tmp_path) == []


# Reading


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest.json; give the folder an export wrote"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"manifest.json is not valid JSON .*; export the bundle again"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(BundleError, match=r"manifest.json is no JSON object"):
        Bundle.open(tmp_path)


def test_tampering_is_noticed(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    file = output / "pkg/a.bin"
    file.write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"pkg/a.bin was changed: its sha256 is not the one in manifest.json"):
        Bundle.open(output)
    assert Bundle.open(output, verify=False).manifest["name"] == "small"
    file.write_bytes(b"weight")
    with pytest.raises(BundleError, match=r"pkg/a.bin has 6 bytes, manifest.json says 7; copy the bundle again"):
        Bundle.open(output, verify=False)
    file.unlink()
    with pytest.raises(BundleError, match=r"pkg/a.bin is listed in manifest.json but absent; copy the bundle again"):
        Bundle.open(output)
    file.symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match=r"pkg/a.bin is a link, which may lead outside the bundle"):
        Bundle.open(output)


@pytest.mark.parametrize("extra", ["extra.bin", f"pkg/{MANIFEST}", "pkg/.hidden"])
def test_a_file_nobody_lists_is_noticed(extra: str, tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    (output / extra).write_text("{}")
    with pytest.raises(BundleError, match=f"{extra} is not listed in manifest.json; remove it"):
        Bundle.open(output)


def test_a_linked_folder_is_noticed(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    (output / "pkg").rename(tmp_path / "outside")
    (output / "pkg").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="pkg is a link, which may lead outside the bundle"):
        Bundle.open(output)


PATHS = ["/etc/passwd", "../secret", "pkg/../../secret", "", "a\\b", "C:a", "a//b", "./a", "a/", "a\0b"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["files", "stage", "tokenizer", "template", "named template", "report"])
def test_no_path_leaves_the_bundle(path: str, place: str, tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    document = json.loads((output / MANIFEST).read_text())
    places: dict[str, Change] = {
        "files": lambda m: m["files"][0].update(path=path),
        "stage": lambda m: m["signatures"]["decode"]["stages"][0].update(file=path),
        "tokenizer": lambda m: m["tokenizer"].update(files=[path]),
        "template": lambda m: m["tokenizer"].update(chat_template=path),
        "named template": lambda m: m["tokenizer"].update(additional_chat_templates={"tool_use": path}),
        "report": lambda m: m["reports"].update(parity=path),
    }
    places[place](document)
    (output / MANIFEST).write_text(dump(document))
    with pytest.raises(BundleError, match=r"names the path .*; a path must be relative"):
        Bundle.open(output)


def stage_of(manifest: dict[str, Any], signature: str, index: int = 0) -> dict[str, Any]:
    stage: dict[str, Any] = manifest["signatures"][signature]["stages"][index]
    return stage


BROKEN: dict[str, tuple[int, Change, str]] = {
    "version": (0, lambda m: m.update(schema_version="2.0"), "schema_version '2.0'; this release reads '1.0'"),
    "no version": (0, lambda m: m.pop("schema_version"), "schema_version None"),
    "missing field": (0, lambda m: m.pop("states"), "breaks the schema at the top: 'states' is a required"),
    "status": (0, lambda m: m.update(status="fine"), "breaks the schema at status: 'fine' is not one of"),
    "digest": (0, lambda m: m["files"][0].update(sha256="abc"), "breaks the schema at files/0/sha256"),
    "decode": (0, lambda m: m["signatures"].pop("decode"), "breaks the schema at signatures: 'decode' is a req"),
    "twice": (0, lambda m: m["files"].append(m["files"][0]), "lists README.md twice, or itself"),
    "itself": (0, lambda m: m["files"][0].update(path=MANIFEST), "lists manifest.json twice, or itself"),
    "unlisted": (
        0,
        lambda m: stage_of(m, "decode").update(file="other.onnx"),
        "signature decode names other.onnx, which `files` does not list",
    ),
    "report": (0, lambda m: m["reports"].update(parity="p.json"), r"reports.parity names p.json, which `files`"),
    "prefill": (0, lambda m: m["prefill_lengths"].append(128), "no signature prefill_128, though"),
    "image": (0, lambda m: m["image_sizes"].append([96, 64]), "no signature vision_96x64, though"),
    "surplus": (0, lambda m: m.update(prefill_lengths=[]), "signature prefill_64 is in neither"),
    "state": (0, lambda m: m["states"].pop(), "touches the state 'value_1', which `states` does not list"),
    "state names": (0, lambda m: m["states"].append(m["states"][0]), "two states have one name"),
    "input": (0, lambda m: m["signatures"]["decode"]["inputs"].pop(), "reads 'start', which is no input"),
    "output": (0, lambda m: stage_of(m, "decode").update(outputs={}), "promises 'logits', which no stage writes"),
    "order": (
        1,
        lambda m: m["signatures"]["decode"]["stages"].reverse(),
        "reads 'last', which is no input and which no earlier stage writes",
    ),
    "no table": (1, lambda m: stage_of(m, "embed_1").pop("table"), "a table stage without `table`"),
    "table end": (
        1,
        lambda m: stage_of(m, "embed_1")["table"].update(data_offset=10**9),
        r"a table that reaches byte \d+ of a file of",
    ),
    "table scales": (
        1,
        lambda m: stage_of(m, "embed_1")["table"].update(scale_dtype="float32"),
        r"a table that reaches byte \d+ of a file of",
    ),
    "table group": (
        1,
        lambda m: stage_of(m, "embed_1")["table"].update(group_size=24),
        "a table of 248320 x 1024 in groups of 24, which do not divide",
    ),
    "in place": (
        1,
        lambda m: stage_of(m, "decode", 1)["states"].update(conv_0={"input": "2"}),
        "breaks the schema at signatures/decode/stages/1/states/conv_0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contract_violations(name: str) -> None:
    which, change, message = BROKEN[name]
    manifest = json.loads(ONNX[which].read_text(encoding="utf-8"))
    check_manifest(manifest)
    change(manifest)
    with pytest.raises(BundleError, match=message):
        check_manifest(manifest)


# Tables


def table_of(folder: Path, size: int) -> Table:
    """4 bits, 3 rows of 8 in groups of 4: 12 bytes of codes from 64 on, as many of scales from 128 on."""
    (folder / "embed.bin").write_bytes(bytes(range(256))[:size])
    table = {"rows": 3, "columns": 8, "bits": 4, "group_size": 4, "scale_dtype": "float16"}
    return Table(folder, {"file": "embed.bin", "table": {**table, "data_offset": 64, "scale_offset": 128}})


def test_a_table_is_read_by_token_ids(tmp_path: Path) -> None:
    table = table_of(tmp_path, 140)
    assert np.array_equal(table.of(np.array([[2, 0]])), table[np.array([[2, 0]])])
    for wrong in (-1, 3):
        with pytest.raises(CallError, match=f"token id {wrong} has no row in the embedding; ids are 0 to 2"):
            table.of(np.array([[0, wrong]]))


@pytest.mark.parametrize(("size", "end"), [(139, 140), (70, 76), (0, 76)])
def test_a_table_whose_file_ends_too_early_is_refused(size: int, end: int, tmp_path: Path) -> None:
    message = f"embed.bin has {size} bytes, the table in it reaches byte {end}; copy the bundle again"
    with pytest.raises(BundleError, match=message):
        table_of(tmp_path, size)


def test_a_table_without_its_file_is_refused(tmp_path: Path) -> None:
    stage = {"file": "gone.bin", "table": {"rows": 1, "columns": 8, "bits": 16, "group_size": None, "data_offset": 0}}
    with pytest.raises(BundleError, match=r"gone\.bin has 0 bytes, the table in it reaches byte 16; copy the bundle"):
        Table(tmp_path, stage)


# Golden manifests: what the readers of the apps parse in their own tests


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_manifests(path: Path) -> None:
    manifest = contract.load(path)
    assert dump(manifest) == path.read_text(encoding="utf-8")


def test_golden_manifests_show_every_form_of_the_contract() -> None:
    manifests = [contract.load(path) for path in GOLDEN]
    stages = [s for m in manifests for signature in m["signatures"].values() for s in signature["stages"]]
    bindings = [binding for stage in stages for binding in stage.get("states", {}).values()]
    explicit = [binding for binding in bindings if binding != "internal"]
    assert {stage["kind"] for stage in stages} == {"graph", "table"}
    assert "internal" in bindings
    assert any(b.get("in_place") for b in explicit) and any("in_place" not in b for b in explicit)
    assert any(b.get("update") == "rows" for b in explicit)
    assert any(len(s["stages"]) > 1 for m in manifests for s in m["signatures"].values())
    assert any(isinstance(state["layer"], list) for m in manifests for state in m["states"])
    assert {state["kind"] for m in manifests for state in m["states"]} == {"key", "value", "conv", "recurrent"}
    assert {m["model"]["source"]["kind"] for m in manifests} == {"path", "random"}
    tensors = [t for m in manifests for s in m["signatures"].values() for t in (*s["inputs"], *s["outputs"])]
    assert {t["dtype"] for t in tensors if t["name"] == "embeddings"} == {"float16", "float32"}
    assert any(stage["file"].endswith(".mlpackage") for stage in stages)


def test_the_golden_manifest_of_core_ml() -> None:
    """That of `python -m export --target coreml --size tiny --checkpoint random --recipe int4 --context-length 128
    --prefill-lengths 64 --image-sizes 64x64 --max-file-layers 4 --state-layout stacked --max-head-columns 128
    --skip-validation`.
    """
    manifest = contract.load(next(path for path in GOLDEN if path.stem == "coreml-stages"))
    listed = {file["path"] for file in manifest["files"]}
    for signature in ("decode", "prefill_64"):
        entry = manifest["signatures"][signature]
        names = [tensor["name"] for tensor in entry["outputs"]]
        assert names == [f"logits_{index}" for index in range(len(names))] and len(names) > 1
        assert [stage["file"] for stage in entry["stages"]] == ["decoder_0.mlpackage", "decoder_1.mlpackage"]
        for stage in entry["stages"]:
            assert stage["entry"] == signature and set(stage["states"].values()) == {"internal"}
            # A package is a folder: `file` names it, `files` what lies in it.
            assert stage["file"] not in listed and f"{stage['file']}/Manifest.json" in listed
    (table,) = manifest["signatures"]["embed"]["stages"]
    assert table["file"] == "decoder_1.mlpackage/Data/com.apple.CoreML/weights/weight.bin" and table["file"] in listed
    assert {state["dtype"] for state in manifest["states"]} == {"float16"}
    # Stacked, also where a package has one layer of a kind.
    assert [state["layer"] for state in manifest["states"]] == [[0, 1, 2], [0, 1, 2], 3, 3, [4, 5, 6], [4, 5, 6], 7, 7]
    dtypes = {t["name"]: t["dtype"] for s in manifest["signatures"].values() for t in (*s["inputs"], *s["outputs"])}
    assert {name for name, dtype in dtypes.items() if dtype != "float16"} == {
        "input_ids", "position_ids", "start", "valid", "image"
    }  # fmt: skip
    assert manifest["session_options"] == {"computeUnits": "cpuAndGPU"}


def test_golden_manifests_know_both_statuses() -> None:
    manifests = [contract.load(path) for path in GOLDEN]
    assert {m["status"] for m in manifests} == {"validated", "unvalidated"}
