"""A tokenizer and its chat template: loaded from a folder, messages rendered to text and token ids.

A bundle's tokenizer.json is all there is to its tokenizer, here as in an app. A checkpoint's is what
transformers makes of its files; `export.chat.tokenizer` writes that into the bundle.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from export.checkpoint.base import CheckpointError
from export.spec import ExportError

DIRECTIVES = "aAbBcdfHIjmMpSUwWxXyYZ"
"""Of strftime, that a fixed clock knows; with a minus (%-d) the leading zeros are dropped."""


class Refusal(ExportError):
    """The chat template refuses a conversation by raise_exception; `reason` is the template's own message."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a bundle or checkpoint folder; no remote code, no network.

    Raises:
        ExportError: no tokenizer.json, or files that do not make a tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise ExportError(f"{folder} has no tokenizer.json (random weights have none); nothing to talk with")
    # Without config.json transformers would choose a class by tokenizer_config.json and rebuild the
    # pre-tokenizer; a bundle's tokenizer.json means what it says.
    loader = AutoTokenizer if (folder / "config.json").exists() else PreTrainedTokenizerFast
    return guarded(folder, lambda: loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def guarded(folder: Path, load: Any) -> Any:
    """What `load` returns.

    Raises:
        CheckpointError: it fails; the message names the folder.
    """
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({_reason(error)}); take tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja from the published checkpoint"
        ) from error


def has_template(tokenizer: Any) -> bool:
    """Whether a conversation without tools can be rendered: there is one template, or one named "default"."""
    templates = tokenizer.chat_template
    return templates is not None and (isinstance(templates, str) or "default" in templates)


def render(
    tokenizer: Any, messages: list[dict[str, Any]], *, generation_prompt: bool = True, **options: Any
) -> list[int]:
    """Messages -> token ids, by default with the generation prompt; image tokens single, as the template's.

    Raises:
        Refusal: the template calls raise_exception. ExportError: it is missing or malformed, or the tokenizer fails.
    """
    text = render_text(tokenizer, messages, generation_prompt=generation_prompt, **options)
    return encode(tokenizer, text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered conversation.

    Raises:
        ExportError: the tokenizer fails.
    """
    try:
        # Not verbose: the limit that transformers would warn of is the tokenizer's, not the bundle's.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(error) from error
    return ids


def render_text(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    generation_prompt: bool = True,
    now: datetime | None = None,
    **options: Any,
) -> str:
    """Messages -> the prompt as text; `now` is the time that strftime_now tells, by default the true one.

    Raises:
        As `render`.
    """
    # transformers refuses an empty list before the template sees it, but not an object without messages.
    conversation: Any = messages or SimpleNamespace(messages=[])
    try:
        if now is not None:
            template = tokenizer.get_chat_template(None, options.get("tools"))
            options["chat_template"] = with_clock(template, now)
        text: str = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generation_prompt, **options
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of its own and may raise anything
        if type(error) is TemplateError:
            raise Refusal(str(_broken(error)), str(error)) from error
        raise _broken(error) from error
    return text


def with_clock(template: str, now: datetime) -> str:
    """The template with a strftime_now of its own that always tells `now`, in the names of the C locale.

    transformers passes only plain data to templates, no functions; so the clock is a macro before the template.
    """
    told = {f"%{letter}": now.strftime(f"%{letter}") for letter in DIRECTIVES}
    told |= {f"%-{letter}": str(int(now.strftime(f"%{letter}"))) for letter in "dHIjmMSUWy"}
    calls = "".join(f".replace({sign!r}, {text!r})" for sign, text in told.items())
    # A block tag swallows the newline after it, so that the template begins at the start of a line as before.
    return f"{{% macro strftime_now(format) %}}{{{{ format{calls} }}}}{{% endmacro %}}\n{template}"


def _broken(error: Exception) -> ExportError:
    return ExportError(
        f"the chat template cannot render the conversation ({_reason(error)}); take chat_template.jinja and "
        "tokenizer_config.json from the published checkpoint"
    )


def _reason(error: Exception) -> str:
    """Kind and text of an error on one line, with the line of the template that it is about."""
    place = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return f"{type(error).__name__}: {shorten(str(error), 200)}{place}"
