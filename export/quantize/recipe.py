"""Recipes: what each role of the model becomes. Torch-free, so that arguments can be checked at once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from export.quantize.conditioning import UNCONDITIONED, Conditioning
from export.spec import UsageError

ROLES = ("decoder", "linear_attention", "lm_head", "embedding", "vision")
BITS = (4, 8, 32)
GROUP_SIZES = (32, 64, 128)
METHODS = ("rtn",)
_FILE = Path(__file__).with_name("recipes.toml")


@dataclass(frozen=True)
class Setting:
    """How one role is stored. `group_size` None: one scale per output channel."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    method: str = "rtn"

    @property
    def quantised(self) -> bool:
        return self.bits < 16


@dataclass(frozen=True)
class Recipe:
    """A named setting for every role, and what is done to the weights before."""

    name: str
    roles: Mapping[str, Setting]
    conditioning: Conditioning = UNCONDITIONED

    @classmethod
    def unquantised(cls) -> Recipe:
        return cls("fp32", {role: Setting(32) for role in ROLES})

    def for_model(self, tied: bool) -> Recipe:
        """A tied embedding is the head's matrix, so it takes the head's setting."""
        if not tied:
            return self
        return replace(self, roles={**self.roles, "embedding": self.roles["lm_head"]})

    def check(self, columns: Iterable[tuple[str, str, int]]) -> None:
        """Refuse a group size that does not divide the input features of a weight.

        Args:
            columns: (weight name, role, input features) of every weight that may be quantised.

        Raises:
            UsageError: naming the first weight that does not fit.
        """
        for name, role, features in columns:
            group = self.roles[role].group_size
            if self.roles[role].quantised and group is not None and features % group:
                fits = [str(g) for g in GROUP_SIZES if features % g == 0]
                remedy = f"use {' or '.join(fits)}" if fits else f"use 8 or 32 bits for role {role!r}"
                raise UsageError(
                    f"group_size {group}: {name} has {features} input features, not a multiple of {group}; {remedy}"
                )

    def as_manifest(self) -> dict[str, Any]:
        """`quantization` of the manifest."""
        roles = {role: asdict(setting) for role, setting in sorted(self.roles.items())}
        found: dict[str, Any] = {"recipe": self.name, "roles": roles}
        if self.conditioning.changes:
            found["conditioning"] = self.conditioning.as_manifest()
        return found


@cache
def names() -> tuple[str, ...]:
    """Names of the shipped recipes."""
    return tuple(tomllib.loads(_FILE.read_text()))


def load_recipe(name: str, group_size: int | None = None) -> Recipe:
    """A shipped recipe by name, or a TOML file of the same form; `group_size` overrides every 4-bit group.

    Raises:
        UsageError: unknown recipe, malformed file, or a value outside the rules.
    """
    if name.endswith(".toml"):
        try:
            tables = tomllib.loads(Path(name).read_text())
        except OSError as error:
            raise UsageError(f"--recipe {name}: cannot read it ({error.strerror}); give a TOML file") from error
        except ValueError as error:  # malformed TOML, or bytes that are no text
            raise UsageError(f"--recipe {name}: not valid TOML ({error})") from error
        if len(tables) != 1:
            raise UsageError(f"--recipe {name}: holds {len(tables)} tables; give exactly one recipe per file")
        title, table = next(iter(tables.items()))
        if not isinstance(table, Mapping):
            raise UsageError(
                f"--recipe {name}: {title!r} is no table; begin the file with [name] and give every role a line"
            )
    else:
        tables = tomllib.loads(_FILE.read_text())
        if name not in tables:
            raise UsageError(
                f"unknown recipe {name!r}; choose one of: {', '.join(tables)}, or give a .toml file"
            )
        title, table = name, tables[name]
    roles = {role: _setting(title, role, table) for role in ROLES}
    conditioning = Conditioning.parse(title, table.get("conditioning", {}))
    unknown = sorted(set(table) - {*ROLES, "conditioning"})
    if unknown:
        raise UsageError(f"recipe {title}: unknown role {unknown[0]!r}; the roles are {', '.join(ROLES)}")
    if group_size is not None:
        if group_size not in GROUP_SIZES:
            raise UsageError(f"--group-size {group_size}: choose 32, 64 or 128")
        roles = {r: replace(s, group_size=group_size) if s.bits == 4 else s for r, s in roles.items()}
        title = f"{title}-g{group_size}"
    return Recipe(title, roles, conditioning)


def _setting(recipe: str, role: str, table: Mapping[str, Any]) -> Setting:
    entry = table.get(role)
    if not isinstance(entry, Mapping):
        raise UsageError(f"recipe {recipe}: no setting for role {role!r}; every role needs one")
    unknown = sorted(set(entry) - {"bits", "group_size", "symmetric", "method"})
    if unknown:
        raise UsageError(
            f"recipe {recipe}: role {role!r} has unknown key {unknown[0]!r}; use bits, group_size, symmetric, method"
        )
    if "bits" not in entry:
        raise UsageError(f"recipe {recipe}: role {role!r} has no bits; choose 4, 8 or 32")
    setting = Setting(**entry)
    if not isinstance(setting.symmetric, bool):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has symmetric {setting.symmetric!r}; write true or false"
        )
    # 8.0 and true equal whole numbers without being any; what packs the codes needs real ones.
    if type(setting.bits) is not int or setting.bits not in BITS:
        raise UsageError(
            f"recipe {recipe}: role {role!r} has bits {setting.bits!r}; choose 4, 8 or 32, a whole number"
        )
    if setting.method not in METHODS:
        raise UsageError(f"recipe {recipe}: role {role!r} has method {setting.method!r}; choose rtn")
    if setting.bits == 4 and (type(setting.group_size) is not int or setting.group_size not in GROUP_SIZES):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 4 bits and group_size {setting.group_size!r}; "
            "choose 32, 64 or 128, a whole number"
        )
    if setting.bits == 32 and (setting.group_size is not None or not setting.symmetric):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 32 bits with groups or zero points; 32 bits are kept as they are: "
            "leave out group_size and symmetric"
        )
    if setting.bits == 8 and (setting.group_size is not None or not setting.symmetric):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 8 bits with groups or zero points; 8 bits are symmetric with "
            "one scale per output channel, which every target can express"
        )
    return setting
