"""What every reader of stored weights refuses: a parameter in other bits or groups than the recipe says. Torch-free.

L2 would compare it with something else, and call thousands of right weights wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from export.bundle.manifest import BundleError

if TYPE_CHECKING:
    from export.quantize.quantizer import Quantizer

FLOATS = 16
"""Bits from which on numbers are not quantised."""


def check_storage(file: str, name: str, bits: int, group_size: int | None, quantizer: Quantizer) -> None:
    """Compare what a file declares of a parameter with the recipe that the bundle is judged by.

    Args:
        bits: of a code; `FLOATS` or more: it is stored as floats. group_size: input features that share a scale; None:
            all of a row do.

    Raises:
        BundleError: they differ.
    """
    setting = quantizer.setting(name)
    stored = (FLOATS, None) if bits >= FLOATS else (bits, group_size)
    wanted = (FLOATS, None) if setting is None else (setting.bits, setting.group_size)
    if stored != wanted:
        raise BundleError(
            f"{file} stores {name} {_told(*stored)}, recipe {quantizer.recipe.name} says {_told(*wanted)}; a bundle is "
            "judged by the recipe that its weights were rounded with: restore its manifest, or export it anew"
        )


def check_table(stage: Mapping[str, Any], quantizer: Quantizer) -> None:
    """`check_storage` of an embedding that a stage of kind `table` reads.

    Raises:
        BundleError: as there.
    """
    table = stage["table"]
    # A table has no zero points: codes less theirs have five bits, and groups, which 8 bits have not.
    bits = 4 if table["bits"] == 8 and table["group_size"] else table["bits"]
    check_storage(stage["file"], "embedding.weight", bits, table["group_size"], quantizer)


def _told(bits: int, group_size: int | None) -> str:
    if bits >= FLOATS:
        return "as floats"
    return f"in {bits} bits, " + (f"groups of {group_size}" if group_size else "one scale per output channel")
