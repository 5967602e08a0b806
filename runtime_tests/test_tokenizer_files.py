"""Tokenizer, chat template and preprocessor in every form that tools write, and what the bundle makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.qwen2 import tokenization_qwen2
from transformers.models.qwen3_5 import tokenization_qwen3_5

from export.__main__ import main
from export.bundle.writer import BundleWriter
from export.chat.sidecars import Sidecars, portable, write_tokenizer
from export.chat.template import load_tokenizer, render, render_text
from export.checkpoint.base import CheckpointError
from export.checkpoint.random import RandomCheckpoint
from export.sizes import shipped_tiny
from runtime_tests.conftest import variant
from runtime_tests.files import Files

FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
TEXT = "12+30=? Größe, e\u0301 नमस्ते 灯台 👩🏽‍🚀 \r\n\n  x<|im_end|>\n<think>\n\n</think>\n\n<tool_call><|endoftext|>"
TEMPLATE = "chat_template.jinja"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped checkpoint without its weights."""
    place = tmp_path / "tiny"
    place.mkdir()
    for name in FILES:
        shutil.copy(shipped_tiny() / name, place / name)
    return place


@contextmanager
def bundle(checkpoint: Any) -> Iterator[tuple[Path, Sidecars]]:
    """What an export writes of it, and where."""
    output = Path(str(checkpoint.folder)).parent / "bundle"
    with BundleWriter(output, {}, overwrite=False, resume=False) as writer:
        yield writer.path, write_tokenizer(checkpoint, checkpoint.model_config, writer)
        writer.discard()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def told(sidecars: Sidecars, words: str) -> int:
    return sum(words in notice for notice in sidecars.notices)


# --- the tokenizer --------------------------------------------------------------------------------------------


def version_4(folder: Path) -> None:
    """Template within tokenizer_config.json, special_tokens_map.json, added_tokens.json, a class of fast tokenizers."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    template = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(
            tokenizer_class="Qwen2TokenizerFast",
            chat_template=template,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
            added_tokens_decoder=decoder,
        ),
    )
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: token["id"] for token in added}))


def vocabulary_only(folder: Path) -> None:
    """vocab.json and merges.txt, the added tokens in tokenizer_config.json."""
    version_4(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def vocabulary_and_added_tokens(folder: Path) -> None:
    """The same, older: the added tokens in added_tokens.json."""
    vocabulary_only(folder)
    edit(folder / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))


def tokenizers_backend(folder: Path) -> None:
    extra = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    fields = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
    edit(folder / "tokenizer_config.json", lambda c: c.update(**fields, extra_special_tokens=extra))


def truncated(folder: Path) -> None:
    """Left over from training."""
    limits = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    pad = {"pad_id": 392, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit(folder / "tokenizer.json", lambda t: t.update(truncation=limits, padding={**padding, **pad}))


def no_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def new_token(folder: Path) -> None:
    """A token that only tokenizer_config.json knows; transformers gives it the next id."""
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=["<|city|>"]))


FORMS = (
    *(version_4, vocabulary_only, vocabulary_and_added_tokens),
    *(tokenizers_backend, truncated, no_config, new_token),
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_bundle_tokenizes_as_transformers_does(form: Callable[[Path], None], folder: Path) -> None:
    whole = AutoTokenizer.from_pretrained(folder)
    form(folder)
    # transformers 5.24 makes an empty tokenizer of vocab.json and merges.txt: there the whole file is the judge.
    theirs = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").exists() else whole
    text = TEXT + ("<|city|>" if form is new_token else "")
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert len(expected) > 40 and 394 in expected and 410 in expected
    with bundle(Files(folder)) as (place, sidecars):
        ours = load_tokenizer(place)
        assert ours(text, add_special_tokens=False)["input_ids"] == expected
        raw = Tokenizer.from_file(str(place / "tokenizer.json"))  # as an app reads it, without any other file
        assert raw.encode(text, add_special_tokens=False).ids == expected
        assert raw.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        assert raw.truncation is None and raw.padding is None
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert sidecars.manifest["files"] == ["tokenizer.json", "tokenizer_config.json"]
        assert sidecars.manifest["num_tokens"] == 412 + (form is new_token)
        assert sidecars.manifest["stop_token_ids"] == [394, 392]
        prompt = whole.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
        assert render(ours, HELLO) == whole(prompt)["input_ids"]


@pytest.mark.parametrize(
    ("model_type", "module"), [("qwen3_5", tokenization_qwen3_5), ("qwen3_5_text", tokenization_qwen2)]
)
def test_the_class_that_transformers_takes_decides_the_words(model_type: str, module: Any, folder: Path) -> None:
    """tokenizer_config.json says Qwen2Tokenizer; transformers overrules it for one of the two model types."""
    checkpoint = Files(folder)
    (folder / "config.json").write_text(json.dumps({**checkpoint.config, "model_type": model_type}))
    with bundle(checkpoint) as (place, _):
        written = json.loads((place / "tokenizer.json").read_text())["pre_tokenizer"]
        assert written["pretokenizers"][0]["pattern"]["Regex"] == module.PRETOKENIZE_REGEX
        loaded = json.loads(load_tokenizer(place).backend_tokenizer.to_str())["pre_tokenizer"]
        assert loaded == written


def test_written_files_carry_nothing_of_the_machine_that_made_them(folder: Path) -> None:
    code = {"AutoTokenizer": ["x.X", None]}
    fields = {"name_or_path": "/home/me/run", "auto_map": code, "chat_template": "{{ 'OLD' }}"}
    edit(folder / "tokenizer_config.json", lambda c: c.update(fields))
    with bundle(Files(folder)) as (place, _):
        written = json.loads((place / "tokenizer_config.json").read_text())
    assert not set(fields) & set(written)
    assert written["eos_token"] == "<|im_end|>" and written["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_tokenizer_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with bundle(Files(folder)) as (place, sidecars):
        assert sidecars.manifest["files"] == [] and sidecars.manifest["chat_template"] is None
        assert not (place / "chat_tests.json").exists()
    assert told(sidecars, "has no tokenizer (tokenizer.json, or vocab.json with merges.txt): the bundle takes token")
    assert sidecars.manifest["never_sampled_ids"] == [401, 402, 404, 405]
    assert "num_tokens" not in sidecars.manifest


def test_random_weights_need_no_notice(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(variant())
    with BundleWriter(tmp_path / "b", {}, overwrite=False, resume=False) as writer:
        sidecars = write_tokenizer(checkpoint, checkpoint.model_config, writer)
        assert [path.name for path in writer.path.iterdir()] == [".resume.json"]
    assert sidecars.notices == []
    assert sidecars.manifest["special_token_ids"] == {"image": 5, "vision_start": 6, "vision_end": 7}
    assert sidecars.manifest["never_sampled_ids"] == [5, 6, 7, 8]


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def sixty_more(folder: Path) -> None:
    """60 tokens added to the tokenizer, the embedding of 448 rows not resized."""
    tokens = [{"id": 412 + n, "content": f"<|new_{n}|>", **FLAGS, "special": True} for n in range(60)]
    edit(folder / "tokenizer.json", lambda t: t["added_tokens"].extend(tokens))


def test_gaps_and_placeholders_are_never_sampled(folder: Path) -> None:
    """Ids 412 to 419 have no token, 420 is one; a stop token stays, whatever it is."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append({**FLAGS, "id": 420, "content": "<|last|>", "special": True})
    raw["model"]["vocab"].update({token["content"]: token["id"] for token in raw["added_tokens"]})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    edit(folder / "generation_config.json", lambda g: g.update(eos_token_id=[394, 403]))
    with bundle(Files(folder)) as (_, sidecars):
        assert sidecars.manifest["num_tokens"] == 421
        assert sidecars.manifest["never_sampled_ids"] == [401, 402, 404, 405, *range(412, 420)]
        assert sidecars.manifest["stop_token_ids"] == [394, 403, 392]


def test_tokens_without_a_row_are_told(folder: Path) -> None:
    sixty_more(folder)
    with bundle(Files(folder)) as (_, sidecars):
        assert sidecars.manifest["num_tokens"] == 472
    assert told(sidecars, "24 tokens have no row in the embedding of 448 rows, from '<|new_36|>' (448) on: prompt") == 1


def test_a_text_model_knows_only_the_placeholders_of_its_tokenizer(folder: Path) -> None:
    checkpoint = Files(folder)
    edit(folder / "config.json", lambda c: [c.pop(k) for k in [*c] if k.endswith("_token_id") or "vision" in k])
    text = Files(folder)
    assert text.model_config.vision is None and text.model_config.image_token_id == 248_056
    with bundle(text) as (_, sidecars):
        assert sidecars.manifest["special_token_ids"] == {}, "248056 is no token here"
        assert sidecars.manifest["never_sampled_ids"] == [401, 402, 403, 404, 405]
    checkpoint.model_config = checkpoint.model_config.without_vision()
    with bundle(checkpoint) as (_, sidecars):
        assert sidecars.manifest["special_token_ids"] == {"image": 404, "vision_start": 401, "vision_end": 402}


# --- the template ---------------------------------------------------------------------------------------------


def in_config(folder: Path, value: Any) -> None:
    (folder / TEMPLATE).unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=value))


def in_json(folder: Path, value: Any) -> None:
    (folder / TEMPLATE).unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": value}))


SHIPPED = (shipped_tiny() / TEMPLATE).read_text(encoding="utf-8")
OTHER = "{{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": SHIPPED}]


@pytest.mark.parametrize("place", [in_config, in_json])
@pytest.mark.parametrize("value", [SHIPPED, [{"name": "default", "template": SHIPPED}], {"default": SHIPPED}])
def test_a_template_is_found_wherever_it_is(place: Callable[[Path, Any], None], value: Any, folder: Path) -> None:
    place(folder, value)
    with bundle(Files(folder)) as (written, sidecars):
        assert (written / TEMPLATE).read_text(encoding="utf-8") == SHIPPED
        assert sidecars.manifest["chat_template"] == TEMPLATE
        assert "additional_chat_templates" not in sidecars.manifest
        assert len(sidecars.notices) == 1, "that of the stop tokens"


@pytest.mark.parametrize("place", [in_config, in_json])
def test_named_templates_serve_as_in_transformers(place: Callable[[Path, Any], None], folder: Path) -> None:
    place(folder, NAMED)
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    with bundle(Files(folder)) as (written, sidecars):
        paths = {"tool_use": "additional_chat_templates/tool_use.jinja"}
        assert sidecars.manifest["additional_chat_templates"] == paths
        assert (written / "additional_chat_templates" / "tool_use.jinja").read_text() == OTHER
        assert (written / TEMPLATE).read_text(encoding="utf-8") == SHIPPED
        ours = load_tokenizer(written)
        assert render_text(ours, HELLO, tools=tools) == "Hello"
        assert render_text(ours, HELLO).startswith("<|im_start|>user\nHello")
        tests = {test["name"]: test for test in json.loads((written / "chat_tests.json").read_text())}
        assert sidecars.manifest["template"]["tools"] is False and "tools" not in tests
    assert told(sidecars, "the chat template takes no tools") == 1


def test_named_templates_without_a_default_are_told(folder: Path) -> None:
    in_config(folder, NAMED[:1])
    with bundle(Files(folder)) as (written, sidecars):
        assert sidecars.manifest["chat_template"] is None and "template" not in sidecars.manifest
        assert [path.name for path in (written / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
        assert sidecars.manifest["stop_token_ids"] == [394, 392]
    assert told(sidecars, "none of the chat templates (tool_use) is named default: the bundle cannot render") == 1
    assert len(sidecars.notices) == 2


def test_named_templates_as_transformers_writes_them(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    with bundle(Files(folder)) as (written, sidecars):
        assert (written / "additional_chat_templates" / "tool_use.jinja").read_text() == OTHER
        assert [*sidecars.manifest["additional_chat_templates"]] == ["tool_use"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_a_template_name_stays_in_its_folder(name: str, folder: Path) -> None:
    in_config(folder, [*NAMED, {"name": name, "template": OTHER}])
    with pytest.raises(CheckpointError, match=r"names a chat template .*; the name must do as a file name"), bundle(
        Files(folder)
    ):
        pass


@pytest.mark.parametrize("value", [5, [5], {"default": 5}, [{"name": "default"}]])
def test_what_is_no_template_is_refused(value: Any, folder: Path) -> None:
    in_json(folder, value)
    rule = r"chat_template in chat_template.json is a \w+; it must be a template, or a list of objects with name and t"
    with pytest.raises(CheckpointError, match=rule), bundle(Files(folder)):
        pass


@pytest.mark.parametrize("other", ["tokenizer_config.json", "chat_template.json"])
def test_a_conflict_is_decided_as_by_transformers_and_told(other: str, folder: Path) -> None:
    if other == "tokenizer_config.json":
        edit(folder / other, lambda c: c.update(chat_template="{{ 'OLD' }}"))
    else:
        (folder / other).write_text(json.dumps({"chat_template": "{{ 'OLD' }}"}))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(HELLO, tokenize=False)
    with bundle(Files(folder)) as (written, sidecars):
        assert render_text(load_tokenizer(written), HELLO, generation_prompt=False) == theirs
    assert told(sidecars, f"{TEMPLATE} and {other} hold different chat templates; transformers takes {TEMPLATE}") == 1


def test_the_same_template_twice_is_no_conflict(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=SHIPPED.replace("\n", "\r\n")))
    with bundle(Files(folder)) as (_, sidecars):
        assert not told(sidecars, "hold different chat templates")


def test_no_template_is_told(folder: Path) -> None:
    (folder / TEMPLATE).unlink()
    with bundle(Files(folder)) as (written, sidecars):
        assert sidecars.manifest["chat_template"] is None and "template" not in sidecars.manifest
        assert not (written / "chat_tests.json").exists()
    assert told(sidecars, "the checkpoint has no chat template (chat_template.jinja, or chat_template in") == 1


# --- the preprocessor -----------------------------------------------------------------------------------------

PICTURES = json.loads((shipped_tiny() / "preprocessor_config.json").read_text())


def test_the_preprocessor_is_the_file_or_what_transformers_reads(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    same, other = dict(PICTURES), {**PICTURES, "image_mean": [0.4, 0.4, 0.4]}
    for there, chosen, expected, conflict in (
        (True, None, PICTURES, 0),
        (True, same, PICTURES, 0),
        (True, other, other, 1),
        (False, other, other, 0),
    ):
        if not there:
            file.unlink()
        checkpoint = Files(folder)
        checkpoint.preprocessor = chosen
        with bundle(checkpoint) as (written, sidecars):
            path = written / file.name
            assert json.loads(path.read_text()) == expected
            assert (there and path.read_bytes() == file.read_bytes()) == (expected is PICTURES)
        assert told(sidecars, "processor_config.json and preprocessor_config.json differ about pictures") == conflict
        assert not told(sidecars, "has neither")


def test_no_preprocessor_is_told(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with bundle(Files(folder)) as (written, sidecars):
        assert not (written / "preprocessor_config.json").exists()
    assert told(sidecars, "has neither preprocessor_config.json nor processor_config.json; pictures are") == 1
    text = Files(folder)
    text.model_config = text.model_config.without_vision()
    with bundle(text) as (_, sidecars):
        assert not told(sidecars, "has neither")


# --- templates that only transformers could render ------------------------------------------------------------

TAGGED = (
    "{% for m in messages %}\n  {{ m.role }}:\n"
    "  {%- if m.role == 'assistant' %}\n"
    "    {%- generation -%}  {{ m.content }}\n{%- endgeneration %}\n"
    "    {% generation %}<|im_end|>\n{% endgeneration %}\n"
    "  {%+ generation -%} x {%- endgeneration +%}\n  y{%generation%}z{%endgeneration%}\n"
    "  {%- else %} {{ m.content }}<|im_end|>\n{% endif %}\n{% endfor %}"
)
TALK = [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "generation"}]


def test_generation_tags_become_conditions(folder: Path) -> None:
    (folder / TEMPLATE).write_text(TAGGED)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False)
    assert "Hi." in theirs and "yz" in theirs
    with bundle(Files(folder)) as (written, _):
        template = (written / TEMPLATE).read_text()
        assert "{%- if true -%}" in template and "{%- endif +%}" in template and "generation" not in template
        assert render_text(load_tokenizer(written), TALK, generation_prompt=False) == theirs
    assert portable("{{ generation }} {% set generation = 1 %}") == "{{ generation }} {% set generation = 1 %}"


@pytest.mark.parametrize("form", ["file", "config"])
def test_windows_line_ends_mean_the_same(form: str, folder: Path) -> None:
    template = SHIPPED.replace("\n", "\r\n")
    if form == "file":
        (folder / TEMPLATE).write_bytes(template.encode())
    else:
        in_config(folder, template)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False)
    with bundle(Files(folder)) as (written, _):
        assert b"\r" not in (written / TEMPLATE).read_bytes()
        assert render_text(load_tokenizer(written), TALK, generation_prompt=False) == theirs


def test_a_template_that_asks_for_the_time_is_tested_at_a_fixed_one(folder: Path) -> None:
    asks = "{%- macro day() %}{{ strftime_now('%d %b %Y, %-d.%-m., %H:%M:%S, %A') }}{% endmacro %}"
    begin = "{{- 'Today: ' + day() + '\n' }}\n  {%- if true %}"
    (folder / TEMPLATE).write_text(asks + begin + SHIPPED + "{% endif %}")
    with bundle(Files(folder)) as (written, sidecars):
        tests = json.loads((written / "chat_tests.json").read_text())
        assert {test["now"] for test in tests} == {"2026-01-02T03:04:05"}
        plain = load_tokenizer(written).decode(tests[0]["token_ids"])
        assert plain.startswith("Today: 02 Jan 2026, 2.1., 03:04:05, Friday\n<|im_start|>user\nWhat is 12 + 30?<|im_")
        again = load_tokenizer(written).apply_chat_template(HELLO, tokenize=False)
        assert not again.startswith("Today: 02 Jan 2026, 2.1., 03:04:05")
    assert told(sidecars, "asks for the time (strftime_now): an app must provide that function") == 1


# --- from the command line ------------------------------------------------------------------------------------


def test_a_string_only_template_and_a_longer_tokenizer_from_export_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(shipped_tiny(), tmp_path / "tiny"))
    (checkpoint / TEMPLATE).write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    )
    sixty_more(checkpoint)
    output = str(tmp_path / "bundle")
    words = ["--target", "onnx", "--size", "tiny", "--checkpoint", str(checkpoint), "--num-layers", "1", "-o", output]
    assert main([*words, "--recipe", "fp32", "--skip-validation", "--threads", "1"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    for notice in (
        "an answer stops at <|im_end|> (394, named by the template, the tokenizer and generation_config.json) and",
        "the chat template takes no pictures: conversations with pictures are refused",
        "24 tokens have no row in the embedding of 448 rows, from '<|new_36|>' (448) on",
    ):
        assert notice in shown
    picture = str(Path(__file__).parents[1] / "docs" / "demo.png")
    run = ["run", output, "--threads", "1", "--max-new-tokens", "2", "--json"]
    assert main([*run, "--prompt", "Hello", "--prompt", "Again"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 2
    assert main([*run, "--prompt", "Read.", "--image", picture]) == 1
    assert "chat template (chat_template.jinja) takes no pictures; ask without" in capsys.readouterr().err
    assert main([*run, "--prompt", "What is <|new_59|>?"]) == 1
    assert "token 471 ('<|new_59|>') has no row in the model's embedding, which has 448 rows" in capsys.readouterr().err
