"""The crash of XNNPACK in DeltaNet prefill: reproducer, immunity of what we lower, and how a crash is reported.

A constant that a delegate's linear packs and another node of it reads is unmapped after packing. In the prototype
it was the triangular mask of the delta rule: a linear with it summed the log decays, and it masked the products.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from numpy.typing import NDArray

from export.checkpoint.weights import Weights
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import load_recipe
from export.spec import ExportError
from targets import load_target
from targets.base import Job
from targets.to_executorch import check, file, nodes
from targets.to_executorch.program import Constants, Method
from targets.to_executorch.weight_cache import share_packed_weights
from targets.to_executorch.xnnpack import Filter, Tensor, _Value

pytestmark = pytest.mark.usefixtures("hints_once", "traced_once")

SIZE = 64
"""Of the mask: a chunk of the delta rule."""
MASK = np.tril(np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32))
LENGTHS = (16, 80)
SIZES = ((64, 96),)

# Runs `forward` of a file with the identity as its input, or measures what loading its methods takes.
CHILD = """
import json, sys, resource
import numpy as np, torch, psutil
from executorch.extension.pybindings import _C
from targets.to_executorch.weight_cache import share_packed_weights
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, result, shared, *names = sys.argv[1:]
if shared == "shared" and not share_packed_weights():
    sys.exit("no weights cache")
program = _C._load_program(path)
resident = psutil.Process().memory_info().rss
methods, grown, outputs = [], [], []
for name in names:
    methods.append(program.load_method(name))
    grown.append(psutil.Process().memory_info().rss - resident)
    outputs.append(methods[-1].call([torch.eye(*program.method_meta(name).input_tensor_meta(0).sizes())])[0].numpy())
np.savez(result, *outputs)
sys.stdout.write(json.dumps(grown))
"""

Built = tuple[Path, file.Source, dict[str, int]]


def run(path: Path, shared: bool, *names: str) -> tuple[int, str, list[NDArray[Any]]]:
    """Exit code, output and results of methods in a child of their own."""
    result = path.with_suffix(".npz")
    command = [sys.executable, "-c", CHILD, str(path), str(result), "shared" if shared else "apart", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return done.returncode, done.stderr, []
    with np.load(result) as found:
        return 0, done.stdout, [found[f"arr_{number}"] for number in range(len(names))]


def masked_product(folder: Path, kind: str) -> Built:
    """`linear(x, MASK) * MASK`, with the mask read a second time in one of four ways.

    value: the filter's own value; data: another value with the filter's data; operand: data that no linear
    packs (the linear has a copy); argument: as we lower it.
    """
    constants = Constants()
    method = Method("forward", constants)
    mask, copy = Filter((SIZE, SIZE), "mask"), Filter((SIZE, SIZE), "copy")
    x = method.input((SIZE, SIZE))
    method.cut("mask")
    product = nodes.linear(method, x, copy if kind == "operand" else mask)
    delegate = method.delegate
    if kind == "argument":
        operand = method.constant(MASK)
    else:
        operand = Tensor((SIZE, SIZE), delegate=delegate)
        delegate._ids[operand] = (
            delegate.filter(mask)
            if kind == "value"
            else delegate._value(_Value((SIZE, SIZE), schema.XNNDatatype.xnn_datatype_fp32, mask))
        )
    method.output(nodes.multiply(method, product, operand))
    names = ("mask", "copy") if kind == "operand" else ("mask",)
    return write(folder / "masked.pte", [method], constants, dict.fromkeys(names, MASK))


def write(
    path: Path, methods: list[Method], constants: Constants, arrays: Mapping[str, NDArray[Any]]
) -> Built:
    source = file.Source(methods, [], constants, [weight(name, array) for name, array in arrays.items()])
    return path, source, file.write(path, source)


def weight(name: str, array: NDArray[Any]) -> file.Weight:
    return file.Weight(name, {name: array.nbytes}, lambda: iter([(name, array.tobytes())]))


@pytest.mark.parametrize(
    ("kind", "shared", "right"),
    [
        ("value", False, False),
        ("value", True, False),
        ("data", False, True),  # since 1.4.1, which keeps what no linear of the delegate reads
        ("data", True, False),  # but the weights cache lets go of everything
        ("operand", True, False),
        ("argument", False, True),
        ("argument", True, True),
    ],
)
def test_a_released_constant_crashes_and_an_argument_does_not(
    kind: str, shared: bool, right: bool, tmp_path: Path
) -> None:
    """If a wrong one turns right, the runtime was repaired: say so in the log; our lowering needs no change."""
    path, _, _ = masked_product(tmp_path, kind)
    code, said, outputs = run(path, shared, "forward")
    assert code <= 0, said
    equal = code == 0 and np.allclose(outputs[0], MASK.T * MASK, atol=1e-6)
    assert equal == right, f"exit code {code}: {said}"


# -- what we lower --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lowered(small: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Built]:
    """Every file of a small model: path, source and places."""
    written: list[Built] = []
    original = file.write

    def spy(path: Path, source: file.Source, resume: bool = False) -> dict[str, int]:
        written.append((path, source, original(path, source, resume)))
        return written[-1][2]

    folder, config = tmp_path_factory.mktemp("lowered"), small.model_config
    quantizer = Quantizer(Weights(small, config), load_recipe("int4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "write", spy)
        load_target("executorch").lower(Job(config, quantizer, 128, LENGTHS, SIZES, folder))
    return written


def misread(delegate: Any) -> list[str]:
    """Where a delegate reads constant data as anything but a filter or a bias."""
    constant = {number for number, value in enumerate(delegate._values) if value.filter is not None}
    packed = set(delegate._filters.values())
    found = [f"value {number} is no filter and has constant data" for number in sorted(constant - packed)]
    for node in delegate.nodes:
        union = node.xnode_union
        for each in dataclasses.fields(union):
            free = each.name.endswith("_id") and each.name not in ("filter_id", "bias_id")
            if free and getattr(union, each.name) in constant:
                found.append(f"{type(union).__name__}.{each.name}")
    external = {delegate._ids[tensor] for tensor in (*delegate.inputs, *delegate.outputs)}
    return found + (["a filter is an argument"] if external & constant else [])


def test_no_delegate_reads_a_constant_but_as_filter_or_bias(lowered: list[Built]) -> None:
    names = {method.name for _, source, _ in lowered for method in source.methods}
    assert names == {"decode_step", "prefill_16", "prefill_80", "vision_64x96"}
    delegates = [each for _, source, _ in lowered for method in source.methods for each in method.delegates()]
    assert sum(len(delegate.filters()) for delegate in delegates) > 100
    assert not [(delegate.name, found) for delegate in delegates for found in misread(delegate)]


@pytest.mark.parametrize("kind", ["value", "data", "operand"])
def test_the_walk_finds_each_wrong_delegate(kind: str, tmp_path: Path) -> None:
    _, source, _ = masked_product(tmp_path, kind)
    assert misread(source.methods[0].delegates()[0])


def test_lowered_files_pass(lowered: list[Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, also one whose files have names of modules."""
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    for built in lowered:
        check.check_methods(*built)


def test_delegates_of_a_lowered_method_run_alone(lowered: list[Built]) -> None:
    path, source, places = lowered[0]
    before = sorted(path.parent.iterdir())
    method = next(method for method in source.methods if method.name == "prefill_80")
    for delegate in sorted(method.delegates(), key=lambda each: len(each.nodes))[-2:]:
        assert len(delegate.inputs) > 2 and delegate.filters()
        assert check._run_alone(path, source, places, delegate, check.LIMIT_S) is None, delegate.name
    assert sorted(path.parent.iterdir()) == before


# -- how a crash is reported ------------------------------------------------------------------------------
def test_a_crash_names_its_method_and_delegate(tmp_path: Path) -> None:
    """This one dies with the weights cache only: the child has it on."""
    built = masked_product(tmp_path, "data")
    before = sorted(tmp_path.iterdir())
    message = (
        r'method forward of masked\.pte dies in its delegate "forward:mask" \(signal SIG(SEGV|BUS)\), which dies '
        r"alone, too; its nodes \(2\) are XNNFullyConnected, XNNMultiply; leave the method out .*"
        r"another release of the runtime \(this is executorch 1\.5"
    )
    with pytest.raises(ExportError, match=message):
        check.check_methods(*built)
    assert sorted(tmp_path.iterdir()) == before


def test_the_failing_one_of_several_methods_and_delegates_is_named(tmp_path: Path) -> None:
    constants = Constants()
    fine, ill = Method("fine", constants), Method("ill", constants)
    mask = Filter((SIZE, SIZE), "mask")
    for method in (fine, ill):
        x = method.input((SIZE, SIZE))
        method.cut("first")
        hidden = nodes.linear(method, x, mask)
        method.cut("second")
        if method is ill:
            wrong = Tensor((SIZE, SIZE), delegate=method.delegate)
            method.delegate._ids[wrong] = method.delegate.filter(mask)
            hidden = nodes.multiply(method, nodes.linear(method, hidden, mask), wrong)
        method.cut("third")
        method.output(nodes.unary(method, "Exp", hidden))
    with pytest.raises(
        ExportError, match=r'method ill of both\.pte dies in its delegate "ill:second" \(signal SIG'
    ):
        check.check_methods(*write(tmp_path / "both.pte", [fine, ill], constants, {"mask": MASK}))


def test_an_unknown_kernel_is_named_with_the_runtimes_words(tmp_path: Path) -> None:
    constants = Constants()
    method = Method("forward", constants)
    result = Tensor((SIZE, SIZE))
    product = nodes.linear(method, method.input((SIZE, SIZE)), Filter((SIZE, SIZE), "mask"))
    method.kernel("mobile::missing.out", [product], [result])
    method.output(result)
    message = (
        r"method forward of kernel\.pte fails \(RuntimeError: .*Missing operator: \[0\] mobile::missing\.out.*\); "
        r"each of its delegates \(1\) works alone, so look at what joins them \(kernels: mobile::missing\.out\)"
    )
    with pytest.raises(ExportError, match=message):
        check.check_methods(*write(tmp_path / "kernel.pte", [method], constants, {"mask": MASK}))


def test_a_refused_delegate_is_named(tmp_path: Path) -> None:
    """The runtime refuses a product of shapes that do not fit when it loads it or when it runs it."""
    constants = Constants()
    method = Method("forward", constants)
    x = method.input((SIZE, SIZE))
    method.cut("reshape")
    source = method.read(x)
    result = method.delegate.define((SIZE, SIZE + 1))
    method.delegate.add(schema.XNNStaticReshape(2, [SIZE, SIZE + 1], source, method.read(result), 0))
    method.output(result)
    message = r'method forward of refused\.pte fails in its delegate "forward:reshape" \(RuntimeError: '
    with pytest.raises(ExportError, match=message):
        check.check_methods(*write(tmp_path / "refused.pte", [method], constants, {}))


def test_a_file_that_does_not_open_is_named(tmp_path: Path) -> None:
    path, source, places = masked_product(tmp_path, "argument")
    path.write_bytes(b"no program")
    with pytest.raises(ExportError, match=r"masked\.pte fails before its first method \(RuntimeError: "):
        check.check_methods(path, source, places)


def test_a_method_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = masked_product(tmp_path, "argument")
    with pytest.raises(
        ExportError, match=r"executorch: masked\.pte did not come back within 0 s; free some cores"
    ):
        check.check_methods(*built, limit_s=0.01)

    def hang(*_: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("child", options["timeout"], output=b'{"begun": "forward"}\n')

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(
        ExportError, match=r"method forward of masked\.pte did not come back within 600 s; .*leave the"
    ):
        check.check_methods(*built)


def test_a_killed_child_speaks_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = masked_product(tmp_path, "argument")
    killed = subprocess.CompletedProcess("child", -9, b'{"begun": "forward"}\n', b"")
    answers, original = iter([killed, subprocess.CompletedProcess("child", 0, b"", b"")]), subprocess.run

    def answer(command: list[str], **options: Any) -> Any:  # the serialiser runs programs, too
        ours = "targets.to_executorch.check" in command
        return next(answers) if ours else original(command, **options)

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(
        ExportError, match=r"method forward of masked\.pte dies \(signal SIGKILL\).* when memory runs"
    ):
        check.check_methods(*built)


def test_a_full_disk_does_not_hide_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = masked_product(tmp_path, "data")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(check, "_run_alone", full)
    message = (
        r"method forward of masked\.pte dies \(signal SIG\w+\); .* could not be written .*No space left.*free"
    )
    with pytest.raises(ExportError, match=message):
        check.check_methods(*built)


# -- the weights cache ------------------------------------------------------------------------------------
def test_methods_share_packed_weights(tmp_path: Path) -> None:
    columns, rows = 2048, 4096
    constants = Constants()
    methods = [Method("one", constants), Method("many", constants)]
    for method, count in zip(methods, (1, 16), strict=True):
        method.output(nodes.linear(method, method.input((count, columns)), Filter((rows, columns), "large")))
    large = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    path, _, _ = write(tmp_path / "large.pte", methods, constants, {"large": large})
    grown, results = {}, {}
    for shared in (False, True):
        code, said, results[shared] = run(path, shared, "one", "many")
        assert code == 0, said
        grown[shared] = [size / large.nbytes for size in json.loads(said)]
    assert grown[False][1] > 1.8 and 0.9 < grown[True][1] < 1.3, grown
    for apart, shared_result in zip(results[False], results[True], strict=True):
        assert np.array_equal(apart, shared_result)
    assert np.array_equal(results[True][1], large.T[:16])


def test_other_releases_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.to_executorch.weight_cache.metadata.version", lambda _: "1.6.0")
    assert share_packed_weights() is False
