"""What a chat template can do, found by rendering small conversations with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.chat.template import encode, render_text
from export.model.config import ModelConfig
from export.spec import ExportError

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = "Which lighthouse is this?"


@dataclass(frozen=True)
class Abilities:
    """`tokenizer.template` of the manifest.

    Attributes:
        pictures: a picture becomes exactly one placeholder between vision start and end.
        tools: the prompt names the tools.
        list_content: a list of one text is rendered as that text.
        thinking_switch: enable_thinking changes the prompt.
        thinking_default: a prompt without the switch lets the model think.
    """

    pictures: bool
    tools: bool
    list_content: bool
    thinking_switch: bool
    thinking_default: bool

    def as_manifest(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "tools": self.tools,
            "list_content": self.list_content,
            "thinking": {"switch": self.thinking_switch, "default": self.thinking_default},
        }

    def notices(self, config: ModelConfig) -> list[str]:
        """Whole sentences about what is missing."""
        found = []
        if not self.list_content:
            found.append("the chat template takes contents as strings only, not as lists of items")
        if not self.pictures and config.vision is not None:
            found.append(
                "the chat template takes no pictures: conversations with pictures are refused, though the bundle has "
                "a vision encoder (leave it out with --no-vision, or give a template that takes pictures)"
            )
        if not self.tools:
            found.append("the chat template takes no tools: they would not reach the prompt")
        return found


def probe(tokenizer: Any, config: ModelConfig) -> Abilities:
    """What the tokenizer's template can do.

    Raises:
        ExportError: it cannot render a plain question.
    """
    plain = _ask(QUESTION)
    question = render_text(tokenizer, plain)
    on, off = (_rendered(tokenizer, plain, enable_thinking=value) for value in (True, False))
    switch = on != off
    tools = _rendered(tokenizer, plain, tools=[TOOL])
    return Abilities(
        pictures=_pictures(tokenizer, config),
        tools=tools is not None and TOOL["function"]["name"] in tools,
        list_content=_rendered(tokenizer, _ask([_text(QUESTION)])) == question,
        thinking_switch=switch,
        # A template without the switch decides by itself whether the answer begins within a thought.
        thinking_default=question == on if switch else question.rstrip().endswith("<think>"),
    )


def _pictures(tokenizer: Any, config: ModelConfig) -> bool:
    """Whether pictures before, between and after texts arrive, each as one placeholder in its frame."""
    content = [{"type": "image"}, _text("first"), {"type": "image"}, _text("second")]
    frame = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    for items, count in ((content[:2], 1), (content[1:3], 1), (content, 2)):
        text = _rendered(tokenizer, _ask(items))
        if text is None or any(item["text"] not in text for item in items if item["type"] == "text"):
            return False
        ids = encode(tokenizer, text)
        framed = sum(ids[place : place + 3] == frame for place in range(len(ids)))
        if framed != count or ids.count(config.image_token_id) != count:
            return False
    return True


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """The prompt, or None if the template fails: that is the answer to a question here."""
    try:
        return render_text(tokenizer, messages, **options)
    except ExportError:
        return None


def _ask(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
