"""Text that a bundle is judged on: prose, dialogue, code, tables, records, numbers and six languages besides English.

Written for this purpose, in `data/*.txt` and `data/*.md`. Paragraphs of all files take turns, so that any beginning of
the whole is varied. With a tokenizer of the published size it is longer than any run of the ladder; no run repeats it.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from export.chat.template import encode

DATA = Path(__file__).parent / "data"


def passages() -> list[str]:
    """The paragraphs of all files, one of each file in turn, each with the blank line behind it."""
    paths = sorted(path for path in DATA.iterdir() if path.suffix in (".txt", ".md"))
    files = [path.read_text(encoding="utf-8").strip().split("\n\n") for path in paths]
    turns = chain.from_iterable(zip_longest(*files))
    return [f"{passage}\n\n" for passage in turns if passage is not None]


def text(tokenizer: Any) -> list[int]:
    """Token ids of all passages."""
    return encode(tokenizer, "".join(passages()))
