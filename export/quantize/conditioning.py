"""What is done to weights before they are rounded, so that float32 answers stay and less is lost. Torch-free.

The transforms themselves are in `conditioned` and `rotation`; a recipe names them and the manifest records them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from export.spec import UsageError


@dataclass(frozen=True)
class Conditioning:
    """Which exact transforms come before rounding; by default none."""

    fold: bool = False
    """Factors of norms go into the columns of the matrices that read them, shifts into their biases."""
    equalise: bool = False
    """A channel inside an MLP is as large in the rows of `up` as in the columns of `down`."""
    rotate: bool = False
    """The text's residual stream is multiplied by an orthogonal matrix, which spreads every channel over all."""

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return self.fold or self.equalise or self.rotate

    @classmethod
    def parse(cls, recipe: str, entry: Any) -> Conditioning:
        """The `conditioning` of a recipe's table.

        Raises:
            UsageError: another form, an unknown transform, a value that is not true or false, or rotate without fold.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(entry, Mapping):
            raise UsageError(
                f"recipe {recipe}: conditioning {entry!r} is no table; write {{ fold = true }} or leave it out"
            )
        for name, value in entry.items():
            if name not in names:
                raise UsageError(
                    f"recipe {recipe}: conditioning has unknown key {name!r}; use {', '.join(names)}"
                )
            if not isinstance(value, bool):
                raise UsageError(f"recipe {recipe}: conditioning has {name} {value!r}; write true or false")
        found = cls(**entry)
        if found.rotate and not found.fold:
            raise UsageError(
                f"recipe {recipe}: conditioning has rotate without fold; factors of norms stand between the channels "
                "that rotation mixes: write fold = true as well"
            )
        return found

    def as_manifest(self) -> dict[str, bool]:
        """`quantization.conditioning` of the manifest."""
        return asdict(self)


UNCONDITIONED = Conditioning()
