"""chat_tests.json: conversations and their token ids, for the apps' own template renderers and tokenizers.

About 200 conversations drawn from a fixed seed within what the checkpoint's template can do, rendered by
transformers. Where the template refuses one by raise_exception the entry holds the message instead; one that
fails otherwise is left out, since a defect of a template is nothing to reproduce.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from export.chat.abilities import TOOL, Abilities
from export.chat.template import Refusal, render
from export.spec import ExportError

NOW = datetime(2026, 1, 2, 3, 4, 5)
"""What strftime_now tells in the tests of a template that asks for the time."""
DRAWN = 150
Message = dict[str, Any]
Case = dict[str, Any]

SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search_notes",
        "description": 'Notes that match, e.g. "a < b & c"; größer als 0 条',
        "parameters": {
            "type": "object",
            "properties": {
                "words": {"type": "array", "items": {"type": "string"}},
                "limit": {"type": "integer", "default": 10},
                "since": {"type": ["string", "null"]},
            },
            "required": ["words"],
        },
    },
}
CALLS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("weather", {"city": "Paris"}, '{"celsius": 21.5, "sky": "clear"}'),
    ("weather", {"city": "Nuku'alofa <&>"}, "no such city"),
    ("search_notes", {"words": ["lamp", "灯台"], "limit": 3}, "1. spare lamps\n2. oil"),
    ("search_notes", {"words": [], "since": None, "exact": True, "weight": 0.5, "by": {"kind": "log"}}, ""),
    ("search_notes", {}, "  nothing  \n"),
)
QUESTIONS = (
    "What is 12 + 30?",
    "Hello",
    "Name three lighthouses, the tallest first.",
    "Und auf Deutsch? Größe, Straße, Überfluss.",
    "灯台は何階建てですか。",
    "def f(x):\n    return x ** 2  # why?\n",
    "Is 3.14159 > 22/7? And 1e-3 < 0.01?",
)
ANSWERS = ("Hi.", "It is 42.", "1. One\n2. Two\n\n```python\nprint(1)\n```", "Ja, 33 m.", "三階です。", "")
THOUGHTS = ("The user greets.", "12 + 30:\n10 + 30 = 40,\n40 + 2 = 42.", "")
TEXTS: dict[str, str] = {
    "empty": "",
    "space": " ",
    "blank-lines": "\n \n\t\n",
    "edges": "  two before, three after   \n",
    "windows-lines": "first\r\nsecond\r\n\r\nfourth",
    "tabs": "a\tb\t\tc\n\td",
    "decomposed": "Cafe\u0301 A\u030angstro\u0308m",
    "composed": "Café Ångström ﬁne ½ Ⅷ",
    "devanagari": "नमस्ते दुनिया, क्षत्रिय",
    "arabic": "السَّلَامُ عَلَيْكُمْ 123",
    "hangul": "안녕하세요 \u1112\u1161\u11ab",
    "thai": "สวัสดีชาวโลก",
    "emoji": "👩🏽‍🚀👨‍👩‍👧‍👦 🇩🇪 ❤️ 1️⃣",
    "invisible": "zero\u200bwidth\u00a0no-break\u2028line\ufeffmark",
    "apostrophes": "I'm, you'RE, it'S, they’ve, O'Neill'd",
    "numbers": "1234567890 3,141.59 ٣٤ ²³ 0x1F 1_000",
    "signs": "!?#$%&()*+,-./:;<=>@[\\]^_`{|}~ ...!!\n\n??",
    "quotes": "\"double\" 'single' \\n \\u0041 {{ braces }} {% tag %} {# note #}",
    "markup": "<b>bold</b> &amp; <function=f></function> <tool_call>",
    "control-tokens": "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "thought": "<think>\nnot mine\n</think>\n\nsaid",
    "open-thought": "<think>\nnever closed",
    "tool-response": "<tool_response>\nfaked\n</tool_response>",
    "long": "The keeper counted 12 ships, noted the wind and lit lamp no. 3. " * 40,
    "long-word": "a" * 300 + "ß" * 50 + "灯" * 60,
}


def chat_tests(tokenizer: Any, abilities: Abilities) -> list[Case]:
    """Every conversation with its token ids, or with the message by which the template refuses it.

    Raises:
        ExportError: the template cannot render the first, plainest one.
    """
    entries = []
    for number, case in enumerate(conversations(abilities)):
        options = {key: value for key, value in case.items() if key in ("enable_thinking", "tools")}
        entry = {**case}
        if tells_time(tokenizer):
            entry["now"], options["now"] = NOW.isoformat(), NOW
        prompt = case["add_generation_prompt"]
        try:
            entry["token_ids"] = render(tokenizer, case["messages"], generation_prompt=prompt, **options)
        except Refusal as refusal:
            if number == 0:
                raise
            entry["error"] = refusal.reason
        except ExportError:
            if number == 0:
                raise
            continue
        entries.append(entry)
    return entries


def tells_time(tokenizer: Any) -> bool:
    """Whether a template of the tokenizer asks for the time."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return any("strftime_now" in text for text in texts)


def dump_tests(entries: list[Case]) -> str:
    """JSON, a line per entry. Keys keep their order: templates print tools and arguments as they come."""
    lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def conversations(abilities: Abilities) -> Iterator[Case]:
    """Named conversations without their token ids, the same ones on every machine."""
    yield from _basics(abilities)
    for name, text in TEXTS.items():
        yield _case(f"text-{name}", [_user(text)])
        turns = [_system(text), _user("Hello"), _assistant(text), _user(text)]
        yield _case(f"texts-{name}", turns, enable_thinking=False)
    draw = random.Random(20260102)
    for number in range(DRAWN):
        yield _drawn(number, draw, abilities)
    yield from _doubtful()


def _basics(abilities: Abilities) -> Iterator[Case]:
    yield _case("plain", [_user("What is 12 + 30?")])
    yield _case("system", [_system("Be brief."), _user("Hello")])
    yield _case("turns", [_user("Hello"), _assistant("Hi."), _user("What is 1 + 1?")])
    if abilities.pictures:
        yield _case("image", [_user([{"type": "image"}, _text("What is written?")])])
    yield _case("thinking", [_user("Hello")], enable_thinking=True)
    yield _case("no-thinking", [_user("Hello")], enable_thinking=False)
    if abilities.tools:
        yield _case("tools", [_user("Weather in Paris?")], tools=[TOOL])


def _drawn(number: int, draw: random.Random, abilities: Abilities) -> Case:
    """A conversation of 1 to 6 turns, that the model is to continue or that ends with an answer."""
    turns = 1 + number % 6
    switch = (None, True, False)[number // 6 % 3]
    system, answered = draw.random() < 0.4, draw.random() < 0.2
    tools = abilities.tools and draw.random() < 0.4
    pictures = abilities.pictures and draw.random() < 0.4
    messages = [_system(draw.choice(("Be brief.", " You are a keeper.\n", "答えは短く。")))] if system else []
    for turn in range(turns):
        messages.append(_user(_question(draw, abilities, pictures and draw.random() < 0.6)))
        last = turn == turns - 1
        if tools and draw.random() < 0.7:
            messages += _tool_rounds(draw)
        if not last or answered:
            messages.append(_answer(draw))
    words = [f"{number:03d}", f"{turns}-turn{'s' * (turns > 1)}"]
    words += [w for w, used in (("system", system), ("tools", tools), ("pictures", pictures)) if used]
    words += ["answered"] if answered else []
    options: dict[str, Any] = {}
    if switch is not None:
        options["enable_thinking"] = switch
        words.append("thinking" if switch else "no-thinking")
    if tools:
        options["tools"] = [TOOL, SEARCH] if draw.random() < 0.5 else [SEARCH]
    return _case("-".join(words), messages, generation_prompt=not answered, **options)


def _question(draw: random.Random, abilities: Abilities, picture: bool) -> Any:
    text = draw.choice(QUESTIONS)
    if picture:
        pictures = [{"type": "image"} for _ in range(draw.choice((1, 1, 2, 3)))]
        return [*pictures, _text(text)] if draw.random() < 0.7 else [_text(text), *pictures, _text("Compare.")]
    return [_text(text)] if abilities.list_content and draw.random() < 0.2 else text


def _answer(draw: random.Random, **fields: Any) -> Message:
    text, thought, form = draw.choice(ANSWERS), draw.choice(THOUGHTS), draw.randrange(3)
    if form == 0:
        return _assistant(text, **fields)
    if form == 1:
        return _assistant(f"<think>\n{thought}\n</think>\n\n{text}", **fields)
    return _assistant(text, reasoning_content=thought, **fields)


def _tool_rounds(draw: random.Random) -> list[Message]:
    """One or two rounds of calls, each with its results."""
    messages = []
    for _ in range(draw.choice((1, 1, 2))):
        chosen = draw.sample(CALLS, draw.choice((1, 1, 2)))
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given, _ in chosen]
        messages.append(_answer(draw, tool_calls=calls))
        messages += [{"role": "tool", "content": result} for _, _, result in chosen]
    return messages


def _doubtful() -> Iterator[Case]:
    """What many templates refuse, each by a raise_exception of its own."""
    item: dict[str, Any] = {"type": "image"}
    yield _case("no-messages", [])
    yield _case("late-system", [_user("Hello"), _system("Be brief."), _user("Hello")])
    yield _case("system-only", [_system("Be brief.")])
    yield _case("assistant-only", [_assistant("Hi.")])
    yield _case("assistant-first", [_assistant("Hi."), _user("Hello")])
    yield _case("two-users", [_user("Hello"), _user("Hello?")])
    yield _case("tool-results-only", [_user(TEXTS["tool-response"])])
    yield _case("unexpected-role", [_user("Hello"), {"role": "critic", "content": "No."}])
    yield _case("developer-role", [{"role": "developer", "content": "Be brief."}, _user("Hello")])
    yield _case("unexpected-content", [_user(5)])
    yield _case("unexpected-item", [_user([{"type": "smell", "smell": "salt"}, _text("What?")])])
    yield _case("image-in-system", [_system([item, _text("Be brief.")]), _user("Hello")])
    yield _case("video-in-system", [_system([{"type": "video"}, _text("Be brief.")]), _user("Hello")])
    yield _case("list-in-system", [_system([_text("Be "), _text("brief.")]), _user("Hello")])


def _case(name: str, messages: list[Message], *, generation_prompt: bool = True, **options: Any) -> Case:
    return {"name": name, "messages": messages, **options, "add_generation_prompt": generation_prompt}


def _system(content: Any) -> Message:
    return {"role": "system", "content": content}


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
