"""How a decoder is cut into packages: layers in order, then the pieces of the head, as far as a package may hold them.

Which parts a stored matrix has is decided here too, for the plan and for the file that is written, so that both agree
on its size. The tied head stays in one package where it fits, because the host reads it as the embedding too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from export.model.delta_rule import CHUNK
from export.model.state import cache_rows
from export.quantize.recipe import Setting
from export.spec import UsageError
from targets.base import Job
from targets.to_coreml.blob import BITS, DTYPES
from targets.to_coreml.profiles import ALIGNED_ROWS

HEAD, CONVOLUTION = "decoder.head.weight", ".conv_weight"
MAX_BYTES = 900_000_000
"""Of a package's weights: iOS refuses mappings from about 1 GB on (FACTS: limits on devices)."""
MAX_COLUMNS = 65_535
"""Of a piece of the head: no dimension of the Neural Engine exceeds 65,536."""
PIECE = 128
"""A piece of the head has a multiple of so many rows: then its parts begin at aligned places of the file."""
PALETTE = 16
"""Numbers in a palette."""
ALIGNMENT = 64
"""Of everything in a weight file, in bytes; a record has as many."""
SIGNED, UNSIGNED = "int4", "uint4"

Form = Literal["signed", "offset", "table", "palette", "palettes"]
"""How symmetric 4-bit codes are stored: as they are; as code + 8 with offsets of 8, or without them for a table; as
indices code + 8 into one palette, the numbers -8 to 7, with a scale per group over it; or into 16 numbers that each
group has of its own, its scale in them.
"""
Parts = dict[str, tuple[str, int]]
"""Part of a stored matrix -> its dtype and elements in a row."""


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
    tied: bool
    """The package holds the whole head, whose bytes are the embedding's table too."""
    file: str


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def padded_rows(job: Job) -> int:
    """Rows of a KV cache, a multiple of `ALIGNED_ROWS`."""
    return -(-cache_rows(job.context_length, job.prefill_lengths) // ALIGNED_ROWS) * ALIGNED_ROWS


def limit(job: Job) -> int:
    """Bytes that the weight file of a package may have."""
    return job.max_file_bytes or MAX_BYTES


def form_of(name: str, setting: Setting | None, *, tied: bool, palettes: bool, profile: str) -> Form:
    """How the matrix of a parameter is stored; `tied`: the head is the embedding's table too.

    Scales over a palette: the Neural Engine's compiler crashes on them, CPU and GPU take them (coremltools PR 2688,
    measured with one scale per output channel). So there each group has a palette of its own, of four times the size.
    """
    if setting is None or setting.bits != 4 or not setting.symmetric:
        return "signed"
    if name == HEAD and tied:
        return "offset"
    if palettes:
        return "palettes" if profile == "ane" else "palette"
    return "signed"


def stored_parts(setting: Setting | None, columns: int, form: Form) -> Parts:
    """The parts of a matrix [N, columns]; without quantisation its values alone, float16."""
    if setting is None:
        return {"values": ("float16", columns)}
    groups = columns // (setting.group_size or columns)
    if form == "palettes":
        return {"values": (UNSIGNED, columns), "palettes": ("float16", groups * PALETTE)}
    signed = setting.symmetric and form == "signed"
    parts = {
        "values": ("int8" if setting.bits == 8 else SIGNED if signed else UNSIGNED, columns),
        "scales": ("float16", groups),
    }
    if form == "table" and not setting.symmetric:
        parts["values"] = ("int8", columns)  # code - zero point: a table has no offsets
    elif setting.bits == 4 and (not setting.symmetric or form == "offset"):
        parts["offsets"] = (UNSIGNED, groups)
    return parts


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
    """The packages of a decoder, none of whose weight files is larger than `limit` says.

    Raises:
        UsageError: a layer, or a piece of the head, alone is larger than a package may be.
    """
    text = job.config.text
    common = common_bytes(job)
    most_layers, most_bytes = job.max_file_layers or text.num_hidden_layers, limit(job) - common
    pieces = head_pieces(text.vocab_size, job.max_head_columns or MAX_COLUMNS)
    layers = [layer_bytes(job, index) for index in range(text.num_hidden_layers)]
    heads = [head_bytes(job, [piece], tied=False) for piece in pieces]
    shared = is_shared(job)
    whole = head_bytes(job, pieces, tied=shared)
    for what, size, remedy in (
        *((f"layer {index}", size, "") for index, size in enumerate(layers)),
        ("a piece of the head", min(whole, max(heads)), ", or smaller pieces with --max-head-columns"),
    ):
        if size > most_bytes:
            raise UsageError(
                f"--max-file-size {limit(job)}: {what} alone has {size + common} bytes, {common} of them constants "
                f"that every package needs, and is not cut further; give at least {size + common}{remedy}"
            )
    found: list[tuple[range, list[int]]] = []
    first = 0
    for layer in range(1, len(layers)):
        if layer - first == most_layers or sum(layers[first : layer + 1]) > most_bytes:
            found.append((range(first, layer), []))
            first = layer
    last, held = range(first, len(layers)), list[int]()
    used = sum(layers[first:])
    together = whole <= most_bytes
    for indices, size in [(list(range(len(pieces))), whole)] if together else [([i], s) for i, s in enumerate(heads)]:
        if used + size > most_bytes:
            found.append((last, held))
            last, held, used = range(len(layers), len(layers)), [], 0
        held += indices
        used += size
    found.append((last, held))
    name = "decoder{}.mlpackage"
    return [
        Part(
            number,
            layers_held,
            tuple(pieces[i] for i in held_pieces),
            held_pieces[0] if held_pieces else 0,
            len(pieces) == 1,
            bool(held_pieces) and together and shared,
            name.format("" if len(found) == 1 else f"_{number}"),
        )
        for number, (layers_held, held_pieces) in enumerate(found)
    ]


def is_shared(job: Job) -> bool:
    """Whether the head can be the embedding's table: tied, and without zero points, which a table has not."""
    setting = job.quantizer.setting("embedding.weight")
    return job.config.text.tie_word_embeddings and (setting is None or setting.symmetric)


def layer_bytes(job: Job, index: int) -> int:
    """Bytes of a layer's parameters in a weight file, their records and alignment included."""
    return sum(size for name, size in _sizes(job) if name.startswith(f"decoder.layers.{index}."))


def head_bytes(job: Job, pieces: list[range], *, tied: bool) -> int:
    """The same of consecutive pieces of the head that one package holds; `tied`: as the embedding's table too."""
    return _matrix_bytes(job, HEAD, pieces, tied=tied)


def common_bytes(job: Job) -> int:
    """At most so many bytes of a package are neither its layers' nor the head's: masks of the delta rule, tables of the
    rotary embedding, indices of tokens, the last norm, and the zeros that coremltools adds to a linear as its bias.
    """
    text, parameters = job.config.text, job.quantizer.weights.parameters
    masks = 4 if job.state_layout == "explicit" else 2  # in the dtype of the recurrent state
    sizes = [4 * padded_rows(job), *[2 * text.head_dim] * 8]
    for size in {size for tokens in job.prefill_lengths for size in (min(tokens, CHUNK), tokens % CHUNK)}:
        # Of 0 and 1 for every pair of tokens: causal, strict, later, identity, and one for each doubling of a block.
        sizes += [masks * size * size] * (4 + size.bit_length())
    for tokens in job.prefill_lengths:
        sizes += [*[2 * tokens * text.head_dim] * 2, *[4 * tokens] * 4]
    sizes += {2 * p.shape[0] for name, p in parameters.items() if name.startswith("decoder.") and len(p.shape) == 2}
    sizes += {2 * len(piece) for piece in head_pieces(text.vocab_size, job.max_head_columns or MAX_COLUMNS)}
    last = sum(size for name, size in _sizes(job) if not name.startswith("decoder.layers."))
    return ALIGNMENT + last + sum(ALIGNMENT + aligned(size) for size in sizes)


def _sizes(job: Job) -> Iterator[tuple[str, int]]:
    """(parameter of the decoder, its bytes in a weight file) for all but the head."""
    for name, parameter in job.quantizer.weights.parameters.items():
        if not name.startswith("decoder.") or name == HEAD:
            continue
        if len(parameter.shape) == 1 or name.endswith(CONVOLUTION):
            # That of a convolution is there twice where decode wants it the other way round.
            times = 2 if name.endswith(CONVOLUTION) else 1
            yield name, times * (ALIGNMENT + aligned(2 * math.prod(parameter.shape)))
        else:
            yield name, _matrix_bytes(job, name, [range(parameter.shape[0])], tied=False)


def _matrix_bytes(job: Job, name: str, pieces: list[range], *, tied: bool) -> int:
    setting, columns = job.quantizer.setting(name), job.quantizer.weights.parameter(name).shape[1]
    form = form_of(name, setting, tied=tied, palettes=job.palettes, profile=job.profile)
    rows = pieces[-1].stop - pieces[0].start
    parts = stored_parts(setting, columns, form).values()
    return sum(
        ALIGNMENT * len(pieces) + aligned(-(-rows * elements * element_bits(dtype) // 8)) for dtype, elements in parts
    )


def element_bits(dtype: str) -> int:
    """Bits of an element in a weight file."""
    return BITS.get(dtype) or 8 * DTYPES[dtype].itemsize
