"""The report as a reader meets it: the verdict first, every check in words, and nothing that leaves the page."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from export.checkpoint.weights import parameters
from export.model.config import ModelConfig
from export.report import card, comparison, facts, page, plots
from export.report.verdict import verdict
from export.report.words import UNKNOWN, WORDS, words
from export.sizes import SIZES
from export.validate import answers, work
from export.validate.chats import Chat
from export.validate.dialogues import Dialogue
from export.validate.gates import GATES, RECORDED
from runtime_tests.reports import ANSWERS, Seen, manifest, report, spoil

NASTY = "<script>alert('x')</script> & \"<b>\" $_{x}$"


def emitted() -> set[str]:
    """Names of checks by the two closed lists; those of gates without the recipe's kind."""
    kinds = r"^(L3|golden)\.(fp32|fp16|int8|int4)(\.resized)?\."
    return {re.sub(kinds, r"\1.", name) for name in (*GATES, *RECORDED)}


def test_every_check_has_its_words() -> None:
    names = emitted()
    assert {"L3.kl_worst", "L0.pictures_in_text", "L1.float16.embed", "L3.drift"} <= names
    # The list of values without a gate names families as "L3.task".
    assert [n for n in sorted(names) if words(n) is UNKNOWN and words(f"{n}.x") is UNKNOWN] == []


def test_the_words_are_of_checks_that_exist() -> None:
    assert {name for name in WORDS if not name.endswith("*")} - emitted() == set()
    for said in WORDS.values():
        assert said.measures[0].isupper() and said.measures.endswith(".") and said.bad.endswith(".")
        assert len(said.measures) > 25 and len(said.bad) > 20


def test_families_and_storage_have_words_and_strangers_say_so() -> None:
    assert words("L3.task.recall") is WORDS["L3.task.*"]
    assert words("L3.drift_stacked") is WORDS["L3.drift_*"] and words("L3.drift_first") is WORDS["L3.drift_first"]
    assert words("L1.float16.embed").measures == f"As stored, in float16: {WORDS['L1.embed'].measures}"
    assert "hides no wrong lowering" in words("L1.exact.logits").measures
    for name in ("L3.nonsense", "L1.exact.nonsense", "L3.drift_", "L9.logits"):
        assert words(name) is UNKNOWN


@functools.cache
def passing() -> str:
    """The page of a bundle that passes."""
    return page.render(manifest(), report())


def test_the_page_begins_with_what_a_reader_wants() -> None:
    seen = Seen(passing())
    assert seen.headings[0] == (1, "qwen3.5-4b-onnx-int4")
    assert [text for level, text in seen.headings if level == 2] == [
        "The bundle",
        "Speed",
        "One question",
        "Checks",
        "Tensors that rounding changed most",
        "Conversations that came out worst",
        "Where it differs",
    ]
    order = ("Accepted:", "4.66 billion parameters", "Context", "Size", "Memory", "multiply-acc", "38.0", "11.0")
    places = [seen.text.index(each) for each in (*order, str(ANSWERS[0]["question"]), "L0: Is our model", "L3: Does")]
    assert places == sorted(places)
    states = 32 * 128 * 128 * 24 + 3 * 8192 * 24 + 2 * 1536 * 4 * 256 * 8
    assert f"{4 * states / 1e6:,.0f} MB for the states" in " ".join(seen.text.split())


def test_a_failed_gate_is_told_first() -> None:
    found = report()
    spoil(found, "L3.top1", 0.1234)
    spoil(found, "L2.missing", 3)
    seen = Seen(page.render(manifest(), found))
    assert seen.headings[1] == (2, "What failed")
    assert "Rejected: 2 of 19 gates failed (L2.missing, L3.top1). Do not ship this bundle." in seen.text
    told = seen.text[seen.text.index("What failed") : seen.text.index("The bundle", seen.text.index("What failed"))]
    assert "0.123" in told and "≥ 0.85" in told and WORDS["L3.top1"].bad in told and "3 parameters" in told
    checks = seen.text[seen.text.index("L3: Does") :]
    assert checks.index("L3.top1") < checks.index("L3.kl_mean") < checks.index("L3.kl_p99"), "failed, gated, recorded"


def verdict_of(kind: str) -> str:
    described, found = manifest(), report()
    if kind == "failed":
        spoil(found, "L3.kl_mean", float("nan"))
    elif kind == "linted":
        found.update(passed=False, lint=[{"severity": "error"}, {"severity": "warning"}])
    elif kind == "random":
        described["model"]["source"] = {"id": "random", "kind": "random", "revision": None, "seed": 1}
        found = report(gate_quality=False)
    elif kind == "part":
        found["rungs"] = {"L2": found["rungs"]["L2"]}
    elif kind in ("emulated", "unknown"):
        found["measured"] = kind
    said = verdict(described, None if kind == "unvalidated" else found)
    return f"{said.status} {said.word}: {said.sentence}"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("passed", r"PASS Accepted: all 19 gates passed; .* as int4 is held to\. .* in 93\.0 % of the places\."),
        ("emulated", r"PASS Accepted: all 19 gates passed on an emulation of the runtime; the bundle"),
        ("unknown", r"PASS Accepted: all 19 gates passed on the runtime or an emulation, which the report does"),
        ("failed", r"FAIL Rejected: 1 of 19 gates failed \(L3\.kl_mean\)\. Do not ship"),
        ("linted", r"FAIL Rejected: the linter found 1 kind of errors\. Do not"),
        ("random", r"PASS The program is right: all 11 gates passed\. The weights are random, .* without a gate\."),
        ("part", r"OPEN Not judged as a whole: only L2 was checked, and all 2 gates passed; without L0, L1, L3"),
        ("unvalidated", r"OPEN Not validated: .* nothing is known about its answers\."),
    ],
)
def test_the_verdict_is_one_sentence(kind: str, sentence: str) -> None:
    assert re.match(sentence, verdict_of(kind)), verdict_of(kind)


def test_the_card_begins_with_the_same_verdict() -> None:
    text = card.render(manifest(), report(), "as told")
    assert text.index("**Accepted:** all 19 gates passed") < text.index("To load it") < text.index("| L0 | L0.logits")
    assert text.index("| L3 | L3.own_kl") < text.index("| L3 | L3.kl_p99"), "gated ones first"
    assert "**Not validated:**" in card.render(manifest(), None, "as told")


def columns(*names: str) -> list[comparison.Column]:
    found = [report(seed=place) for place in range(len(names))]
    return [comparison.Column(n, Path("x"), manifest(), r) for n, r in zip(names, found, strict=True)]


def test_what_others_wrote_is_shown_and_never_run() -> None:
    described, found = manifest(), report()
    described["name"] = described["model"]["source"]["id"] = described["quantization"]["recipe"] = NASTY
    described["model"]["license"] = NASTY
    found["rungs"]["L3"]["notes"] = [NASTY]
    found["rungs"]["L3"]["series"]["answers"] = [dict.fromkeys(("question", "reference", "bundle"), NASTY)]
    found["rungs"]["L3"]["series"]["answers"][0]["picture"] = False
    found["rungs"]["L2"]["series"]["tensor_errors"] = {NASTY: 0.5}
    finding = dict.fromkeys(("rule", "severity", "where", "text", "source"), NASTY)
    found["lint"] = [{**finding, "count": 1}]
    pages = [page.render(described, found), comparison.render([comparison.Column(NASTY, Path(), described, found)])]
    for text, least in zip(pages, (12, 6), strict=True):
        seen = Seen(text)
        assert seen.text.count(NASTY) >= least
        assert {tag for tag, _ in seen.tags} & {"script", "iframe", "img", "link", "object", "form", "b"} == set()


@pytest.mark.parametrize("kind", ["one", "three"])
def test_the_page_stands_alone_and_can_be_read_aloud(kind: str) -> None:
    text = passing() if kind == "one" else comparison.render(columns("a", "b", "c"))
    seen = Seen(text)
    assert seen.open == [] and seen.of("html") == [{"lang": "en"}]
    policy = [meta["content"] for meta in seen.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for _, attributes in seen.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), "only markers of the same drawing"
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    for (before, _), (level, heading) in zip(seen.headings, seen.headings[1:], strict=False):
        assert level <= before + 1 and heading, "no level is left out"
    assert [level for level, _ in seen.headings].count(1) == 1
    for header in seen.of("th"):
        assert header.get("scope") in ("row", "col")
    assert len(seen.of("caption")) >= 4
    drawings = seen.of("svg")
    assert len(drawings) == len(seen.of("figcaption")) == (4 if kind == "one" else 6)
    for drawing in drawings:
        assert drawing["role"] == "img" and re.search(r"\d", drawing["aria-label"] or ""), "words with numbers"
    names = [attributes["id"] for _, attributes in seen.tags if attributes.get("id")]
    assert len(names) == len(set(names)) and names, "of several drawings in one page"
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert set(used) == set(names)


def test_every_check_stands_in_the_page_with_its_sentence_and_its_unit() -> None:
    text = " ".join(Seen(passing()).text.split())
    for rung in report()["rungs"].values():
        for each in rung["checks"]:
            said = words(each["name"])
            assert f"{each['name']} {said.measures} If bad: {said.bad}" in text
    assert "4,659,865,088 weights" in text and "21.6 dB" in text and "512 steps" in text


def test_an_emulation_shows_work_and_no_time() -> None:
    found, described = report(measured="emulated"), manifest(golden="coreml-stages")
    text = " ".join(Seen(page.render(described, found)).text.split())
    assert "Not measured: the bundle ran on an emulation" in text
    assert "reads 2.5 GB and takes 4.1 billion multiply-accumulates, behind about 512 others" in text
    both = [comparison.Column("emulation", Path(), described, found), *columns("host")]
    rows = {line.split("  ")[0]: line.split()[-2:] for line in comparison.table(both).splitlines()}
    for name in ("prefill, tokens/s", "decode, tokens/s", "peak memory, MiB", "load time, s"):
        assert rows[name][0] == "–" != rows[name][1]
    assert rows["bytes a token reads"] == ["2,500,000,000"] * 2
    alone = Seen(comparison.render(both[:1]))
    for shown in (text, card.render(described, found, ""), alone.text):
        assert "38.0" not in shown and "9.5" not in shown
    assert "Work of a token" in [heading for _, heading in alone.headings]
    assert "emulation –" in " ".join(Seen(comparison.render(both)).text.split()), "its colour and place are kept"


def test_without_answers_tensors_and_speed_their_sections_are_absent() -> None:
    found = report()
    del found["rungs"]["L3"]["series"]["answers"], found["rungs"]["L2"]["series"]["tensor_errors"], found["latency"]
    headings = [text for level, text in Seen(page.render(manifest(), found)).headings if level == 2]
    assert headings == ["The bundle", "Checks", "Conversations that came out worst", "Where it differs"]
    bare = Seen(page.render({**manifest(), "files": []}, None))
    assert [text for level, text in bare.headings if level == 2] == ["The bundle"]
    assert "Size" not in bare.text and "the files and 153 MB for the states" in bare.text
    found["latency"] = {**report()["latency"], "reference": None}
    assert "PyTorch was not timed beside it" in page.render(manifest(), found)


def test_the_first_answer_is_shown_and_the_others_fold() -> None:
    seen = Seen(passing())
    quotes = [text for level, text in seen.headings if level == 3][1:7]
    assert quotes == [
        "Question, about a picture", "The original answers", "The bundle answers",
        "Question", "The original answers", "The bundle answers the same",
    ]  # fmt: skip
    assert len(seen.of("details")) == 1 and "1 more" in seen.text


def test_the_ten_worst_tensors_are_ranked() -> None:
    found = report()
    errors = found["rungs"]["L2"]["series"]["tensor_errors"]
    errors |= {"decoder.head.weight": 0.9, "vision.patch.weight": "inf", "embedding.weight": 1e-5}
    text = Seen(page.render(manifest(), found)).text
    table = text[text.index("Tensors that rounding") : text.index("Where it differs")]
    assert "the worst 10 of\n67" in table and "embedding.weight" not in table
    names = re.findall(r"(?:decoder|vision)\.\S+", table)
    assert names[:3] == ["vision.patch.weight", "decoder.head.weight", "decoder.layers.31.mlp.up.weight"]
    assert len(names) == 10 and "width: nan" not in page.render(manifest(), found)


def test_the_ten_worst_conversations_are_ranked() -> None:
    found = report()
    series = found["rungs"]["L3"]["series"]
    series |= {"chats": [f"talk {n}" for n in range(12)], "own_kl": [0.01 * n for n in range(12)]}
    series |= {"given_kl": [0.5] * 12}
    series["own_kl"][3] = "nan"
    text = page.render(manifest(), found)
    seen = Seen(text).text
    table = seen[seen.index("Conversations that came out worst") : seen.index("Where it differs")]
    assert "The worst 10 of\n12" in table
    assert re.findall(r"talk \d+", table) == [f"talk {n}" for n in (3, 11, 10, 9, 8, 7, 6, 5, 4, 2)]
    assert table.split()[table.split().index("3") :][:3] == ["3", "inf", "0.5"]
    del series["given_kl"]
    assert "–" in Seen(page.render(manifest(), found)).text, "where the reference did not fit the memory"


def test_streams_in_float16_are_drawn_over_layers() -> None:
    drawn = Seen(page.render(manifest(golden="coreml-stages"), report(measured="emulated")))
    captions = " ".join(" ".join(each["aria-label"] or "" for each in drawn.of("svg")).split())
    assert "float16 ends at 65,504. text: median 48, largest 2e+03 at layer 11. pictures: median 3e+02" in captions
    assert "float16 ends" not in passing()


def test_states_of_32_layers_are_drawn_by_kind_over_the_layer() -> None:
    errors = {"L0": report()["rungs"]["L0"]["series"]["states"], "L1": {"key_3": 1e-7, "recurrent_0": "nan"}}
    drawn = plots.states("States", "Meaning.", errors)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    assert [x for x in labels if x in plots.KINDS.values()] == list(plots.KINDS.values())
    assert len(labels) < 50, "64 names of states do not fit"
    worst = max((v, k) for k, v in errors["L0"].items())
    kind, layer = worst[1].split("_")
    assert f"L0: the worst is {worst[0]:.2g}, in layer {layer} ({plots.KINDS[kind]})." in drawn.caption
    assert "L1: the worst is nan, in layer 0" in drawn.caption
    assert drawn.svg == plots.states("States", "Meaning.", errors).svg, "the same bytes for the same numbers"
    assert not any("nan" in path for path in re.findall(r' d="([^"]*)"', drawn.svg))
    assert set(re.findall(r"#0[0-9a-f]{5}\b", drawn.svg)) == set() and "var(--c0)" in drawn.svg


def test_long_curves_are_means_and_their_caption_is_exact() -> None:
    values = [1e-3] * 959 + [0.5]
    drawn = plots.lines("KL", "Meaning.", "step", {"bundle": (range(960), values)})
    assert "means of 10. Median 0.001, largest 0.5 at step 959." in drawn.caption
    gap: list[float | str] = [*values[:3], "inf", *values[4:]]
    assert "largest inf at step 3." in plots.lines("KL", "", "step", {"": (range(960), gap)}).caption


def test_multiply_accumulates_of_a_step() -> None:
    """0.8B: all matrices of the decoder once, 6 layers of attention, 18 states of 16 heads of 128 × 128."""
    published = SIZES["0.8b"].config
    assert published is not None
    config = ModelConfig.from_dict(published)
    quantised = 308_281_344 + 188_743_680 + 254_279_680  # decoder, linear attention and head, by --dry-run
    gates_and_convolutions = 18 * (2 * 16 * 1024 + 6144 * 4)
    attention, states = 6 * 2 * 8 * 256 * 513, 18 * 3 * 16 * 128 * 128
    assert work.decode_macs(config, 512) == quantised + gates_and_convolutions + attention + states
    assert sum(p.role == "vision" for p in parameters(config).values()) > 0, "pictures take no part in it"


def test_sizes_are_in_decimal_units() -> None:
    assert [facts.megabytes(n) for n in (999, 2_919_709, 437_000_000, 1_250_000_000)] == [
        "999 bytes", "2.92 MB", "437 MB", "1.25 GB",
    ]  # fmt: skip
    assert [facts.count(n) for n in (448, 873_438_784, 9_653_104_368)] == ["448", "873 million", "9.65 billion"]


def test_the_comparison_names_the_smallest_and_the_closest() -> None:
    three = columns("one", "two", "three")
    small = copy.deepcopy(three[1].manifest)
    small["files"] = [{"role": "weights", "bytes": 1000, "path": "w", "sha256": ""}]
    three[1] = comparison.Column("two", Path(), small, three[1].report)
    for column, kl in zip(three, (0.1, 0.05, 0.01), strict=True):
        next(c for c in column.report["rungs"]["L3"]["checks"] if c["name"] == "L3.kl_mean")["value"] = kl
    said: Any = comparison.verdict(three)
    assert (said.status, said.word) == ("PASS", "Passed")
    assert said.sentence.endswith("is two (1 kB on disk), the closest to the original three (KL 0.01 nats).")
    part = comparison.Column("part", Path(), small, {**report(), "rungs": {"L2": report()["rungs"]["L2"]}})
    said = comparison.verdict([three[0], part])
    assert (said.status, said.word) == ("OPEN", "Not judged as a whole")
    assert "Only L2 of the ladder was checked for all." in said.sentence
    spoil(three[2].report, "L3.top1", 0.0)
    said = comparison.verdict(three).sentence
    assert said.startswith("1 of 3 bundles failed a gate: three. The smallest of the others is two (1 kB on disk)")
    assert said.endswith("the closest to the original two (KL 0.05 nats)."), "no failed bundle is recommended"
    seen = Seen(comparison.render(three))
    assert [text for level, text in seen.headings if level == 2][:3] == [
        "The bundles", "On this host", "L0: Is our model the original?",
    ]  # fmt: skip


def test_answers_are_told_in_words_the_surest_first() -> None:
    """0 stops; the reference is silent at the second question, and surest at the third."""

    def dialogue(question: str, answer: list[int], images: list[Any]) -> Any:
        chat = Chat("", [9], images, question=question)
        return Dialogue(chat, [9, *answer], list(range(len(answer))), np.zeros((1, 1), np.float32))

    asked = ("first?", "second?", "third?")
    own = [dialogue(q, [3, 0, 5], [np.zeros(1)] if q == "third?" else []) for q in asked]
    given = [dialogue(q, answer, []) for q, answer in zip(asked, ([4, 0], [0], [5, 6]), strict=True)]
    scored: Any = [SimpleNamespace(certainty=each) for each in (0.5, 0.9, 0.7)]
    case: Any = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    contract: Any = SimpleNamespace(stop_token_ids=[0])
    assert answers.in_words(case, contract, own, given, scored) == [
        {"question": "third?", "picture": True, "reference": "5 6", "bundle": "3"},
        {"question": "first?", "picture": False, "reference": "4", "bundle": "3"},
    ]
    assert answers.in_words(cast(Any, SimpleNamespace(decode=None)), contract, own, given, scored) == []
