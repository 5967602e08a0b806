"""Several bundles side by side: the table, the page, and what may not stand beside what."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from export import arguments, compare
from export.__main__ import main
from export.bundle.reader import Bundle
from export.report import comparison
from export.spec import ExportError, UsageError
from export.validate import bench, judge
from export.validate.gates import GATES, Gate

pytestmark = pytest.mark.usefixtures("one_thread", "traced_once", "judged_once", "compared_once")

SHAPE = ["--target", "onnx", "--size", "tiny", "--num-layers", "1", "--no-vision", "--context-length", "128"]
ONE = ["--quiet", "--threads", "1"]
NAMES = ["qwen3.5-tiny-onnx-int4", "qwen3.5-tiny-onnx-int8"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two recipes of the shipped checkpoint, whose parity.json holds L3 alone, to save time."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "judge", functools.partial(judge.judge, rungs=("L3",), with_latency=False))
        for recipe in ("int4", "int8"):
            assert main([*ONE, *SHAPE, "--recipe", recipe, "-o", str(folder / recipe)]) == 0
    return [folder / "int4", folder / "int8"]


@pytest.fixture(scope="module")
def compared(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one full comparison prints with --json, and its page."""
    page = tmp_path_factory.mktemp("page") / "both.html"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["validate", *map(str, pair), *ONE, "--json", "--report", str(page)]) == 0
    return json.loads(out.getvalue()), page.read_text(encoding="utf-8")


@pytest.fixture
def columns(pair: list[Path], compared: tuple[dict[str, Any], str]) -> list[comparison.Column]:
    return compare.columns(compare.open_bundles(pair), [entry["report"] for entry in compared[0]["bundles"]])


def cells(table: str) -> dict[str, list[str]]:
    return {parts[0]: parts[1:] for line in table.splitlines() if (parts := re.split(r"\s{2,}", line))}


def test_every_column_holds_the_numbers_of_its_bundle(
    pair: list[Path], compared: tuple[dict[str, Any], str], columns: list[comparison.Column]
) -> None:
    assert compared[0]["passed"] is True
    rows = cells(comparison.table(columns))
    for place, (path, entry) in enumerate(zip(pair, compared[0]["bundles"], strict=True)):
        manifest = json.loads((path / "manifest.json").read_text())
        parity = json.loads((path / "parity.json").read_text())
        size = sum((path / file["path"]).stat().st_size for file in manifest["files"])
        assert entry["bytes"] == size
        assert rows["bytes on disk"][place] == f"{size:,}"
        assert (entry["name"], entry["target"], entry["recipe"]) == (NAMES[place], "onnx", path.name)
        assert rows["recipe"][place] == path.name
        assert rows["verdict"][place] == "passed"
        own = {c["name"]: c["value"] for c in parity["rungs"]["L3"]["checks"]}
        for name in ("L3.kl_mean", "L3.sqnr_db", "L3.top1", "L3.drift"):
            assert float(rows[name][place]) == pytest.approx(own[name], rel=2e-3), name
        speed = entry["report"]["latency"]["bundle"]
        assert rows["bytes a token reads"][place] == f"{speed['decode_bytes']:,}"
        assert rows["peak memory, MiB"][place] == f"{speed['peak_memory_bytes'] / 2**20:,.1f}"
        decode = float(rows["decode, tokens/s"][place].replace(",", ""))
        assert decode == pytest.approx(speed["decode"]["tokens_per_s_median"], abs=0.51)
        # 38 MiB, most of it the runtime; measured in the process of the ladder it would be below 1 MiB.
        assert speed["peak_memory_bytes"] > 10 * 2**20
        assert set(entry["report"]["rungs"]) == {"L0", "L1", "L2", "L3"}
    assert float(rows["L3.kl_mean"][0]) > 10 * float(rows["L3.kl_mean"][1]), "int4 is worse than int8"


def test_the_page_shows_both_bundles_and_needs_nothing_else(compared: tuple[dict[str, Any], str]) -> None:
    result, page = compared
    for name, entry in zip(NAMES, result["bundles"], strict=True):
        assert f'<th scope="col" class="n">{name}</th>' in page
        assert f"{entry['bytes']:,}" in page
    drawings = dict(re.findall(r"<figure><h3>([^<]*)</h3>.*?(<svg.*?</svg>)", page, re.DOTALL))
    assert list(drawings) == [
        "KL over position (nats)",
        "KL over decode steps: drift (nats)",
        "Relative error of every state, L3",
        "Size on disk",
        "Speed on this host",
        "Memory on this host",
    ]
    for title, drawing in drawings.items():
        ElementTree.fromstring(drawing)
        for name in NAMES:
            assert f">{name}</text>" in drawing, f"{title} names {name}"
        assert not any("nan" in path for path in re.findall(r' d="([^"]*)"', drawing))
    assert "<script" not in page
    assert set(re.findall(r"""(?:src|href)=["'](.)|url\((.)|@import (.)""", page)) == {("#", "", ""), ("", "#", "")}


def test_one_failed_gate_fails_the_comparison(
    pair: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(GATES, "L3.int4.own_kl", Gate(1e-9, "a gate no 4 bits pass"))
    page = tmp_path / "p.HTML"
    assert main(["validate", *map(str, pair), *ONE, "--rung", "L3", "--report", str(page)]) == 3
    out, err = capsys.readouterr()
    rows = cells(out)
    assert rows[""] == NAMES
    assert rows["verdict"] == ["rejected", "passed"]
    assert [cell.endswith(" FAIL") for cell in rows["L3.own_kl"]] == [True, False]
    assert "decode, tokens/s" not in rows, "--rung leaves the measurement out"
    assert f"gates of {NAMES[0]} failed: L3.own_kl is" in err
    assert f"gates of {NAMES[1]}" not in err
    assert page.read_text().count('<span class="FAIL">') == 2


def test_one_bundle_is_reported_as_before_or_on_a_page(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", str(pair[0]), *ONE, "--rung", "L2", "--report"]
    assert main([*words, str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"passed", "measured", "rungs", "climbed", "status"}
    assert (report["climbed"], report["status"]) == (["L2"], "validated")
    assert main([*words, str(tmp_path / "r.html"), "--json"]) == 0
    assert f'<th scope="col" class="n">{NAMES[0]}</th>' in (tmp_path / "r.html").read_text()
    table, as_json = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert re.search(r"^L2\.mismatches +0  ≤ 0 +PASS$", table, re.MULTILINE)
    assert json.loads(as_json) == report


def test_the_report_has_a_name_of_its_own_or_is_json(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["validate", *map(str, pair), *ONE, "--rung", "L2", "--report"]
    assert main(words) == 0
    assert [p.name for p in tmp_path.iterdir()] == [arguments.COMPARISON]
    assert main([*words, "r.json"]) == 0
    assert [e["name"] for e in json.loads(Path("r.json").read_text())["bundles"]] == NAMES
    assert main([*words, str(pair[1] / "r.json")]) == 2
    assert re.search(r"lies inside the bundle .*int8, which .* choose another place", capsys.readouterr().err)


USAGE = {
    "A --report B": r"argument --report: \S+int8 is a folder; give a file such as comparison.html, and bundles before",
    "--report A": r"argument --report: \S+int4 is a folder",
    "A --rung L2 B": r"unexpected \S+int8: python -m export validate takes BUNDLE first, then the options",
    "A B --update": "--update writes into one bundle, 2 are given: validate them one by one, or leave out",
    "A A": r"int4 is given twice; a comparison needs different bundles, leave one out",
    "A other": r"of different checkpoints: the source is id checkpoints/tiny, kind path in \S+int4 and id random, "
    r"kind random, seed 1 in \S+other; export both from one checkpoint, or validate them one by one",
}


@pytest.mark.parametrize("words", list(USAGE))
def test_bad_usage_is_refused(
    words: str, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["source"] = {"id": "random", "kind": "random", "revision": None, "seed": 1}
    (other / "manifest.json").write_text(json.dumps(manifest))
    places = {"A": str(pair[0]), "B": str(pair[1]), "other": str(other)}
    assert main(["validate", *(places.get(word, word) for word in words.split())]) == 2
    assert re.search(USAGE[words], capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model", "size", "2b"), "the size is tiny in .* and 2b in"),
        (("model", "variant", "base"), "the variant is instruct in .* and base in"),
        (("model", "vocab_size", 512), "the vocabulary is 448 in .* and 512 in"),
        (("model", "hidden_size", 96), "the hidden size is 128 in .* and 96 in"),
        (("states", -1, {"layer": 7}), "the number of layers is 1 in .* and 8 in"),
    ],
)
def test_bundles_of_different_checkpoints_are_refused(
    change: tuple[str, Any, Any], message: str, pair: list[Path]
) -> None:
    first, second = (Bundle.open(path) for path in pair)
    manifest = copy.deepcopy(second.manifest)
    manifest[change[0]][change[1]] = change[2]
    with pytest.raises(UsageError, match=message):
        compare.check_one_checkpoint([first, Bundle(second.path, manifest)])
    compare.check_one_checkpoint([first, second])


def test_columns_are_named_by_what_tells_them_apart() -> None:
    def bundles(*what: tuple[str, str]) -> list[Bundle]:
        return [Bundle(Path(path), {"name": name}) for path, name in what]

    assert compare.names(bundles(("/x/a", "one"), ("/x/b", "two"))) == ["one", "two"]
    assert compare.names(bundles(("/x/a", "one"), ("/x/b", "one"))) == ["a", "b"]
    assert compare.names(bundles(("/x/a", "one"), ("/y/a", "one"))) == ["/x/a", "/y/a"]


def test_what_a_bundle_lacks_is_a_dash(columns: list[comparison.Column]) -> None:
    report = copy.deepcopy(columns[1].report)
    del report["latency"], report["rungs"]["L1"]
    report["rungs"]["L3"]["checks"][0]["name"] = "L3.other"
    rows = cells(comparison.table([columns[0], comparison.Column("thin", Path("thin"), columns[1].manifest, report)]))
    assert rows["L1.logits"][1] == rows["decode, tokens/s"][1] == rows["L3.kl_mean"][1] == comparison.NONE
    assert rows["L3.other"][0] == comparison.NONE
    assert rows["L1.logits"][0] != comparison.NONE
    assert "<svg" in comparison.render([comparison.Column("<thin>", Path("thin"), columns[1].manifest, report)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, r"measured \S+int4 was killed, likely for lack of memory; close other programs"),
        (1, r"measured \S+int4 failed: ValueError: no; close other programs, or leave the measurement out"),
    ],
)
def test_a_measurement_that_ends_badly_says_so(
    code: int, message: str, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, stdout="", stderr="Traceback\nValueError: no\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: done)
    with pytest.raises(ExportError, match=message):
        bench.measure_apart(pair[0], Bundle.open(pair[0]).manifest, 1)
