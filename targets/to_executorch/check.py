"""Every method of a fresh .pte runs once in a child process, so that a crash of the runtime is an error here.

If one dies, its delegates are written out as files of their own and run one after the other, to name the one at
fault. Child: `python -m targets.to_executorch.check FILE METHOD…` with JSON lines on stdout, which say before
each method what is about to run. It loads nothing but torch and the runtime, and one method at a time.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.spec import ExportError

if TYPE_CHECKING:
    from targets.to_executorch.file import Source, Weight
    from targets.to_executorch.program import Method
    from targets.to_executorch.xnnpack import Delegate

LIMIT_S = 600.0
"""Time for one method, loading included: 512 tokens of 9B take two minutes on two slow cores."""
_BLOCK = 1 << 24
_LOG = re.compile(r"\[(?!cpuinfo)\w+\.(cpp|h):\d+\]")
"""A line of the runtime's log; the one about processors is no fault."""
_LOG_LINES = 3


LATE = "did not come back"
KILLED = "signal SIGKILL"


@dataclass(frozen=True)
class _Failure:
    """How a child ended: "dies", "fails" or LATE, and why. `method` is the one it had begun, None before the first."""

    method: str | None
    verb: str
    why: str


def check_methods(path: Path, source: Source, places: Mapping[str, int], limit_s: float = LIMIT_S) -> None:
    """Run all methods of `source` from the finished file that it was written to.

    Args:
        places: what `file.write` returned. limit_s: seconds a method; all of them together have their sum.

    Raises:
        ExportError: a method crashed, was refused or did not come back; says which, and its delegate if it is
            to blame.
    """
    names = [method.name for method in source.methods] + [plan.name for plan in source.values]
    failure = _run(path, names, limit_s)
    if failure is None:
        return
    what = (
        f"executorch: method {failure.method} of {path.name}"
        if failure.method
        else f"executorch: {path.name}"
    )
    if failure.verb == LATE:
        raise ExportError(
            f"{what} {LATE} {failure.why}; free some cores and memory and repeat the export, or leave the method "
            "out (--prefill-lengths, --image-sizes)"
        )
    method = next((method for method in source.methods if method.name == failure.method), None)
    if method is None:
        before = "" if failure.method else " before its first method"
        raise ExportError(f"{what} {failure.verb}{before} ({failure.why}); {_remedy(failure)}")
    for delegate in method.delegates():
        try:
            alone = _run_alone(path, source, places, delegate, limit_s)
        except OSError as error:
            raise ExportError(
                f"{what} {failure.verb} ({failure.why}); its delegates could not be written to {path.parent} to find "
                f"the one at fault ({error.strerror}): free some disk space there and repeat the export"
            ) from error
        if alone is not None and alone.verb != LATE:
            kinds = sorted({type(node.xnode_union).__name__ for node in delegate.nodes})
            raise ExportError(
                f'{what} {failure.verb} in its delegate "{delegate.name}" ({alone.why}), which {alone.verb} alone, '
                f"too; its nodes ({len(delegate.nodes)}) are {', '.join(kinds)}; {_remedy(failure)}"
            )
    kernels = ", ".join(dict.fromkeys(method.kernels())) or "none"
    raise ExportError(
        f"{what} {failure.verb} ({failure.why}); each of its delegates ({len(method.delegates())}) works alone, so "
        f"look at what joins them (kernels: {kernels}); {_remedy(failure)}"
    )


def _remedy(failure: _Failure) -> str:
    if failure.why.startswith(KILLED):
        return "the system does that when memory runs out: close other programs or export on a larger machine"
    return (
        "leave the method out (--prefill-lengths, --image-sizes) or install another release of the runtime "
        f"(this is executorch {metadata.version('executorch')}), and report this message"
    )


# -- delegates alone ------------------------------------------------------------------------------------
def _run_alone(
    path: Path, source: Source, places: Mapping[str, int], delegate: Delegate, limit_s: float
) -> _Failure | None:
    """Run one delegate as the only method of a file that is gone afterwards."""
    from targets.to_executorch import file
    from targets.to_executorch.program import Constants

    read = [value.filter for value in delegate._values if value.filter]
    pieces = {name for each in read for name in (each.codes, each.scales) if name}
    weights = [_copied(weight, path, places) for weight in source.weights if pieces & {*weight.sizes}]
    # Beside the file, because weights may be larger than what a temporary folder elsewhere can hold.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        copied = Path(folder) / path.name
        constants = Constants()
        method = _method_of(delegate, constants)
        file.write(copied, file.Source([method], [], constants, weights))
        return _run(copied, [method.name], limit_s)


def _copied(weight: Weight, path: Path, places: Mapping[str, int]) -> Weight:
    """The same weight, read from the finished file."""
    from targets.to_executorch.file import Weight

    def read() -> Iterator[tuple[str, bytes]]:
        with open(path, "rb") as finished:
            for piece, size in weight.sizes.items():
                finished.seek(places[piece])
                for begin in range(0, size, _BLOCK):
                    yield piece, finished.read(min(_BLOCK, size - begin))

    return Weight(weight.name, weight.sizes, read)


def _method_of(delegate: Delegate, constants: Any) -> Method:
    """A method that does nothing but call the delegate: what it reads is passed by the caller."""
    from targets.to_executorch.program import Method
    from targets.to_executorch.xnnpack import Tensor

    method = Method(delegate.name, constants)
    own = copy.copy(delegate)
    # Tensors know their place among the values of one method, so this method needs tensors of its own.
    inputs = {tensor: method.input(tensor.shape, tensor.dtype) for tensor in delegate.inputs}
    outputs = {tensor: Tensor(tensor.shape, tensor.dtype, own) for tensor in delegate.outputs}
    own.inputs, own.outputs = list(inputs.values()), list(outputs.values())
    renamed = {**inputs, **outputs}
    own._ids = {renamed.get(tensor, tensor): number for tensor, number in delegate._ids.items()}
    method._calls.append(own)
    for output in own.outputs:
        method.output(output)
    return method


# -- the child, seen from here --------------------------------------------------------------------------
def _run(path: Path, names: Sequence[str], limit_s: float) -> _Failure | None:
    """Run methods of a file in a child; None if all came back."""
    # -P and the parent's own search path: the child must find what the parent found, whatever folder it is in.
    command = [sys.executable, "-P", "-m", "targets.to_executorch.check", str(path.absolute()), *names]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
    }
    limit = limit_s * max(1, sum(not name.startswith(("get_", "use_", "enable_")) for name in names))
    try:
        child = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        begun, _ = _heard(late.stdout or b"")
        return _Failure(begun, LATE, f"within {limit:.0f} s")
    if child.returncode == 0:
        return None
    begun, error = _heard(child.stdout)
    lines = [line.strip() for line in child.stderr.decode(errors="replace").splitlines() if line.strip()]
    # The runtime's log names operators and shapes, which its error codes do not.
    log = [line for line in lines if _LOG.match(line)][-_LOG_LINES:]
    if child.returncode < 0:
        return _Failure(begun, "dies", "; ".join([f"signal {_signal(-child.returncode)}", *log]))
    reason = error or (lines[-1] if lines else f"exit code {child.returncode}")
    return _Failure(begun, "fails", "; ".join([reason, *log]))


def _heard(said: bytes) -> tuple[str | None, str]:
    """The method that a child began last, and the error that it reported."""
    begun, error = None, ""
    for line in said.decode(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            begun, error = entry.get("begun", begun), entry.get("error", error)
    return begun, error


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


# -- the child ------------------------------------------------------------------------------------------
def main(arguments: Sequence[str]) -> int:
    """Load and run the methods of a file in turn; the first that raises ends it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is an answer: no core file
    path, *names = arguments
    try:
        runtime = _runtime()
        program = runtime._load_program(path)
        for name in names:
            _say("begun", name)
            _call(program, name)
    except Exception as error:  # whatever it is, the parent says which method it belongs to
        _say("error", f"{type(error).__name__}: {error}")
        return 1
    return 0


def _runtime() -> Any:
    """The runtime with its kernels, as `runtime.library` gives it but without the 3 s that its imports take.

    The weights cache is on, as on phones: it lets go of all named data once a delegate is packed, so that
    whatever reads released memory without it does so with it, too.
    """
    import torch
    from executorch.extension.pybindings import _C

    from targets.to_executorch.weight_cache import share_packed_weights

    (package,) = importlib.util.find_spec("executorch").submodule_search_locations  # type: ignore[union-attr,misc]
    for place in ("extension/llm/custom_ops/*custom_ops_aot_lib.*", "kernels/quantized/*quantized_ops_aot_lib.*"):
        (kernels,) = Path(package).glob(place)
        torch.ops.load_library(kernels)
    share_packed_weights()
    return _C


def _call(program: Any, name: str) -> None:
    """One method, gone again when this returns."""
    method = program.load_method(name)
    method.call(_inputs(program.method_meta(name)), clone_outputs=False)


def _inputs(meta: Any) -> list[Any]:
    """Zeros; of two single whole numbers (`start`, `valid`) the second is the number of rows."""
    import torch

    dtypes = {3: torch.int32, 4: torch.int64, 6: torch.float32, 11: torch.bool}
    tensors = [meta.input_tensor_meta(place) for place in range(meta.num_inputs())]
    inputs = [torch.zeros(tuple(t.sizes()), dtype=dtypes[t.dtype()]) for t in tensors]
    numbers = [value for value in inputs if tuple(value.shape) == (1,) and not value.is_floating_point()]
    if len(numbers) == 2:
        numbers[1].fill_(inputs[1].shape[1])  # of the positions [3, C]
    return inputs


def _say(key: str, text: str) -> None:
    sys.stdout.write(json.dumps({key: text}) + "\n")
    sys.stdout.flush()  # before a crash, which flushes nothing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
