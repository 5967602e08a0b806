"""Damaged files beside the weights (config, tokenizer, template, preprocessor), at export and at run time.

Each is refused with one line that says file, value, rule and remedy; a wrong stop token in one of several
sources is told and ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.__main__ import main
from export.bundle.writer import BundleWriter
from export.chat.sidecars import write_tokenizer
from export.chat.stops import Stops, find_stops
from export.chat.template import load_tokenizer, render
from export.chat.tokenizer import read_tokenizer, real_ids
from export.checkpoint.base import CheckpointError
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.random import RandomCheckpoint
from export.model.config import CLIP_SCALE, PUBLISHED_SCALE, ConfigError, ModelConfig
from export.sizes import shipped_tiny
from export.spec import ExportError
from runtime_tests.conftest import variant

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
TEXT = json.loads((shipped_tiny() / "config.json").read_text())["text_config"]
EXPORT = ["--target", "onnx", "--size", "tiny", "--num-layers", "1", "--no-vision", "--skip-validation", "--json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint to damage."""
    return Path(shutil.copytree(shipped_tiny(), tmp_path / "tiny"))


def edit(name: str, **fields: Any) -> Callable[[Path], object]:
    """Replace fields of a JSON file; None removes."""

    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        document |= fields
        (folder / name).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))

    return change


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


# --- stop tokens ----------------------------------------------------------------------------------------------

DAMAGED: dict[str, tuple[bytes, str]] = {
    "no json": (b'{"eos_token_id": [394', r"generation_config.json is not readable JSON \(Expecting"),
    "no text": (b"\xff\xfe\x00", r"generation_config.json is not readable JSON \('utf-8' codec"),
    "too deep": (b"[" * 100_000, r"generation_config.json is not readable JSON \(maximum recursion"),
    "a list": (b"[394, 392]", r"generation_config.json holds a list; it must be a JSON object"),
}


def stops_of(folder: Path) -> Stops:
    """As at export: with the tokenizer and its template."""
    checkpoint = FolderCheckpoint(folder)
    tokenizer = read_tokenizer(checkpoint)
    return find_stops(checkpoint, checkpoint.model_config.text.vocab_size, tokenizer, real_ids(tokenizer))


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_generation_config_is_refused(case: str, folder: Path) -> None:
    content, message = DAMAGED[case]
    (folder / GENERATION).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        stops_of(folder)


IGNORED: list[tuple[Any, str]] = [
    ("394", r"has eos_token_id '394', which is ignored: it must be a token id, or a list of them"),
    ([394, "392"], r"has eos_token_id '392', which is ignored: it must be a token id"),
    (True, r"has eos_token_id True, which is ignored: it must be a token id"),
    ({"id": 394}, r"has eos_token_id {'id': 394}, which is ignored: it must be a token id"),
    (-1, r"has eos_token_id -1, which is ignored: the embedding has rows 0 to 447"),
    ([448], r"has eos_token_id 448, which is ignored: the embedding has rows 0 to 447"),
    (412, r"has eos_token_id 412, which is ignored: the tokenizer has no such token"),
]


@pytest.mark.parametrize(("value", "message"), IGNORED)
def test_a_wrong_stop_token_is_told_and_ignored(value: Any, message: str, folder: Path) -> None:
    edit(GENERATION, eos_token_id=value)(folder)
    stops = stops_of(folder)
    assert stops.ids == [394, 392]
    told = [notice for notice in stops.notices if re.search(rf"^generation_config.json {message}", notice)]
    assert len(told) == 1 and len(stops.notices) == 2


# What is left of the four sources, and the union, the end of a turn first.
UNIONS: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "as shipped": (lambda folder: None, [394, 392]),
    "no generation_config": (lambda folder: (folder / GENERATION).unlink(), [394, 392]),
    "of a base model": (edit(GENERATION, eos_token_id=392), [394, 392]),
    "twice": (edit(GENERATION, eos_token_id=[394, 394, 392]), [394, 392]),
    "empty": (edit(GENERATION, eos_token_id=[]), [394, 392]),
    "none": (edit(GENERATION, eos_token_id=None), [394, 392]),
    "one more": (edit(GENERATION, eos_token_id=0), [394, 0, 392]),
    "top level": (edit("config.json", eos_token_id=[1, 2]), [394, 392, 1, 2]),
    "a turn ends otherwise": (
        lambda folder: (folder / TEMPLATE).write_text((folder / TEMPLATE).read_text().replace("im_end", "quad_end")),
        [400, 394, 392],
    ),
    "a turn has no end": (
        lambda folder: (folder / TEMPLATE).write_text("{% for m in messages %}{{ m.content }}{% endfor %}"),
        [394, 392],
    ),
}


@pytest.mark.parametrize("case", UNIONS)
def test_stop_tokens_are_the_union_of_all_sources(case: str, folder: Path) -> None:
    change, expected = UNIONS[case]
    change(folder)
    stops = stops_of(folder)
    assert stops.ids == expected
    told = [notice for notice in stops.notices if "ends an answer with no special token" in notice]
    assert len(told) == (case == "a turn has no end")


def test_the_notice_names_tokens_and_sources(folder: Path) -> None:
    (notice,) = stops_of(folder).notices
    assert notice == (
        "an answer stops at <|im_end|> (394, named by the template, the tokenizer and generation_config.json) and "
        "<|endoftext|> (392, named by generation_config.json and config.json)"
    )


def test_only_no_stop_token_at_all_is_refused(folder: Path) -> None:
    (folder / GENERATION).unlink()
    edit("config.json", text_config={k: v for k, v in TEXT.items() if k != "eos_token_id"})(folder)
    edit("tokenizer_config.json", eos_token=None)(folder)
    assert stops_of(folder).ids == [394, 392], "the template's, and the default of transformers' class"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert stops_of(folder).ids == [394]
    (folder / TEMPLATE).unlink()
    with pytest.raises(CheckpointError, match=r"no stop token is known: .*never stop; set eos_token in tokenizer_conf"):
        stops_of(folder)


def test_without_a_tokenizer_the_published_stops_count_where_they_have_rows() -> None:
    small = RandomCheckpoint(variant())
    assert find_stops(small, 64).ids == []
    named = RandomCheckpoint({**variant(), "eos_token_id": 3})
    assert find_stops(named, 64).ids == [3]
    assert find_stops(small, 248_046).ids == [248_044]
    assert find_stops(small, 248_320).ids == [248_046, 248_044]


# --- tokenizer, template and preprocessor at export -----------------------------------------------------------


def _no_template(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    (folder / "tokenizer.json").write_text("{}")


COPIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer no json": (put("tokenizer.json", b"{"), r"tiny/tokenizer.json is not readable JSON"),
    "tokenizer a list": (put("tokenizer.json", b"[]"), r"tiny/tokenizer.json holds a list; it must be a JSON object"),
    "tokenizer empty": (put("tokenizer.json", b"{}"), r"tokenizer in .* cannot be loaded \(.*; take tokenizer.json"),
    "tokenizer version": (edit("tokenizer.json", version=9), r"cannot be loaded \(Exception: invalid type: integer"),
    "tokenizer model": (edit("tokenizer.json", model={"type": "?"}), r"tokenizer in .* cannot be loaded \("),
    "another vocabulary": (
        edit("config.json", text_config={**TEXT, "vocab_size": 406}),
        r"make ids up to 411 of the conversation 'plain'; they must be 0 to 405, the rows of .*: take chat_template",
    ),
    "tokenizer, no template": (_no_template, r"tokenizer in .* cannot be loaded \("),
    "silent": (put(TEMPLATE, b"{# nothing #}"), r"template and tokenizer make no ids of the conversation 'plain'"),
    "config no json": (put("tokenizer_config.json", b"{,}"), r"tiny/tokenizer_config.json is not readable JSON"),
    "config a number": (put("tokenizer_config.json", b"3"), r"tokenizer_config.json holds a int; it must be"),
    "config type": (edit("tokenizer_config.json", model_max_length="x"), r"\(TypeError: '>' not supported"),
    "syntax": (
        put(TEMPLATE, b"{% for m in messages %}\n{{ m.content }\n{% endfor %}"),
        r"chat template cannot render .*\(TemplateSyntaxError: unexpected '}' in line 2\); take chat_template.jinja",
    ),
    "no end": (put(TEMPLATE, b"{% if messages %}"), r"\(TemplateSyntaxError: Unexpected end of template"),
    "unknown filter": (put(TEMPLATE, b"{{ messages | shout }}"), r"\(TemplateAssertionError: No filter named 'shout'"),
    "wrong type": (put(TEMPLATE, b"{{ messages + 1 }}"), r"cannot render the conversation \(TypeError: "),
    "refusal": (put(TEMPLATE, b"{{ raise_exception('no users') }}"), r"\(TemplateError: no users\)"),
    "no text": (put(TEMPLATE, b"\xff{{ messages }}"), r"cannot be loaded \(UnicodeDecodeError"),
    "preprocessor no json": (put("preprocessor_config.json", b"{"), r"preprocessor_config.json is not readable JSON"),
    "preprocessor a list": (put("preprocessor_config.json", b"[]"), r"preprocessor_config.json holds a list; it must"),
}


@pytest.mark.parametrize("case", COPIED)
def test_damaged_sidecars_stop_the_export(case: str, folder: Path, tmp_path: Path) -> None:
    damage, message = COPIED[case]
    damage(folder)
    output = tmp_path / "bundle"
    with (
        pytest.raises(ExportError, match=message) as raised,
        BundleWriter(output, {}, overwrite=False, resume=False) as writer,
    ):
        checkpoint = FolderCheckpoint(folder)
        write_tokenizer(checkpoint, checkpoint.model_config, writer)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "nothing is left behind"


PREPROCESSOR: dict[str, tuple[dict[str, Any], str]] = {
    "a string": ({"image_mean": "x"}, r"has image_mean 'x'; it must be three numbers, for red, green and blue"),
    "two": ({"image_mean": [0.5, 0.5]}, r"the image processor has image_mean \[0.5, 0.5\]; it must be three"),
    "one": ({"image_std": 0.5}, r"has image_std 0.5; it must be three numbers"),
    "strings": ({"image_std": ["a", 1, 1]}, r"has image_std \['a', 1, 1\]; it must be three numbers"),
    "truths": ({"image_std": [True, 1, 1]}, r"has image_std \[True, 1, 1\]; it must be three numbers"),
    "zero": ({"image_std": [0.5, 0, 0.5]}, r"has image_std \[0.5, 0, 0.5\]; its numbers must be above 0: take"),
    "a list": ({"do_normalize": [0]}, r"the image processor has do_normalize \[0\]; it must be true or false"),
}


@pytest.mark.parametrize("case", PREPROCESSOR)
def test_a_preprocessor_with_wrong_values_is_refused(case: str, folder: Path) -> None:
    fields, message = PREPROCESSOR[case]
    edit("preprocessor_config.json", **fields)(folder)
    with pytest.raises(ConfigError, match=message):
        FolderCheckpoint(folder)


def test_how_pixels_are_scaled_is_what_transformers_does(folder: Path) -> None:
    def scale() -> Any:
        vision = FolderCheckpoint(folder).model_config.vision
        assert vision is not None
        return vision.image_mean, vision.image_std

    file = folder / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4], "rescale_factor": 0.00784313725490196}')
    assert scale() == (pytest.approx((0.05, 0.1, 0.15)), pytest.approx((0.5, 1, 2)))
    file.write_text('{"image_mean": [0.1, 0.2, 0.3], "do_normalize": false}')
    assert scale() == ((0, 0, 0), (1, 1, 1))
    file.write_text("{}")  # settings without a mean: transformers takes CLIP's
    assert scale() == (CLIP_SCALE[0], CLIP_SCALE[1])
    file.unlink()
    assert scale() == (PUBLISHED_SCALE[0], PUBLISHED_SCALE[1])
    file.write_text('{"do_normalize": null}')
    with pytest.raises(ConfigError, match=r"the image processor has do_normalize None; it must be true or false"):
        scale()
    file.write_text('{"patch_size": 14}')
    with pytest.raises(ConfigError, match=r"has patch_size 14, config.json has vision_config.patch_size 16; both must"):
        scale()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "generation_config.json"])
def test_numbers_that_json_has_not_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    text = (folder / name).read_text().replace("{", '{"x": NaN, ', 1)
    (folder / name).write_text(text)
    with (
        pytest.raises(ExportError, match=rf"{name} is not readable JSON \(it holds NaN, which JSON has not\)"),
        BundleWriter(tmp_path / "bundle", {}, overwrite=False, resume=False) as writer,
    ):
        checkpoint = FolderCheckpoint(folder)
        write_tokenizer(checkpoint, checkpoint.model_config, writer)


# --- config.json ----------------------------------------------------------------------------------------------

# (path of the field, its value, message); DELETE removes it.
DELETE = object()
WHOLE = "it must be a whole number from 1 to 2147483647: take config.json from the published checkpoint"
WRONG_CONFIGS: list[tuple[str, Any, str]] = [
    ("text_config", "x", r"config.json has no 'text_config' object"),
    ("vision_config", [1], r"config.json has no 'vision_config' object"),
    ("text_config.hidden_size", "abc", rf"config.json has text_config.hidden_size 'abc'; {WHOLE}"),
    ("text_config.hidden_size", 128.0, rf"text_config.hidden_size 128.0; {WHOLE}"),
    ("text_config.hidden_size", None, rf"text_config.hidden_size None; {WHOLE}"),
    ("text_config.hidden_size", DELETE, r"config.json lacks text_config.hidden_size; take config.json from the publ"),
    ("text_config.vocab_size", True, rf"text_config.vocab_size True; {WHOLE}"),
    ("text_config.vocab_size", 2**31, rf"text_config.vocab_size 2147483648; {WHOLE}"),
    ("text_config.intermediate_size", 0, rf"text_config.intermediate_size 0; {WHOLE}"),
    ("text_config.head_dim", -64, rf"text_config.head_dim -64; {WHOLE}"),
    ("text_config.num_attention_heads", [4], rf"text_config.num_attention_heads \[4\]; {WHOLE}"),
    ("text_config.num_key_value_heads", 0, rf"text_config.num_key_value_heads 0; {WHOLE}"),
    ("text_config.linear_num_key_heads", 0, rf"text_config.linear_num_key_heads 0; {WHOLE}"),
    ("text_config.linear_num_key_heads", 3, r"linear_num_value_heads 4 and linear_num_key_heads 3; .*a multiple"),
    ("text_config.linear_num_value_heads", -4, rf"text_config.linear_num_value_heads -4; {WHOLE}"),
    ("text_config.linear_key_head_dim", {}, rf"text_config.linear_key_head_dim {{}}; {WHOLE}"),
    ("text_config.linear_value_head_dim", 0, rf"text_config.linear_value_head_dim 0; {WHOLE}"),
    ("text_config.linear_conv_kernel_dim", 0, rf"text_config.linear_conv_kernel_dim 0; {WHOLE}"),
    ("text_config.num_hidden_layers", 0, r"text_config.num_hidden_layers 0; it must be a whole number from 1 to 1024"),
    ("text_config.num_hidden_layers", 10**9, r"num_hidden_layers 1000000000; it must be .* from 1 to 1024"),
    ("text_config.full_attention_interval", 0, rf"text_config.full_attention_interval 0; {WHOLE}"),
    ("text_config.layer_types", 5, r"layer_types 5 for 5 layers; give one of 'linear_attention', 'full_attention'"),
    ("text_config.layer_types", [["x"]] * 5, r"layer_types \[\['x'\], .* for 5 layers; give one of"),
    ("text_config.layer_types", ["full_attention"], r"layer_types \['full_attention'\] for 5 layers"),
    ("text_config.rms_norm_eps", 0, r"text_config.rms_norm_eps 0; it must be a number above 0"),
    ("text_config.rms_norm_eps", math.nan, r"text_config.rms_norm_eps nan; it must be a number above 0"),
    ("text_config.tie_word_embeddings", "yes", r"text_config.tie_word_embeddings 'yes'; it must be true or false"),
    ("tie_word_embeddings", 1, r"config.json has tie_word_embeddings 1; it must be true or false"),
    ("image_token_id", "5", r"config.json has image_token_id '5'; it must be a whole number from 0 to 63"),
    ("image_token_id", -1, r"image_token_id -1; it must be a whole number from 0 to 63"),
    ("vision_end_token_id", 64, r"vision_end_token_id 64; it must be a whole number from 0 to 63"),
    ("vision_start_token_id", DELETE, r"vision_start_token_id None; it must be a whole number from 0 to 63"),
    ("text_config.rope_parameters", "x", r"text_config.rope_parameters 'x'; it must be a JSON object"),
    ("text_config.rope_parameters.rope_theta", "1e7", r"rope_parameters.rope_theta '1e7'; it must be a number above 0"),
    ("text_config.rope_parameters.rope_theta", math.inf, r"rope_theta inf; it must be a number above 0"),
    ("text_config.rope_parameters", {"type": "yarn"}, r"rope_parameters.rope_type 'yarn'; .* knows 'default' only"),
    ("text_config.rope_scaling", {"type": "mrope"}, r"rope_scaling.rope_type 'mrope' \(it wins over rope_parameters"),
    ("text_config.rope_parameters.rope_type", "linear", r"rope_type 'linear'; .*remove text_config.rope_parameters if"),
    ("text_config.rope_parameters.full_attention", {}, r"rope_parameters.full_attention; .* one rotary embedding for"),
    ("text_config.rope_parameters.mrope_section", ["q", 3, 3], r"mrope_section \['q', 3, 3\]; .* numbers above 0"),
    ("text_config.rope_parameters.mrope_section", [3.0, 3, 2], r"mrope_section \[3.0, 3, 2\]; it must be three"),
    ("text_config.rope_parameters.mrope_section", [9, -1, 0], r"mrope_section \[9, -1, 0\]; .* whole numbers above 0"),
    ("text_config.rope_parameters.mrope_section", [4, 4], r"mrope_section \[4, 4\]; it must be three"),
    ("text_config.rope_parameters.mrope_section", 8, r"mrope_section 8; it must be three"),
    ("text_config.rope_parameters.partial_rotary_factor", "x", r"partial_rotary_factor 'x'; it must be a number"),
    ("text_config.rope_parameters.partial_rotary_factor", 2, r"partial_rotary_factor 2; of 64 .* rotates 128, which"),
    ("text_config.rope_parameters.partial_rotary_factor", 0.27, r"it rotates 17.28, which must be an even number"),
    ("text_config.rope_parameters.partial_rotary_factor", 1e299, r"partial_rotary_factor 1e\+299; of 64 dimensions"),
    ("text_config.hidden_act", ["silu"], r"text_config.hidden_act \['silu'\]; the exportable model knows only 'silu'"),
    ("vision_config.depth", 0, r"vision_config.depth 0; it must be a whole number from 1 to 1024"),
    ("vision_config.hidden_size", "64", rf"vision_config.hidden_size '64'; {WHOLE}"),
    ("vision_config.num_heads", 0, rf"vision_config.num_heads 0; {WHOLE}"),
    ("vision_config.num_heads", False, rf"vision_config.num_heads False; {WHOLE}"),
    ("vision_config.patch_size", -16, rf"vision_config.patch_size -16; {WHOLE}"),
    ("vision_config.spatial_merge_size", 0, rf"vision_config.spatial_merge_size 0; {WHOLE}"),
    ("vision_config.num_position_embeddings", -64, rf"vision_config.num_position_embeddings -64; {WHOLE}"),
    ("vision_config.num_position_embeddings", 65, r"num_position_embeddings 65; it must be the square"),
    ("vision_config.rope_parameters", [1], r"vision_config.rope_parameters \[1\]; it must be a JSON object"),
    ("vision_config.intermediate_size", DELETE, r"config.json lacks vision_config.intermediate_size; take config.json"),
]


def _with(path: str, value: Any) -> dict[str, Any]:
    config = variant()
    *parents, name = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    if value is DELETE:
        del place[name]
    else:
        place[name] = value
    return config


@pytest.mark.parametrize(("path", "value", "message"), WRONG_CONFIGS)
def test_a_wrong_field_of_the_config_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        ModelConfig.from_dict(_with(path, value))
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)


def test_older_places_of_rope_values_are_read() -> None:
    config = variant()
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["partial_rotary_factor"] = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    text["rope_scaling"], text["rope_parameters"] = rope, None
    assert ModelConfig.from_dict(config) == ModelConfig.from_dict(variant())


@pytest.mark.parametrize("more", [["--dry-run"], ["--skip-validation"]])
def test_a_wrong_config_is_one_line_of_the_command(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit("config.json", text_config={**TEXT, "linear_num_key_heads": 0})(folder)
    words = ["--target", "onnx", "--checkpoint", str(folder), "-o", str(tmp_path / "bundle")]
    assert main([*words, "--json", "--quiet", *more]) == 1
    out, err = capsys.readouterr()
    assert err == f"error: config.json has text_config.linear_num_key_heads 0; {WHOLE}\n"
    assert json.loads(out) == {"error": err.removeprefix("error: ").rstrip(), "exit_code": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# --- through the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["stop tokens", "template", "config"])
def test_the_command_prints_one_line_and_json(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damages = {
        "stop tokens": (put(GENERATION, DAMAGED["no json"][0]), DAMAGED["no json"][1]),
        "template": COPIED["syntax"],
        "config": (edit("config.json", text_config=3), r"config.json has no 'text_config' object"),
    }
    damage, message = damages[case]
    damage(folder)
    assert main([*EXPORT, "--quiet", "--checkpoint", str(folder), "-o", str(tmp_path / "bundle")]) == 1
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
    assert json.loads(out) == {"error": err.removeprefix("error: ").rstrip("\n"), "exit_code": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "bundle"
    assert main([*EXPORT, "--quiet", "-o", str(output)]) == 0
    return output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (TEMPLATE, r"chat template cannot render the conversation \(TemplateSyntaxError"),
        ("tokenizer.json", r"the tokenizer in .* cannot be loaded \("),
        ("tokenizer_config.json", r"the tokenizer in .* cannot be loaded \(JSONDecodeError"),
    ],
)
def test_damage_after_the_export_stops_run(
    name: str, message: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    content = b"{%{{"
    (copy / name).write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    for entry in manifest["files"]:  # a bundle that was made so: the reader's own checks find nothing
        if entry["path"] == name:
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["run", str(copy), "--prompt", "Hello", "--json", "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
    assert json.loads(out)["exit_code"] == 1


def test_what_is_not_damaged_still_renders(bundle: Path) -> None:
    tokenizer = load_tokenizer(bundle)
    tests = json.loads((bundle / "chat_tests.json").read_text())
    assert {"plain", "system", "turns", "image", "thinking", "no-thinking", "tools"} <= {t["name"] for t in tests}
    assert tests[0]["name"] == "plain" and tests[0]["token_ids"] == render(tokenizer, tests[0]["messages"])
    with pytest.raises(ExportError, match=r"has no tokenizer.json \(random weights have none\)"):
        load_tokenizer(bundle.parent)


# --- the noise of libraries -----------------------------------------------------------------------------------

NOISE = """
import sys
from export.progress import Reporter
if sys.argv[1] == "quiet":
    Reporter()
assert not {"torch", "transformers"} & set(sys.modules), "a reporter imports nothing heavy"
import transformers
import transformers.integrations.hub_kernels as kernels
kernels.logger.warning("advice")
kernels.logger.error("trouble")
transformers.logging.get_logger("transformers.modeling_utils").warning("heard")
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_reporter_silences_advice_and_nothing_else(quiet: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISE, "quiet" if quiet else "loud"], capture_output=True, text=True, check=True
    )
    found = [word for word in ("advice", "trouble", "heard") if word in done.stderr]
    assert found == (["trouble", "heard"] if quiet else ["advice", "trouble", "heard"])


def test_a_config_that_only_transformers_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "c"
    shutil.copytree(shipped_tiny(), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["use_cache"] = ["no"]
    config["text_config"]["max_position_embeddings"] = "x"
    (checkpoint / "config.json").write_text(json.dumps(config))
    words = ["--target", "onnx", "--size", "tiny", "--checkpoint", str(checkpoint), "--quiet", "--num-layers", "4"]
    assert main([*words, "-o", str(tmp_path / "b")]) in (1, 2)
    assert "transformers, which the bundle is compared with, refuses it" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
