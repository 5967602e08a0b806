"""Chat templates: the two published ones, what a template can do, and the chat tests written for it.

The published templates lie beside the project and are not copied into it; expected texts are written out here.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.chat import abilities
from export.chat.abilities import TOOL, Abilities, probe
from export.chat.chat_tests import chat_tests, conversations, dump_tests
from export.chat.template import Refusal, load_tokenizer, render, render_text
from export.checkpoint.folder import FolderCheckpoint
from export.model.config import ModelConfig
from export.sizes import shipped_tiny
from runtime_tests.files import PUBLISHED, published_template

OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"
PICTURE = {"type": "image"}
TURN = "<|im_end|>\n<|im_start|>"
Message = dict[str, Any]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return FolderCheckpoint(shipped_tiny()).model_config


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> Any:
    """The shipped tokenizer with a published template."""
    return with_template(published_template(request.param))


def with_template(template: str) -> Any:
    tokenizer = load_tokenizer(shipped_tiny())
    tokenizer.chat_template = template
    return tokenizer


def thinks(tokenizer: Any) -> bool:
    """Which of the two: only 4B and 9B think without being told to."""
    return "enable_thinking is false" in tokenizer.chat_template


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def text(content: str) -> Message:
    return {"type": "text", "text": content}


# --- the published templates, what they write -----------------------------------------------------------------


def test_thinking_without_a_switch_on_and_off(published: Any) -> None:
    head = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    default = OPEN if thinks(published) else CLOSED
    assert render_text(published, [user("Hello")]) == head + default
    assert render_text(published, [user("Hello")], enable_thinking=True) == head + OPEN
    assert render_text(published, [user("Hello")], enable_thinking=False) == head + CLOSED
    assert render_text(published, [user("Hello")], generation_prompt=False) == head.removesuffix(
        "<|im_start|>assistant\n"
    )


def test_the_system_message_comes_first_and_is_trimmed(published: Any) -> None:
    found = render_text(published, [system("  Be brief.\n"), user(" Hello ")], generation_prompt=False)
    assert found == f"<|im_start|>system\nBe brief.{TURN}user\nHello<|im_end|>\n"
    items = [system([text("Be "), text("brief.")]), user([text("Hello")])]
    assert render_text(published, items, generation_prompt=False) == found


def test_past_answers_lose_their_thoughts(published: Any) -> None:
    messages = [
        user("1 + 1?"),
        assistant("<think>\nOne and one.\n</think>\n\nTwo."),
        user("2 + 2?"),
        assistant("Four.", reasoning_content="Two and two."),
        user("And 3 + 3?"),
    ]
    assert render_text(published, messages, enable_thinking=True) == (
        f"<|im_start|>user\n1 + 1?{TURN}assistant\nTwo.{TURN}user\n2 + 2?{TURN}assistant\nFour.{TURN}"
        f"user\nAnd 3 + 3?{TURN}assistant\n<think>\n"
    )


def test_the_last_answer_keeps_its_thought(published: Any) -> None:
    expected = f"<|im_start|>user\n1 + 1?{TURN}assistant\n<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>\n"
    for answer in (
        assistant("<think>\nOne and one.\n</think>\n\nTwo."),
        assistant("Two.", reasoning_content="\nOne and one.\n"),
    ):
        assert render_text(published, [user("1 + 1?"), answer], generation_prompt=False) == expected
    bare = render_text(published, [user("1 + 1?"), assistant("Two.")], generation_prompt=False)
    assert bare == expected.replace("One and one.", "")


def test_pictures_have_one_place_each(published: Any) -> None:
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    messages = [
        user([PICTURE, text("What is this?")]),
        assistant("A lamp."),
        user([text("And these: "), PICTURE, {"type": "image_url", "image_url": "x"}, text("?")]),
    ]
    assert render_text(published, messages, enable_thinking=False) == (
        f"<|im_start|>user\n{place}What is this?{TURN}assistant\nA lamp.{TURN}"
        f"user\nAnd these: {place}{place}?{TURN}assistant\n{CLOSED}"
    )
    ids = render(published, messages)
    assert ids.count(404) == ids.count(401) == ids.count(402) == 3


def test_tools_with_calls_and_results_over_several_turns(published: Any) -> None:
    def call(name: str, **arguments: Any) -> Message:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    messages = [
        system("Be brief."),
        user("Weather in Paris and Rome?"),
        assistant("", tool_calls=[call("weather", city="Paris"), call("weather", city="Rome")]),
        {"role": "tool", "content": "21.5"},
        {"role": "tool", "content": '{"celsius": 30}'},
        assistant("Warm.", reasoning_content="21 and 30."),
        user("And the sea?"),
        assistant("I look.", tool_calls=[call("sea", depth=2, salt=True, at=[1, "ä"], by={"b": 1, "a": None})]),
        {"role": "tool", "content": "calm"},
    ]
    found = render_text(published, messages, tools=[TOOL], enable_thinking=True)
    head, _, rest = found.partition("\n</IMPORTANT>")
    assert head.startswith("<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>\n\nIf you choose" in head, "keys in the order given"
    assert rest == (
        f"\n\nBe brief.{TURN}user\nWeather in Paris and Rome?{TURN}assistant\n"
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
        f"{TURN}user\n<tool_response>\n21.5\n</tool_response>\n<tool_response>\n{{\"celsius\": 30}}\n</tool_response>"
        f"{TURN}assistant\nWarm.{TURN}user\nAnd the sea?{TURN}assistant\n<think>\n\n</think>\n\nI look.\n\n"
        "<tool_call>\n<function=sea>\n<parameter=depth>\n2\n</parameter>\n<parameter=salt>\nTrue\n</parameter>\n"
        '<parameter=at>\n[1, "ä"]\n</parameter>\n<parameter=by>\n{"b": 1, "a": null}\n</parameter>\n</function>\n'
        f"</tool_call>{TURN}user\n<tool_response>\ncalm\n</tool_response>{TURN}assistant\n{OPEN}"
    )


REFUSALS: dict[str, tuple[list[Message], str]] = {
    "no messages": ([], "No messages provided."),
    "picture in system": ([system([PICTURE]), user("x")], "System message cannot contain images."),
    "video in system": ([system([{"type": "video"}]), user("x")], "System message cannot contain videos."),
    "item": ([user([{"type": "smell"}])], "Unexpected item type in content."),
    "content": ([user(5)], "Unexpected content type."),
    "no user": ([system("x"), assistant("y")], "No user query found in messages."),
    "tool results only": ([user("<tool_response>x</tool_response>")], "No user query found in messages."),
    "late system": ([user("x"), system("y")], "System message must be at the beginning."),
    "role": ([user("x"), {"role": "critic", "content": "y"}], "Unexpected message role."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_of_the_published_templates(case: str, published: Any) -> None:
    messages, reason = REFUSALS[case]
    with pytest.raises(Refusal, match=r"the chat template cannot render the conversation \(TemplateError: ") as raised:
        render(published, messages)
    assert raised.value.reason == reason


def test_no_refusal_of_the_published_templates_is_left_out(published: Any) -> None:
    calls = re.findall(r"raise_exception\('([^']*)'\)", published.chat_template)
    assert len(calls) == published.chat_template.count("raise_exception(") == 8
    assert set(calls) == {reason for _, reason in REFUSALS.values()}


# --- what a template can do -----------------------------------------------------------------------------------


def test_abilities_of_the_published_templates(published: Any, config: ModelConfig) -> None:
    assert probe(published, config) == Abilities(
        pictures=True, tools=True, list_content=True, thinking_switch=True, thinking_default=thinks(published)
    )


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n" "%s" "<|im_end|>\n{% endfor %}"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
ITEMS = (
    "{%% if m.content is string %%}{{ m.content }}{%% else %%}"
    "{%% for i in m.content %%}%s{%% endfor %%}{%% endif %%}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
STRINGS = LOOP.replace("%s", "{{ '' + m.content }}")
LISTS = LOOP.replace("%s", ITEMS % "{{ i.text if i.type == 'text' else '' }}")
SEES = LOOP.replace("%s", ITEMS % f"{{{{ i.text if i.type == 'text' else '{PLACE}' }}}}")
CAN: dict[str, tuple[str, tuple[bool, bool, bool, bool, bool]]] = {
    # pictures, tools, list content, thinking switch, thinking by default
    "strings only": (STRINGS, (False, False, False, False, False)),
    "lists printed as they are": (LOOP.replace("%s", "{{ m.content }}"), (False, False, False, False, False)),
    "pictures dropped": (LISTS, (False, False, True, False, False)),
    "pictures": (SEES, (True, False, True, False, False)),
    "pictures without a frame": (SEES.replace(PLACE, "<|image_pad|>"), (False, False, True, False, False)),
    "two places for one picture": (SEES.replace(PLACE, PLACE * 2), (False, False, True, False, False)),
    "a video's place": (SEES.replace("image_pad", "video_pad"), (False, False, True, False, False)),
    "texts beside pictures lost": (
        LOOP.replace("%s", "{{ m.content if m.content is string else '" + PLACE + "' * (m.content | length - 1) }}"),
        (False, False, False, False, False),
    ),
    "tools": ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + STRINGS, (False, True, False, False, False)),
    "tools counted": ("{{ (tools or []) | length }} tools\n" + STRINGS, (False, False, False, False, False)),
    "always thinks": (LISTS + PROMPT.replace("%s", OPEN), (False, False, True, False, True)),
    "never thinks": (LISTS + PROMPT.replace("%s", CLOSED), (False, False, True, False, False)),
    "thinks unless told not to": (
        LISTS + PROMPT.replace("%s", "{% if enable_thinking is false %}" + CLOSED + "{% endif %}"),
        (False, False, True, True, True),
    ),
    "thinks if told to": (
        LISTS + PROMPT.replace("%s", "{% if enable_thinking %}" + OPEN + "{% else %}" + CLOSED + "{% endif %}"),
        (False, False, True, True, False),
    ),
}


@pytest.mark.parametrize("case", CAN)
def test_abilities_are_found_by_rendering(case: str, config: ModelConfig) -> None:
    template, expected = CAN[case]
    found = probe(with_template(template), config)
    assert tuple(vars(found).values()) == expected
    assert found.as_manifest()["thinking"] == {"switch": expected[3], "default": expected[4]}
    words = ("takes no pictures", "takes no tools", "takes contents as strings only")
    notices = found.notices(config)
    assert [sum(word in notice for notice in notices) for word in words] == [not able for able in expected[:3]]
    assert not any("takes no pictures" in notice for notice in found.notices(config.without_vision()))


def test_a_template_that_cannot_render_a_question_is_refused(config: ModelConfig) -> None:
    with pytest.raises(Refusal, match="no questions here"):
        probe(with_template("{{ raise_exception('no questions here') }}"), config)


# --- the chat tests -------------------------------------------------------------------------------------------


def test_chat_tests_of_the_published_templates(published: Any, config: ModelConfig) -> None:
    able = probe(published, config)
    begin = time.process_time()
    entries = chat_tests(published, able)
    assert time.process_time() - begin < 2
    written = dump_tests(entries)
    assert 190 <= len(entries) <= 240 and len(written.encode()) < 1_500_000
    assert written == dump_tests(chat_tests(published, able)), "the same every time"
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    assert names[:7] == ["plain", "system", "turns", "image", "thinking", "no-thinking", "tools"]
    reasons = {entry["error"] for entry in entries if "error" in entry}
    assert reasons == set(re.findall(r"raise_exception\('([^']*)'\)", published.chat_template))
    assert all(("error" in entry) != ("token_ids" in entry) for entry in entries)
    assert not any("now" in entry for entry in entries)


def test_chat_tests_cover_what_conversations_are_made_of(published: Any, config: ModelConfig) -> None:
    entries = [entry for entry in chat_tests(published, probe(published, config)) if "error" not in entry]

    def count(rule: Any) -> int:
        return sum(bool(rule(entry, entry["messages"])) for entry in entries)

    def pictures(message: Message) -> int:
        content = message["content"]
        return sum(item["type"] == "image" for item in content) if isinstance(content, list) else 0

    def users(messages: list[Message]) -> list[Message]:
        return [message for message in messages if message["role"] == "user"]

    assert {entry.get("enable_thinking") for entry in entries} == {None, True, False}
    assert {entry["add_generation_prompt"] for entry in entries} == {True, False}
    assert {len(users(entry["messages"])) for entry in entries} == {1, 2, 3, 4, 5, 6}
    assert count(lambda e, m: m[0]["role"] == "system") > 40
    assert count(lambda e, m: m[0]["role"] != "system") > 40
    assert count(lambda e, m: any("<think>" in str(x["content"]) for x in m if x["role"] == "assistant")) > 20
    assert count(lambda e, m: any("reasoning_content" in x for x in m)) > 20
    assert count(lambda e, m: max(map(pictures, users(m))) > 1) > 5
    assert count(lambda e, m: any(pictures(x) for x in users(m)[1:])) > 10
    assert count(lambda e, m: any(x["role"] == "tool" for x in m)) > 20
    assert count(lambda e, m: sum("tool_calls" in x for x in m) > 2) > 5
    assert count(lambda e, m: any(len(x.get("tool_calls", ())) > 1 for x in m)) > 5
    assert count(lambda e, m: e.get("tools") and not e["add_generation_prompt"]) > 2
    contents = [m["content"] for e in entries for m in e["messages"] if isinstance(m["content"], str)]
    assert "" in contents and " " in contents and max(map(len, contents)) > 2000
    assert any("\r\n" in c for c in contents) and any("<|im_end|>" in c for c in contents)


def test_a_chat_test_renders_from_its_own_file(published: Any, config: ModelConfig, tmp_path: Path) -> None:
    """Tools and arguments are printed in the order of their keys, which the file must keep."""
    entries = chat_tests(published, probe(published, config))
    file = tmp_path / "chat_tests.json"
    file.write_text(dump_tests(entries), encoding="utf-8")
    assert file.read_text(encoding="utf-8").count("\n") == len(entries) + 2
    read = json.loads(file.read_text(encoding="utf-8"))
    assert read == entries

    def again(entry: dict[str, Any]) -> Any:
        options = {key: entry[key] for key in ("enable_thinking", "tools") if key in entry}
        try:
            return render(published, entry["messages"], generation_prompt=entry["add_generation_prompt"], **options)
        except Refusal as refusal:
            return refusal.reason

    assert [again(entry) for entry in read] == [entry.get("token_ids", entry.get("error")) for entry in read]
    ordered = json.loads(json.dumps(entries, sort_keys=True))
    different = [entry for entry in ordered if again(entry) != entry.get("token_ids", entry.get("error"))]
    assert len(different) > 30 and all("tools" in entry for entry in different), "another order would be noticed"


def test_chat_tests_keep_to_what_the_template_takes(config: ModelConfig) -> None:
    tokenizer = with_template(STRINGS)
    able = probe(tokenizer, config)
    entries = chat_tests(tokenizer, able)
    assert 190 <= len(entries) <= 240
    assert not any("tools" in entry for entry in entries)
    assert all(isinstance(m["content"], str) for entry in entries for m in entry["messages"])
    wanted = {"plain", "system", "turns", "thinking", "no-thinking", "no-messages", "system-only"}
    assert wanted <= {entry["name"] for entry in entries}
    assert [case["name"] for case in conversations(able)][:5] == ["plain", "system", "turns", "thinking", "no-thinking"]


def test_a_defect_of_the_template_is_no_chat_test(config: ModelConfig) -> None:
    """A TypeError is left out, a raise_exception is kept, and neither may meet the first conversation."""
    template = "{% if messages | length > 1 %}{{ 1 + '' }}{% endif %}{{ messages[0].content }}"
    able = SimpleNamespace(pictures=False, tools=False, list_content=False)
    entries = chat_tests(with_template(template), able)  # type: ignore[arg-type]
    assert entries and all(len(entry["messages"]) <= 1 for entry in entries)
    raising = template.replace("{{ 1 + '' }}", "{{ raise_exception('one at a time') }}")
    found = chat_tests(with_template(raising), able)  # type: ignore[arg-type]
    assert {entry["error"] for entry in found if len(entry["messages"]) > 1} == {"one at a time"}
    with pytest.raises(Refusal, match="never"):
        chat_tests(with_template("{{ raise_exception('never') }}"), able)  # type: ignore[arg-type]


def test_the_probe_asks_for_a_tool_that_no_template_names(published: Any) -> None:
    assert abilities.TOOL["function"]["name"] not in published.chat_template
