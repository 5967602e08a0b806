"""What a target must offer: say what it can do, lower traced programs, open a finished bundle. Torch-free, as every
target's own module is: what a spec asks for is checked before anything heavy is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from export.quantize.recipe import Recipe
from export.spec import ExportError, ExportSpec, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from export.model.config import ModelConfig
    from export.quantize.quantizer import Quantizer

Arrays: TypeAlias = "dict[str, NDArray[Any]]"
Rows: TypeAlias = "tuple[int, Tensor]"
"""First row, float32 rows [r, K]."""
UNBOUNDED = sys.maxsize
"""A limit in bytes that no file reaches."""


@dataclass(frozen=True)
class Capabilities:
    """What a target can express exactly; a spec beyond it is refused before any weight is read."""

    bits: frozenset[int]
    """Weight widths; 32 means unquantised."""
    group_sizes: frozenset[int]
    """Groups along the input features at 4 bits; 8 bits are per output channel everywhere."""
    asymmetric: bool
    """Zero points at 4 bits. Without them an asymmetric recipe is refused."""
    text_runner: bool
    """The runtime has a runner of text models that wants a method of its own in the bundle."""
    several_files: bool
    """The decoder can be cut at layer boundaries. Without it, limits of a file are refused."""
    activations: Mapping[int, str]
    """Weight width -> dtype in which the runtime multiplies activations with such weights."""
    scale_bytes: int
    """Of one group's scale at 4 bits, as the files hold it."""
    smallest_scale: float = 2.0**-24
    """No scale is smaller. Float16 with its subnormal numbers holds this one, and every format of wider exponents."""
    floats: str = "float32"
    """What is not quantised is stored as this, and states, embeddings and logits are."""
    profiles: tuple[str, ...] = ("cpu",)
    """Compute units to choose from; the first is the default."""
    state_layouts: tuple[str, ...] = ()
    """Ways of keeping states to choose from, if any."""
    head_pieces: bool = False
    """The head can be cut into pieces of some columns."""
    palettes: bool = False
    """Symmetric 4-bit codes can be stored as indices into a palette."""
    row_multiple: int = 1
    """Rows of a cache are a multiple of this."""
    histories: Mapping[str, int] = field(default_factory=dict)
    """Profile -> inputs that a convolution state keeps, where they are more than the convolution needs."""
    emulated_bytes: int | None = None
    """Most memory that an emulator of the runtime keeps weights in, as float32; None: the runtime itself runs here, and
    keeps them as they are stored."""

    def check(self, target: str, spec: ExportSpec, recipe: Recipe) -> None:
        """Refuse what the target cannot honour exactly.

        Raises:
            UsageError: naming option, value, rule and remedy.
        """
        for role, setting in recipe.entries():
            if setting.bits not in self.bits:
                raise UsageError(
                    f"{target} cannot store role {role!r} in {setting.bits} bits; it can {sorted(self.bits)}"
                )
            if not setting.symmetric and not self.asymmetric:
                raise UsageError(
                    f"{target} has no zero points at 4 bits; recipe {recipe.name} needs them: choose another"
                )
            if setting.group_size is not None and setting.group_size not in self.group_sizes:
                raise UsageError(
                    f"{target} cannot store role {role!r} in groups of {setting.group_size}; "
                    f"it can {sorted(self.group_sizes)}"
                )
        limits = (("--max-file-layers", spec.max_file_layers), ("--max-file-size", spec.max_file_bytes))
        for option, limit in limits:
            if limit is not None and not self.several_files:
                raise UsageError(f"{option} {limit}: {target} keeps its decoder in one file; leave the option out")
            if limit is not None and spec.text_runner:
                raise UsageError(
                    f"--text-runner: its method holds the whole decoder, which {option} cuts; leave out one of them"
                )
        if spec.text_runner and not self.text_runner:
            raise UsageError(f"--text-runner: {target} needs no method for it; leave the option out")
        for option, value, choices in (
            ("--profile", spec.profile, self.profiles),
            ("--state-layout", spec.state_layout, self.state_layouts),
        ):
            if value is not None and value not in choices:
                remedy = f"choose one of {', '.join(choices)}" if choices else "leave the option out"
                raise UsageError(f"{option} {value}: {target} has no such choice; {remedy}")
        if spec.max_head_columns is not None and not self.head_pieces:
            raise UsageError(f"--max-head-columns: {target} keeps the head in one piece; leave the option out")
        if spec.palettes and not self.palettes:
            raise UsageError(f"--palettes: {target} stores no palettes; leave the option out")
        if spec.palettes and not any(s.bits == 4 and s.symmetric for _, s in recipe.entries()):
            raise UsageError(f"--palettes: recipe {recipe.name} has no symmetric 4-bit role to store so; leave it out")


@dataclass(frozen=True)
class Job:
    """One lowering: what to build, from which weights, into which unfinished bundle folder."""

    config: ModelConfig
    quantizer: Quantizer
    context_length: int
    prefill_lengths: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]
    folder: Path
    max_file_layers: int | None = None
    """Decoder layers a file may hold; None: any number."""
    max_file_bytes: int | None = None
    """Bytes of weights a decoder file may hold, and with Core ML the vision encoder's; None: the target's own limit, if
    it has one. A layer, the head or an encoder larger than that is refused.
    """
    text_runner: bool = False
    """Also write what the runtime's own runner of text models calls."""
    profile: str = "cpu"
    """Which of the target's compute units the files are built for."""
    state_layout: str | None = None
    """How states are kept, where the target offers a choice; None: the profile's default."""
    max_head_columns: int | None = None
    """Vocabulary entries a piece of the head may have; None: the target's own limit."""
    palettes: bool = False
    """4-bit codes as indices into a palette of 16 numbers."""
    try_out: bool = True
    """Run what was written once in a process of its own, where a runtime could crash."""
    stop_token_ids: tuple[int, ...] = ()
    """For runtimes with a config of their own that names them."""
    license: str = "unknown"
    """Of the model, as the manifest says; for files that carry it themselves."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from, as the manifest says: kind, id, revision."""
    resume: bool = False
    advance: Callable[[int], None] = lambda count: None
    """Called with the number of weights just written, for a progress bar."""


@dataclass(frozen=True)
class Lowered:
    """The target's part of the manifest."""

    signatures: dict[str, Any]
    states: list[dict[str, Any]]
    files: dict[str, str]
    """Relative path -> role, for every file the target wrote."""
    session_options: dict[str, Any] = field(default_factory=dict)
    """What an app must set on its runtime, in the runtime's own words."""


@dataclass(frozen=True)
class OperatorTime:
    """What one kind of operator takes in one call of a signature: the median of several."""

    name: str
    calls: int
    seconds: float


Severity: TypeAlias = 'Literal["error", "warning"]'


@dataclass(frozen=True)
class Finding:
    """What a linter holds against a file of a bundle: errors stop a build, warnings go into its report."""

    rule: str
    severity: Severity
    file: str
    function: str
    """Empty where the whole file is meant."""
    item: str
    """An operation, a tensor or a state; may be empty."""
    text: str
    """What was found, the value, the rule and the remedy."""
    source: str
    """Who says so: an issue, a page, or a section of the project's own facts."""

    @property
    def where(self) -> str:
        """File, function and item, as far as they are known."""
        return ": ".join(part for part in (self.file, self.function, self.item) if part)


def grouped(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For a report: one entry for each rule, its first finding and how many there are."""
    found: dict[str, dict[str, Any]] = {}
    for each in findings:
        entry = {"rule": each.rule, "severity": each.severity, "text": each.text, "source": each.source}
        found.setdefault(each.rule, {**entry, "where": each.where, "count": 0})["count"] += 1
    return list(found.values())


def refuse(findings: Iterable[Finding]) -> None:
    """Stop a build that a linter holds an error against.

    Raises:
        ExportError: naming every error.
    """
    errors = [found for found in findings if found.severity == "error"]
    if errors:
        listed = "; ".join(f"{found.where}: {found.text} [{found.rule}: {found.source}]" for found in errors)
        raise ExportError(f"the linter found {len(errors)} error(s): {listed}")


class Prompt(Protocol):
    """What a bundle is run on, for someone to look at its values."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids, image tokens expanded."""
        ...

    @property
    def images(self) -> Sequence[NDArray[Any]]:
        """Its pictures, float32 [3, H, W] in 0…1, each of one of the bundle's sizes."""
        ...


@dataclass(frozen=True)
class Activations:
    """What a run showed of the values between operations, as the files hold them: a scaled stream is scaled."""

    text: tuple[float, ...]
    """Largest magnitude of the decoder's residual stream in each layer; infinite where a value was not finite."""
    vision: tuple[float, ...]
    """The same of the vision encoder's: before its blocks, then in each. Empty without one."""
    largest: float
    """Largest magnitude of any result in float16, masks left out."""
    where: str
    """The operation that gave it: file, function, name and kind."""
    findings: list[Finding]
    """What a linter holds against these values."""


class Session(Protocol):
    """A bundle loaded on its runtime; one conversation at a time."""

    load_seconds: float
    """Time spent loading files into the runtime so far."""

    def load(self, signatures: Iterable[str]) -> None:
        """Load what these signatures need now; else the first `run` of each does."""
        ...

    def run(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run one signature of the manifest with the contract's names, shapes and dtypes."""
        ...

    def reset(self) -> None:
        """All states to zero."""
        ...

    def snapshot(self) -> object:
        """A copy of all states, for `restore`."""
        ...

    def restore(self, snapshot: Any) -> None: ...

    def states(self) -> Arrays:
        """The present states by name, in the manifest's shapes (do not modify)."""
        ...

    def runner_logits(self, ids: Sequence[int]) -> NDArray[Any] | None:
        """Logits [T, V] of what the runtime's own runner of text models calls, token by token from the start of a
        conversation; None where the bundle does not serve one.
        """
        ...

    def close(self) -> None: ...


class Target(Protocol):
    """One runtime."""

    name: str
    runtime: str
    min_version: str
    loading: str
    """What an app must link and call, for the model card."""
    packages: tuple[str, ...]
    """Python packages it needs, of the extra that has its name."""
    measured: str
    """Where numbers of its sessions come from: host, the runtime itself on this machine, or emulated."""
    capabilities: Capabilities

    def lower(self, job: Job) -> Lowered:
        """Write the runtime's files into `job.folder`."""
        ...

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        """Load a finished bundle."""
        ...

    def open_exact(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        """The same, but with every activation and state in float32, whatever the files say."""
        ...

    def open_stressed(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session | None:
        """The same, but with sums rounded to float16 as they grow; None where the runtime is not emulated."""
        ...

    def stored_weights(
        self, folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
    ) -> Iterator[tuple[str, Rows]]:
        """Every weight of the finished files, dequantised in float32: the input of L2. A runtime that keeps weights as
        float16 rounds each once more; see the target's own `stored` for which that concerns.
        """
        ...

    def operator_times(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        threads: int,
        signature: str,
        inputs: Mapping[str, NDArray[Any]],
    ) -> list[OperatorTime]:
        """Where the time of a call goes, by the runtime's own tracer; the slowest kind first."""
        ...

    def decode_bytes(self, folder: Path, manifest: Mapping[str, Any]) -> int:
        """Bytes that one decode step must read: weights, and states that are read whole."""
        ...

    def lint(self, folder: Path, manifest: Mapping[str, Any]) -> list[Finding] | None:
        """What devices are known to object to in the files of a bundle; None where the target has no linter."""
        ...

    def observe(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        prompts: Sequence[Prompt],
        pictures: Sequence[NDArray[Any]] = (),
        advance: Callable[[float], None] = lambda share: None,
    ) -> Activations | None:
        """Run a bundle and look at every value; None where the runtime shows none, or keeps them in float32.

        Args:
            prompts: each is fed to a conversation of its own and answered by a few tokens; it must leave room for
                one. pictures: float32 [3, H, W] in 0…1, looked at alone; one of every size of the bundle.
            advance: is told what share of all that has been run.
        """
        ...
