"""How a decoder is cut into packages: layers in order, then the pieces of the head, as far as a package may hold them.

Torch-free. The tied head stays in one package where it fits, because the host reads it as the embedding too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.spec import UsageError
from targets.base import Job

HEAD = "decoder.head.weight"
MAX_BYTES = 900_000_000
"""Of a package's weights: iOS refuses mappings from about 1 GB on (FACTS: limits on devices)."""
MAX_COLUMNS = 65_535
"""Of a piece of the head: no dimension of the Neural Engine exceeds 65,536."""
PIECE = 128
"""A piece of the head has a multiple of so many rows: then its parts begin at aligned places of the file."""
PALETTE = 16
"""Numbers in the palette of a group."""


@dataclass(frozen=True)
class Part:
    """What one package of the decoder holds."""

    number: int
    layers: range
    head: tuple[range, ...]
    """Pieces of the head."""
    first_piece: int
    """Number of the first of them among all pieces."""
    single: bool
    """The head is in one piece."""
    file: str


def head_pieces(rows: int, most: int) -> list[range]:
    """The head's rows in as few nearly equal pieces as `most` columns allow.

    Raises:
        UsageError: fewer columns than a piece must have.
    """
    if most < PIECE:
        raise UsageError(f"--max-head-columns {most}: a piece of the head has a multiple of {PIECE} columns")
    count = -(-rows // (most // PIECE * PIECE))
    size = -(-rows // count // PIECE) * PIECE
    return [range(first, min(first + size, rows)) for first in range(0, rows, size)]


def cut(job: Job) -> list[Part]:
    """The packages of a decoder.

    Raises:
        UsageError: a layer, or a piece of the head, alone is larger than a package may be.
    """
    text = job.config.text
    most_layers, most_bytes = job.max_file_layers or text.num_hidden_layers, job.max_file_bytes or MAX_BYTES
    pieces = head_pieces(text.vocab_size, job.max_head_columns or MAX_COLUMNS)
    layers = [stored_bytes(job, f"decoder.layers.{index}.") for index in range(text.num_hidden_layers)]
    row = stored_bytes(job, HEAD) / text.vocab_size
    heads = [math.ceil(row * len(piece)) for piece in pieces]
    for what, size in [(f"layer {i}", s) for i, s in enumerate(layers)] + [("a piece of the head", max(heads))]:
        if size > most_bytes:
            raise UsageError(
                f"--max-file-size {most_bytes}: {what} alone has {size} bytes and is not cut further; "
                f"give at least {size}"
            )
    found: list[tuple[range, list[int]]] = []
    first = 0
    for layer in range(1, len(layers)):
        if layer - first == most_layers or sum(layers[first : layer + 1]) > most_bytes:
            found.append((range(first, layer), []))
            first = layer
    last, held = range(first, len(layers)), list[int]()
    used = sum(layers[first:])
    for index, size in enumerate(heads):
        rest = sum(heads[index:]) if not held and sum(heads[index:]) <= most_bytes else size
        if used + rest > most_bytes:
            found.append((last, held))
            last, held, used = range(len(layers), len(layers)), [], 0
        held.append(index)
        used += size
    found.append((last, held))
    single = len(pieces) == 1
    name = "decoder{}.mlpackage"
    return [
        Part(
            number,
            layers_held,
            tuple(pieces[i] for i in held_pieces),
            held_pieces[0] if held_pieces else 0,
            single,
            name.format("" if len(found) == 1 else f"_{number}"),
        )
        for number, (layers_held, held_pieces) in enumerate(found)
    ]


def stored_bytes(job: Job, prefix: str) -> int:
    """Bytes of the parameters whose names begin so, as a package holds them."""
    total = 0.0
    for name, parameter in job.quantizer.weights.parameters.items():
        if name.startswith(prefix):
            setting = job.quantizer.setting(name)
            count = math.prod(parameter.shape)
            if setting is None:
                total += 2 * count
                continue
            scales = count // setting.group_size if setting.group_size else parameter.shape[0]
            offsets = 0.5 * scales if not setting.symmetric or name == HEAD else 0.0
            table = name == HEAD and job.config.text.tie_word_embeddings
            palette = job.palettes and setting.bits == 4 and setting.symmetric and not table
            total += count * setting.bits / 8 + 2 * scales * (PALETTE if palette else 1) + offsets
    return math.ceil(total)
