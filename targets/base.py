"""What a target must offer: say what it can do, lower traced programs, open a finished bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from export.model.config import ModelConfig
from export.quantize.quantizer import Quantizer

Arrays = dict[str, NDArray[Any]]
Rows = tuple[int, Tensor]
"""First row, float32 rows [r, K]."""


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
    """Bytes of weights a file may hold; None: any number. One layer, or the head, is never cut."""
    text_runner: bool = False
    """Also write what the runtime's own runner of text models calls."""
    try_out: bool = True
    """Run what was written once in a process of its own, where a runtime could crash."""
    stop_token_ids: tuple[int, ...] = ()
    """For runtimes with a config of their own that names them."""
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

    def close(self) -> None: ...


class Target(Protocol):
    """One runtime."""

    name: str
    runtime: str
    min_version: str
    loading: str
    """What an app must link and call, for the model card."""
    capabilities: Capabilities

    def lower(self, job: Job) -> Lowered:
        """Write the runtime's files into `job.folder`."""
        ...

    def open(self, folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
        """Load a finished bundle."""
        ...

    def stored_weights(
        self, folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
    ) -> Iterator[tuple[str, Rows]]:
        """Every weight of the finished files, dequantised as the runtime will: the input of L2."""
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
