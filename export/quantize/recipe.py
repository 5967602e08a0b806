"""Recipes: what each role of the model becomes. Torch-free, so that arguments can be checked at once."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from export.quantize.conditioning import UNCONDITIONED, Conditioning
from export.spec import UsageError

ROLES = ("decoder", "linear_attention", "lm_head", "embedding", "vision")
"""What every recipe has a setting for."""

PARTS: dict[str, str] = {
    "attention": "decoder",
    "attention_out": "attention",
    "mlp": "decoder",
    "mlp_down": "mlp",
    "linear_attention_out": "linear_attention",
    "vision_merger": "vision",
}
"""Finer role -> the role that it is a part of, whose setting it has where a recipe does not name it."""

BITS = (4, 8, 32)
GROUP_SIZES = (32, 64, 128)
METHODS = ("rtn",)
SCALES = ("search", "absmax")
_FILE = Path(__file__).with_name("recipes.toml")


def general(role: str) -> str:
    """Which of `ROLES` a role is, or is a part of."""
    while role in PARTS:
        role = PARTS[role]
    return role


LAYERED = tuple(role for role in (*ROLES, *PARTS) if general(role) in ("decoder", "linear_attention"))
"""Roles of weights that every decoder layer has its own of."""


def layer_of(name: str) -> int | None:
    """Decoder layer of a weight, by its name here or as published; None: it lies in none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Setting:
    """How one role is stored. `group_size` None: one scale per output channel."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    method: str = "rtn"
    scales: str = "search"
    """search: of a few scales, the one with the least squared error; absmax: the one that clips no weight."""

    @property
    def quantised(self) -> bool:
        return self.bits < 16

    def as_manifest(self) -> dict[str, Any]:
        """An entry of `quantization.roles`; `scales` only where it is not what it was before it could be chosen."""
        entry = asdict(self)
        if self.scales == "search":
            del entry["scales"]
        return entry

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> Setting:
        """The inverse of `as_manifest`; other fields of an entry say nothing about the stored weights."""
        return cls(**{field.name: entry[field.name] for field in fields(cls) if field.name in entry})


@dataclass(frozen=True)
class LayerRoles:
    """Settings that only decoder layers first…last have. Numbers below 0 count from the end: -1 is the last layer."""

    name: str
    """As the recipe calls these layers: first-4, last-2, 4-11 or 7."""
    first: int
    last: int
    roles: Mapping[str, Setting]

    def of(self, num_layers: int, recipe: str) -> LayerRoles:
        """The same with layers counted from the beginning.

        Raises:
            UsageError: the model has fewer layers.
        """
        first, last = (layer + num_layers if layer < 0 else layer for layer in (self.first, self.last))
        if first < 0 or last >= num_layers:
            raise UsageError(
                f"recipe {recipe}: layers.{self.name} does not fit a model of {num_layers} layers, which are 0 to "
                f"{num_layers - 1}; name fewer layers, or choose another recipe"
            )
        return replace(self, first=first, last=last)


@dataclass(frozen=True)
class Recipe:
    """A named setting for every role, other settings for some layers, and what is done to the weights before."""

    name: str
    roles: Mapping[str, Setting]
    """All of `ROLES`, and those of `PARTS` that have a setting of their own."""
    layers: tuple[LayerRoles, ...] = ()
    conditioning: Conditioning = UNCONDITIONED

    @classmethod
    def unquantised(cls) -> Recipe:
        return cls("fp32", {role: Setting(32) for role in ROLES})

    @classmethod
    def from_manifest(cls, quantization: Mapping[str, Any]) -> Recipe:
        """The recipe that `quantization` of a manifest describes."""

        def settings(roles: Mapping[str, Any]) -> dict[str, Setting]:
            return {role: Setting.from_manifest(entry) for role, entry in roles.items()}

        layers = (
            LayerRoles(_range_name(t["first"], t["last"]), t["first"], t["last"], settings(t["roles"]))
            for t in quantization.get("layers", ())
        )
        conditioning = Conditioning.parse(quantization["recipe"], quantization.get("conditioning", {}))
        return cls(quantization["recipe"], settings(quantization["roles"]), tuple(layers), conditioning)

    def as_manifest(self) -> dict[str, Any]:
        """`quantization` of the manifest; of a recipe for a model."""

        def entries(roles: Mapping[str, Setting]) -> dict[str, Any]:
            return {role: setting.as_manifest() for role, setting in sorted(roles.items())}

        manifest: dict[str, Any] = {"recipe": self.name, "roles": entries(self.roles)}
        if self.layers:
            manifest["layers"] = [
                {"first": table.first, "last": table.last, "roles": entries(table.roles)}
                for table in sorted(self.layers, key=lambda table: table.first)
            ]
        if self.conditioning.changes:
            manifest["conditioning"] = self.conditioning.as_manifest()
        return manifest

    def for_model(self, tied: bool, num_layers: int) -> Recipe:
        """The recipe with the layers of a model. A tied embedding is the head's matrix, so it takes its setting.

        Raises:
            UsageError: the recipe names layers that the model has not, or one of them twice.
        """
        layers = tuple(table.of(num_layers, self.name) for table in self.layers)
        for one, other in itertools.combinations(sorted(layers, key=lambda table: table.first), 2):
            if other.first <= one.last:
                raise UsageError(
                    f"recipe {self.name}: layers.{one.name} and layers.{other.name} both hold layer {other.first} of "
                    f"{num_layers}; give each layer to one of them"
                )
        roles = {**self.roles, "embedding": self.roles["lm_head"]} if tied else self.roles
        return replace(self, roles=roles, layers=layers)

    def entry(self, role: str, layer: int | None = None) -> tuple[str, Setting]:
        """(path in the recipe's file, setting) of the entry that a weight follows.

        What is said about its layer comes first, then what is said about all; each time the role itself, then what it
        is a part of.

        Args:
            role: of the weight. layer: decoder layer that it lies in; None: in none.

        Raises:
            ValueError: the recipe counts layers from the end of a model that it was not told.
        """
        for table in self.layers:
            if table.first < 0:
                raise ValueError(f"recipe {self.name}: where layers.{table.name} is only for_model can tell")
            found = _nearest(role, table.roles)
            if layer is not None and table.first <= layer <= table.last and found is not None:
                return f"layers.{table.name}.{found}", table.roles[found]
        found = _nearest(role, self.roles)
        if found is None:
            raise ValueError(f"recipe {self.name} has no setting for role {role!r}")
        return found, self.roles[found]

    def setting(self, role: str, layer: int | None = None) -> Setting:
        """How a weight of this role is stored; see `entry`."""
        return self.entry(role, layer)[1]

    def entries(self) -> Iterator[tuple[str, Setting]]:
        """(path in the recipe's file, setting) of every entry."""
        yield from self.roles.items()
        for table in self.layers:
            for role, setting in table.roles.items():
                yield f"layers.{table.name}.{role}", setting

    def check(self, columns: Iterable[tuple[str, str, int]]) -> None:
        """Refuse a group size that does not divide the input features of a weight.

        Args:
            columns: (weight name, role, input features) of every weight that may be quantised.

        Raises:
            UsageError: naming the first weight that does not fit.
        """
        for name, role, features in columns:
            entry, setting = self.entry(role, layer_of(name))
            group = setting.group_size
            if setting.quantised and group is not None and features % group:
                fits = [str(g) for g in GROUP_SIZES if features % g == 0]
                remedy = f"use {' or '.join(fits)}" if fits else f"use 8 or 32 bits for role {entry!r}"
                raise UsageError(
                    f"group_size {group}: {name} has {features} input features, not a multiple of {group}; {remedy}"
                )

    def grouped(self, group_size: int) -> Recipe:
        """The recipe with another group size in every 4-bit entry."""

        def changed(roles: Mapping[str, Setting]) -> dict[str, Setting]:
            return {r: replace(s, group_size=group_size) if s.bits == 4 else s for r, s in roles.items()}

        layers = tuple(replace(table, roles=changed(table.roles)) for table in self.layers)
        return replace(self, name=f"{self.name}-g{group_size}", roles=changed(self.roles), layers=layers)


def _nearest(role: str, roles: Mapping[str, Setting]) -> str | None:
    """The role itself if it is among `roles`, else the first of those that it is a part of."""
    while role not in roles:
        if role not in PARTS:
            return None
        role = PARTS[role]
    return role


def _range_name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


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
    recipe = _parse(title, table)
    if group_size is None:
        return recipe
    if group_size not in GROUP_SIZES:
        raise UsageError(f"--group-size {group_size}: choose 32, 64 or 128")
    return recipe.grouped(group_size)


def _parse(recipe: str, table: Mapping[str, Any]) -> Recipe:
    for role in ROLES:
        if role not in table:
            raise UsageError(f"recipe {recipe}: no setting for role {role!r}; every role needs one")
    unknown = sorted(set(table) - {*ROLES, *PARTS, "layers", "conditioning"})
    if unknown:
        raise UsageError(
            f"recipe {recipe}: unknown role {unknown[0]!r}; the roles are {', '.join(ROLES)}, and as parts of them "
            f"{', '.join(PARTS)}; tables of layers are called [{recipe}.layers.first-4] or so"
        )
    roles = {role: _setting(recipe, role, table[role]) for role in (*ROLES, *PARTS) if role in table}
    layers = table.get("layers", {})
    if not isinstance(layers, Mapping):
        raise UsageError(
            f"recipe {recipe}: layers is {layers!r}; write a table [{recipe}.layers.first-4] with a line for each role"
        )
    conditioning = Conditioning.parse(recipe, table.get("conditioning", {}))
    return Recipe(recipe, roles, tuple(_layers(recipe, name, entry) for name, entry in layers.items()), conditioning)


def _layers(recipe: str, name: str, table: Any) -> LayerRoles:
    """A table `[recipe.layers.NAME]`."""
    found = re.fullmatch(r"(?:(first|last)-(\d{1,4})|(\d{1,4})(?:-(\d{1,4}))?)", name)
    first, last = 0, -1
    if found and found[1]:
        count = int(found[2])
        first, last = (0, count - 1) if found[1] == "first" else (-count, -1)
    elif found:
        first, last = int(found[3]), int(found[4] or found[3])
    if not found or (found[1] and int(found[2]) == 0) or (not found[1] and last < first):
        raise UsageError(
            f"recipe {recipe}: {name!r} names no layers; write first-4, last-2, a range such as 4-11, or one number, "
            "where 0 is the first layer"
        )
    if not isinstance(table, Mapping) or not table:
        raise UsageError(f"recipe {recipe}: layers.{name} sets no role; give a line such as mlp = {{ bits = 8 }}")
    unknown = sorted(set(table) - set(LAYERED))
    if unknown:
        raise UsageError(
            f"recipe {recipe}: layers.{name} has {unknown[0]!r}; the roles of a decoder layer are {', '.join(LAYERED)}"
        )
    roles = {role: _setting(recipe, f"layers.{name}.{role}", entry) for role, entry in table.items()}
    return LayerRoles(name, first, last, roles)


def _setting(recipe: str, role: str, entry: Any) -> Setting:
    if not isinstance(entry, Mapping):
        raise UsageError(f"recipe {recipe}: role {role!r} is {entry!r}; write {{ bits = 8 }} or so")
    keys = [field.name for field in fields(Setting)]
    unknown = sorted(set(entry) - set(keys))
    if unknown:
        raise UsageError(f"recipe {recipe}: role {role!r} has unknown key {unknown[0]!r}; use {', '.join(keys)}")
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
    if setting.scales not in SCALES:
        raise UsageError(f"recipe {recipe}: role {role!r} has scales {setting.scales!r}; choose search or absmax")
    if setting.bits == 4 and (type(setting.group_size) is not int or setting.group_size not in GROUP_SIZES):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 4 bits and group_size {setting.group_size!r}; "
            "choose 32, 64 or 128, a whole number"
        )
    if setting.bits == 32 and setting != Setting(32):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 32 bits with groups, zero points or scales; 32 bits are kept as they "
            "are: leave out group_size, symmetric and scales"
        )
    if setting.bits == 8 and (setting.group_size is not None or not setting.symmetric):
        raise UsageError(
            f"recipe {recipe}: role {role!r} has 8 bits with groups or zero points; 8 bits are symmetric with "
            "one scale per output channel, which every target can express"
        )
    return setting
