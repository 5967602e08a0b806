"""A golden of the shipped tiny checkpoint, made with transformers, against a bundle: right passes, wrong does not."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.__main__ import main
from export.bundle.manifest import load
from export.chat.conversation import Contract
from export.quantize.recipe import Setting
from export.sizes import SHIPPED
from export.validate import golden
from export.validate.gates import GATES, Check
from export.validate.golden import Golden, GoldenError
from export.validate.ladder import row

ROOT = Path(__file__).parents[1]
TINY = ROOT / SHIPPED
PROMPT = "What is written?"
TOKENS = 6
Edit = Callable[[dict[str, Any], dict[str, Any]], None]
"""Changes the two JSON objects of a golden in place."""


def drawn(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


def make(folder: Path, picture: Image.Image, name: str = "golden_tiny") -> Path:
    """A golden in the published form: transformers' processor, logits and greedy answer; the picture as PNG."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3_5ForConditionalGeneration

    model = Qwen3_5ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    model.train(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    seen = Qwen2VLImageProcessorPil.from_pretrained(TINY)(images=[picture], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    count = int(seen["image_grid_thw"][0].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    first = np.zeros(0)
    with torch.inference_mode():
        for _ in range(TOKENS):
            whole = torch.tensor([[*ids, *tokens]])
            kinds = (whole == model.config.image_token_id).int()
            logits = model(input_ids=whole, mm_token_type_ids=kinds, use_cache=False, **seen).logits[0, -1].numpy()
            first = first if tokens else logits.astype(np.float64)
            tokens.append(int(logits.argmax()))
    best = [int(i) for i in np.argsort(-first)[:10]]
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}_picture.png")
    measured = {
        "top1_id": best[0],
        "top2_id": best[1],
        "top10_ids": best,
        "top10_logits": [float(first[i]).hex() for i in best],
        "logits_summary": [float(x).hex() for x in (first.max(), first.min(), first.mean(), first.std())],
        "input_ids": ids,
    }
    generated = {
        "model_id": "tiny",
        "prompt": PROMPT,
        "generated_tokens": tokens,
        "generated_text": tokenizer.decode(tokens, skip_special_tokens=True),
    }
    for kind, content_of in (("picture", measured), ("generation", generated)):
        (folder / f"{name}_{kind}.json").write_text(json.dumps(content_of), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden whose picture is of a size that the bundle has."""
    return make(tmp_path_factory.mktemp("golden"), drawn(64, 64))


def exported(output: Path, recipe: str) -> Path:
    words = ["--target", "onnx", "--size", "tiny", "--recipe", recipe, "-o", str(output), "--skip-validation"]
    shape = ["--prefill-lengths", "16", "--context-length", "64", "--image-sizes", "64x64"]
    assert main([*words, *shape, "--quiet", "--threads", "1"]) == 0
    return output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("bundle") / "fp32", "fp32")


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the golden with changed JSON."""

    def edited(edit: Edit) -> Path:
        folder = tmp_path / "golden"
        shutil.copytree(published, folder)
        paths = [folder / f"golden_tiny_{kind}.json" for kind in ("picture", "generation")]
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        edit(first, second)
        for path, value in zip(paths, (first, second), strict=True):
            path.write_text(json.dumps(value), encoding="utf-8")
        return folder

    return edited


def held(folder: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks of `python -m export validate BUNDLE --golden DIR --json`."""
    capsys.readouterr()
    code = main(["validate", str(bundle), "--golden", str(folder), "--json", "--quiet", "--threads", "1"])
    said = json.loads(capsys.readouterr().out)
    assert list(said["rungs"]) == ["golden"] and said["measured"] == "host" and said["passed"] == (code == 0)
    return code, {check["name"]: check for check in said["rungs"]["golden"]["checks"]}


def failing(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in checks.items() if check["status"] == "FAIL"}


def test_a_right_bundle_passes_without_its_checkpoint(
    published: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any) -> None:
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr("export.commands.open_source", unwanted)
    code, checks = held(published, bundle, capsys)
    assert code == 0 and failing(checks) == set()
    assert checks["golden.logits"]["value"] < 5e-6 and checks["golden.logits"]["limit"] == 1e-4
    assert checks["golden.tokens"]["value"] == checks["golden.top5"]["value"] == 1
    assert checks["golden.prompt_tokens"]["value"] == 29 and checks["golden.sqnr_db"]["value"] > 100
    assert main(["validate", str(bundle), "--golden", str(published), "--quiet", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "golden.tokens" in shown and "climbed golden, without L0, L1, L2, L3" in shown


def test_a_resized_picture_has_gates_of_its_own(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, checks = held(make(tmp_path, drawn(70, 61, 1)), bundle, capsys)
    assert code == 0, checks
    assert 1e-5 < checks["golden.logits"]["value"] < 1e-3 and checks["golden.logits"]["limit"] == 0.01
    assert checks["golden.ids"]["status"] == "RECORDED" and checks["golden.sqnr_db"]["limit"] == 40


def test_two_bundles_are_held_side_by_side(
    published: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each by the row of its own weights. What quantised weights have no gate for stands beside a gate."""
    pair = [str(bundle), str(exported(tmp_path / "int8", "int8"))]
    words = ["validate", *pair, "--golden", str(published), "--quiet", "--threads", "1"]
    capsys.readouterr()
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {parts[0]: parts[1:] for line in lines if (parts := re.split(r"\s{2,}", line))}
    assert rows["recipe"] == ["fp32", "int8"] and rows["of the rungs"] == ["golden", "golden"]
    assert rows["verdict"] == ["passed", "passed"] and rows["golden.tokens"] == ["1", "1"]
    assert float(rows["golden.logits"][0]) < 1e-5 < 1e-3 < float(rows["golden.logits"][1])
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bundles"]
    limits = [{c["name"]: c["limit"] for c in each["report"]["rungs"]["golden"]["checks"]} for each in found]
    assert [limit["golden.logits"] for limit in limits] == [1e-4, None]
    wanted = [GATES[f"golden.{kind}.sqnr_db"].limit for kind in ("fp32", "int8")]
    assert [limit["golden.sqnr_db"] for limit in limits] == wanted


def moved(first: dict[str, Any], second: dict[str, Any]) -> None:
    value = float.fromhex(first["top10_logits"][6])
    first["top10_logits"][6] = (value + 4e-4 * float.fromhex(first["top10_logits"][0])).hex()


def another_id(first: dict[str, Any], second: dict[str, Any]) -> None:
    first["top10_ids"][3] = next(n for n in range(100) if n not in first["top10_ids"])


def spread(first: dict[str, Any], second: dict[str, Any]) -> None:
    first["logits_summary"][3] = (1.01 * float.fromhex(first["logits_summary"][3])).hex()


def another_token(first: dict[str, Any], second: dict[str, Any]) -> None:
    from export.chat.template import load_tokenizer

    tokens = second["generated_tokens"]
    tokens[2] = next(n for n in range(40, 100) if n not in tokens)
    second["generated_text"] = load_tokenizer(TINY).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("edit", "fails"),
    [
        (moved, {"golden.logits"}),
        (another_id, {"golden.logits", "golden.sqnr_db", "golden.ids"}),
        (spread, {"golden.logits"}),
        (another_token, {"golden.tokens", "golden.top5"}),
    ],
)
def test_one_wrong_number_fails(
    edit: Edit,
    fails: set[str],
    copied: Callable[[Edit], Path],
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, checks = held(copied(edit), bundle, capsys)
    assert code == 3 and failing(checks) == fails, checks


def test_another_picture_fails(
    copied: Callable[[Edit], Path], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(lambda first, second: None)
    drawn(64, 64, seed=5).save(folder / "golden_tiny_picture.png")
    code, checks = held(folder, bundle, capsys)
    assert code == 3 and {"golden.logits", "golden.sqnr_db"} <= failing(checks)


def _set(which: int, name: str, value: Any) -> Edit:
    def edit(*objects: dict[str, Any]) -> None:
        objects[which][name] = value

    return edit


def _put(which: int, name: str, place: int, value: Any) -> Edit:
    def edit(*objects: dict[str, Any]) -> None:
        objects[which][name][place] = value

    return edit


BROKEN: dict[str, tuple[Edit, str]] = {
    "order": (_put(0, "top10_logits", 2, "0x1p+9"), r"top10_logits do not fall"),
    "a float": (_put(0, "top10_logits", 2, 12.5), r"top10_logits is .* a list of 10 finite numbers as float\.hex"),
    "twice": (lambda a, b: a["top10_ids"].__setitem__(9, a["top10_ids"][8]), r"top10_ids names an id twice"),
    "infinite": (_put(0, "top10_logits", 0, "inf"), r"top10_logits is .* must be a list of 10 finite numbers"),
    "short": (_set(0, "top10_ids", [1, 2]), r"top10_ids is '\[1, 2\]' but must be a list of 10 token ids"),
    "negative": (_put(0, "input_ids", 3, -1), r"input_ids is .* a list of one or more token ids"),
    "no prompt": (_set(1, "prompt", None), r"generation\.json: prompt is 'None' but must be a text; see docs/golden"),
    "top1": (_set(0, "top1_id", 7), r"top1_id and top2_id are not the first two of top10_ids; the golden was damaged"),
    "largest": (_put(0, "logits_summary", 0, "0x1p+9"), r"the largest of logits_summary is not that of top10_logits"),
    "greedy": (_put(1, "generated_tokens", 0, 5), r"golden_tiny_generation\.json does not begin with top1_id"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_golden_is_refused(kind: str, copied: Callable[[Edit], Path]) -> None:
    edit, message = BROKEN[kind]
    with pytest.raises(GoldenError, match=message):
        golden.read(copied(edit))


def test_missing_and_damaged_files_are_refused(copied: Callable[[Edit], Path], tmp_path: Path) -> None:
    folder = copied(lambda first, second: None)
    with pytest.raises(GoldenError, match=r"--golden .*nowhere: no such folder; give the one with golden_NAME"):
        golden.read(tmp_path / "nowhere")
    with pytest.raises(GoldenError, match=r"holds 0 files golden_NAME_picture\.json; a golden's folder has one"):
        golden.read(tmp_path)
    generated, measured = folder / "golden_tiny_generation.json", folder / "golden_tiny_picture.json"
    whole = generated.read_text(encoding="utf-8")
    generated.write_text(whole[:40], encoding="utf-8")
    with pytest.raises(GoldenError, match=r"generation\.json is not valid JSON \(.*\); copy the golden again"):
        golden.read(folder)
    generated.write_text("[]", encoding="utf-8")
    with pytest.raises(GoldenError, match=r"generation\.json is no JSON object"):
        golden.read(folder)
    generated.unlink()
    with pytest.raises(GoldenError, match=r"generation\.json cannot be read \(No such file.*\); a golden is of three"):
        golden.read(folder)
    shutil.copyfile(measured, folder / "golden_other_picture.json")
    with pytest.raises(GoldenError, match="holds 2 files"):
        golden.read(folder)
    (folder / "golden_other_picture.json").unlink()
    (folder / "golden_tiny_picture.png").unlink()
    with pytest.raises(GoldenError, match="golden_tiny_picture: 0 pictures of this name"):
        golden.read(folder)


def of_hub(manifest: dict[str, Any], found: Golden) -> Golden:
    manifest["model"]["source"].update(kind="hub", id="Qwen/Qwen3.5-2B")
    return found


def of_random(manifest: dict[str, Any], found: Golden) -> Golden:
    manifest["model"]["source"]["kind"] = "random"
    return found


def other_size(manifest: dict[str, Any], found: Golden) -> Golden:
    image = found.ids[4]
    more = [*found.ids[:4], *[image] * 6, *found.ids[8:]]
    return replace(found, ids=more, picture=np.zeros((64, 96, 3), np.float32))


def short_context(manifest: dict[str, Any], found: Golden) -> Golden:
    manifest["context_length"] = len(found.ids) + len(found.tokens) - 2
    return found


REFUSED: dict[str, tuple[Callable[[dict[str, Any], Golden], Golden], str]] = {
    "hub": (of_hub, r"the golden is of tiny, .* was made from Qwen/Qwen3\.5-2B; give a golden of that"),
    "random": (of_random, r"has random weights, the golden is of tiny; export that checkpoint"),
    "vocabulary": (
        lambda m, g: replace(g, tokens=[*g.tokens, 448]),
        r"not of this bundle's checkpoint: it names token 448, and the bundle's vocabulary has 448 rows; give a",
    ),
    "text": (lambda m, g: replace(g, text="Miaow"), r"has the answer 'Miaow', and the bundle's tokenizer reads"),
    "prompt": (
        lambda m, g: replace(g, prompt="What is there?"),
        r"has other ids of the prompt than the bundle's template and tokenizer give, 29 against \d+, at place \d+ \[",
    ),
    "size": (
        other_size,
        r"is resized to 64x96 \(height x width\), the bundle has 64x64; export with --image-sizes 64x64,64x96",
    ),
    "picture": (
        lambda m, g: replace(g, picture=np.zeros((64, 96, 3), np.float32)),
        r"picture of 64x96 \(height x width\) is not that of its prompt, which has 4 image tokens",
    ),
    "context": (short_context, r"are 34 tokens, the bundle's context has 33; export with --context-length 34 or more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_golden_of_something_else_is_refused(kind: str, published: Path, bundle: Path) -> None:
    change, message = REFUSED[kind]
    manifest = copy.deepcopy(load(bundle / "manifest.json"))
    found = change(manifest, golden.read(published))
    with pytest.raises(GoldenError, match=message):
        golden.fit(found, bundle, manifest)


@pytest.fixture(scope="module")
def known(published: Path, bundle: Path) -> tuple[Golden, Contract]:
    found = golden.read(published)
    return found, golden.fit(found, bundle, load(bundle / "manifest.json"))


def checks_of(found: Golden, contract: Contract, logits: np.ndarray[Any, Any], kind: str) -> dict[str, Check]:
    return {c.name: c for c in golden._checks(found, logits.astype(np.float32), contract, kind, False)[0]}


def made_up(found: Golden) -> np.ndarray[Any, Any]:
    """Logits [N, V] that agree with the golden's ten and its answer."""
    logits = np.full((len(found.tokens), 448), -5.0)
    logits[np.arange(len(found.tokens)), found.tokens] = 20
    logits[0, found.best_ids] = found.best_logits
    return logits


def test_a_near_tie_is_ambiguous_and_not_wrong(known: tuple[Golden, Contract]) -> None:
    found, contract = known
    logits = made_up(found)
    other = next(n for n in range(100) if n not in found.tokens)
    for gap, right, ties in ((0.04, 1.0, 1), (0.06, 1 - 1 / len(found.tokens), 0)):
        logits[2, other] = 20 + gap
        checks = checks_of(found, contract, logits, "fp32")
        assert checks["golden.tokens"].value == pytest.approx(right) and checks["golden.ambiguous"].value == ties
    # After the prompt the golden's own logits decide, however sure the bundle is.
    second = found.best_ids[1]
    for gap, ties in ((0.04, 1), (0.06, 0)):
        best = found.best_logits.copy()
        best[1] = best[0] - gap
        logits = made_up(found)
        logits[0, second] = best[0] + 3
        checks = checks_of(replace(found, best_logits=best), contract, logits, "int8")
        assert checks["golden.ambiguous"].value == ties
        assert (checks["golden.tokens"].status == "FAIL") == (ties == 0)


def test_a_broken_bundle_fails_by_every_row(known: tuple[Golden, Contract]) -> None:
    found, contract = known
    for kind, logits in (("fp16", True), ("int8", False), ("int4", False)):
        noise = np.random.default_rng(0).normal(0, 30, made_up(found).shape)
        bad = {n for n, c in checks_of(found, contract, noise, kind).items() if c.status == "FAIL"}
        assert bad == {"golden.sqnr_db", "golden.tokens", "golden.top5"} | ({"golden.logits"} if logits else set())
        broken = checks_of(found, contract, np.full_like(noise, np.nan), kind)
        assert broken["golden.sqnr_db"].status == broken["golden.tokens"].status == "FAIL"


@pytest.mark.parametrize(
    ("bits", "floats", "expected"),
    [((32,), "float32", "fp32"), ((32,), "float16", "fp16"), ((32, 8), "float16", "int8"), ((8, 4), "float32", "int4")],
)
def test_the_row_is_that_of_the_narrowest_weights(bits: tuple[int, ...], floats: str, expected: str) -> None:
    assert row([None, *map(Setting, bits)], floats) == expected


def test_the_published_golden_says_which_size_to_export(bundle: Path) -> None:
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "golden_2b_picture.json").exists():
        pytest.skip("the published golden is not beside the project (../shared/data)")
    found = golden.read(folder)
    contract = replace(Contract.of(load(bundle / "manifest.json")), image_token_id=248056)
    assert golden._size(found, contract) == (672, 960) and len(found.ids) == 650 and len(found.tokens) == 30
    with pytest.raises(GoldenError, match=r"of Qwen/Qwen3\.5-2B is not of this bundle's checkpoint: it names token 2"):
        golden.fit(found, bundle, load(bundle / "manifest.json"))


def test_a_golden_writes_no_verdict(published: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(bundle), "--golden", str(published), "--update", "--quiet"]) == 2
    assert "--update writes the verdict of the ladder, which a golden is no part of" in capsys.readouterr().err
