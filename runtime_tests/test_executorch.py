"""The ExecuTorch target on small random models: L1 in fp32, L2 bit for bit, files, loaders, what it refuses."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.chat.conversation import Contract, Conversation
from export.quantize.recipe import Recipe, load_recipe
from export.spec import ExportError, UsageError
from export.validate.case import Case
from export.validate.ladder import climb, l2
from export.validate.lowered import file_layers
from runtime_tests.conftest import VARIANTS, MemoryCheckpoint, build, climb_l1, variant
from targets import load_target
from targets.to_executorch import lower, operators, runtime
from targets.to_executorch.program import Method
from targets.to_executorch.stored import Pte

pytestmark = pytest.mark.usefixtures("hints_once", "traced_once", "judged_once", "compared_once")

NAME = "executorch"
Built = tuple[Path, dict[str, Any]]


def test_l1_holds_for_every_config(checkpoint: Any, tmp_path: Path) -> None:
    """80 tokens are a full chunk of the delta rule and a shorter one."""
    rung = climb_l1(checkpoint, tmp_path, NAME, lengths=(16, 80))
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    assert {c.name for c in rung.checks} >= {"L1.logits", "L1.states", "L1.padding", "L1.embed", "L1.vision"}


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4", "int4-mixed"])
@pytest.mark.parametrize("tied", [True, False])
def test_l2_every_stored_weight_equals_the_quantiser(recipe: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(tied=tied, num_hidden_layers=4, vision={"hidden_size": 64}))
    chosen = load_recipe(recipe, 32 if recipe.startswith("int4") else None)
    _, manifest, _ = build(checkpoint, tmp_path, chosen, NAME, lengths=(16,))
    rung = l2(Case(checkpoint, checkpoint.model_config, chosen, load_target(NAME), tmp_path, manifest, 1))
    assert rung.status == "PASS", rung.series


@pytest.mark.parametrize("part", ["up.weight#", "up.weight.scales#", "conv_weight#", "dt_bias#", "q_norm.weight"])
def test_l2_notices_one_changed_byte(part: str, small: Any, tmp_path: Path) -> None:
    recipe = load_recipe("int4", 32)
    _, manifest, _ = build(small, tmp_path, recipe, NAME, lengths=(16,))
    pte = Pte(tmp_path / "decoder.pte")
    if "#" in part:
        key = next(key for key in pte._named if part in key)
        place = pte._base + pte.program.segments[pte._named[key]].offset
    else:
        array = next(array for name, array in pte.constants() if part in name)
        place = (tmp_path / "decoder.pte").read_bytes().index(array.tobytes())
    with open(tmp_path / "decoder.pte", "r+b") as file:
        file.seek(place + 1)
        byte = file.read(1)[0]
        file.seek(place + 1)
        file.write(bytes([byte ^ 1]))
    rung = l2(Case(small, small.model_config, recipe, load_target(NAME), tmp_path, manifest, 1))
    assert rung.checks[0].value >= 1
    assert len(rung.series["wrong"]) == 1


def test_codes_and_scales_are_those_of_the_onnx_bundle(small: Any, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("onnx", NAME)}
    for name, folder in folders.items():
        folder.mkdir()
        build(small, folder, load_recipe("int4", 32), name, lengths=(16,))
    graph = onnx.load(folders["onnx"] / "decoder.onnx", load_external_data=False).graph
    tensors = {t.name: t for t in graph.initializer}
    pte, compared = Pte(folders[NAME] / "decoder.pte"), 0
    published = {p.segments: name for name, p in build_parameters(small).items()}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales = (read_external(folders["onnx"], tensors[node.input[i]]) for i in (1, 2))
        name = published[segments_of(small, node.input[1])]
        keys = {key.split("#")[0]: key for key in pte._named}
        assert np.array_equal(pte.named(keys[name]), codes), name
        wide = pte.named(keys[f"{name}.scales"]).view(np.uint16).astype(np.uint32) << np.uint32(16)
        assert np.array_equal(wide.view(np.float32), scales.view(np.float32)), name
        compared += 1
    assert compared == 4 * 6 + 8 + 1, "every quantised matrix of the decoder: 4 DeltaNet layers, 1 attention, head"


def build_parameters(checkpoint: Any) -> dict[str, Any]:
    from export.checkpoint.weights import Weights

    return {n: p for n, p in Weights(checkpoint, checkpoint.model_config).parameters.items() if n != "embedding.weight"}


def segments_of(checkpoint: Any, tensor: str) -> Any:
    """The source rows in the name of an ONNX initializer: parameter names, or tensor[start:stop]+…"""
    from targets.to_onnx.pack import storage_key

    for parameter in build_parameters(checkpoint).values():
        key = storage_key(parameter, None).rsplit("|", 1)[0]
        if tensor.startswith(key + "|"):
            return parameter.segments
    raise KeyError(tensor)


def read_external(folder: Path, tensor: onnx.TensorProto) -> Any:
    place = {e.key: e.value for e in tensor.external_data}
    return np.fromfile(folder / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))


# -- several files ------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{"max_file_layers": 3}, {"max_file_bytes": 800_000}], ids=["layers", "bytes"])
def test_a_decoder_of_several_files_and_an_untied_head(
    limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L1 to L3 in fp32, L2 in int4; L1 cuts its own lowering as the manifest's files are cut."""
    monkeypatch.setattr(lower, "check_methods", lambda *files: None)  # seconds for each, and tested elsewhere
    checkpoint = MemoryCheckpoint(VARIANTS["equal-heads-untied"])
    for recipe, rungs in ((Recipe.unquantised(), ("L1", "L2", "L3")), (load_recipe("int4", 32), ("L2",))):
        folder = tmp_path / recipe.name
        folder.mkdir()
        _, manifest, _ = build(checkpoint, folder, recipe, NAME, lengths=(16,), **limits)
        case = Case(checkpoint, checkpoint.model_config, recipe, load_target(NAME), folder, manifest, 1)
        for rung in climb(case, rungs):
            assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
        stages = manifest["signatures"]["decode"]["stages"]
        layers = [{int(name.split("_")[1]) for name in stage["states"]} for stage in stages]
        if "max_file_layers" in limits:
            assert layers == [{0, 1, 2}, {3}]
            assert file_layers(manifest) == 3
        else:
            files = [Pte(folder / stage["file"]) for stage in stages]
            assert all(weight_bytes(pte) <= 800_000 for pte in files)
            assert len(files) == (5 if recipe.name == "fp32" else 1), "four layers and the head, or all in one"
    manifest["signatures"]["decode"]["stages"] = stages[:1]
    assert file_layers(manifest) is None


def test_a_limit_below_one_layer_is_refused(small: Any, tmp_path: Path) -> None:
    message = r"--max-file-size 1000: layer \d alone has \d+ bytes, and neither a layer nor the head is ever cut"
    with pytest.raises(UsageError, match=message):
        build(small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), max_file_bytes=1000)
    assert not list(tmp_path.iterdir())


def weight_bytes(pte: Pte) -> int:
    return sum(len(pte.named(key)) for key in pte._named if not key.startswith("small:"))


def test_a_head_larger_than_a_file_gets_its_own(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint(variant(tied=False, num_hidden_layers=4, vocab_size=2048))
    rung = climb_l1(checkpoint, tmp_path, NAME, lengths=(16,), max_file_bytes=1_100_000)
    assert rung.status == "PASS", [c for c in rung.checks if c.status == "FAIL"]
    last = sorted(tmp_path.glob("decoder*.pte"))[-1]
    keys = [key.split("#")[0] for key in Pte(last)._named]
    assert "decoder.head.weight" in keys
    assert not any(".layers." in key for key in keys)


# -- state under both loaders -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("executorch")
    _, manifest, _ = build(small, folder, Recipe.unquantised(), NAME, lengths=(16,))
    return folder, manifest


def conversation(built: Built, call: Any, swap: bool) -> list[torch.Tensor]:
    """prefill, decode, prefill, decode by the manifest's word alone; logits of each.

    `swap` keeps two buffers of each state and exchanges them, else one buffer is both where the manifest allows
    that. `call(entry, inputs)` gives the outputs.
    """
    _, manifest = built
    random = torch.Generator().manual_seed(0)
    states = {s["name"]: torch.zeros(s["shape"]) for s in manifest["states"]}
    start, logits = 0, []
    for signature, valid in (("prefill_16", 11), ("decode", 1), ("prefill_16", 16), ("decode", 1), ("decode", 1)):
        entry = manifest["signatures"][signature]
        (stage,) = entry["stages"]
        rows = entry["inputs"][0]["shape"][1]
        values = {
            "embeddings": torch.randn(entry["inputs"][0]["shape"], generator=random),
            "position_ids": (start + torch.arange(rows, dtype=torch.int32)).repeat(3, 1),
            "start": torch.tensor([start], dtype=torch.int32),
            "valid": torch.tensor([valid], dtype=torch.int32),
        }
        places = {int(place): values[name] for name, place in stage["inputs"].items()}
        places |= {int(binding["input"]): states[name] for name, binding in stage["states"].items()}
        outputs = call(stage["entry"], [places[i] for i in range(len(places))])
        logits.append(outputs[int(stage["outputs"]["logits"])].clone())
        for name, binding in stage["states"].items():
            new = outputs[int(binding["output"])]
            if binding.get("update") == "rows":
                axis = binding["axis"]
                states[name].narrow(axis, start, valid).copy_(new.narrow(axis, 0, valid))
            elif swap or not binding["in_place"]:
                states[name] = new.clone()
            else:
                states[name].copy_(new)
        start += valid
    return logits


def test_states_are_right_under_the_sharing_and_the_unsharing_loader(built: Built) -> None:
    """`_load_program` gives all methods the same arenas, `_load_for_executorch` each its own."""
    folder, _ = built
    library = runtime.library()
    unshared = library._load_for_executorch(str(folder / "decoder.pte"))
    shared = library._load_program(str(folder / "decoder.pte"))
    methods: dict[str, Any] = {}

    def by_module(entry: str, inputs: list[torch.Tensor]) -> Any:
        return unshared.run_method(entry, inputs)

    def by_program(entry: str, inputs: list[torch.Tensor]) -> Any:
        if entry not in methods:
            methods[entry] = shared.load_method(entry)
        return methods[entry].call(inputs)

    runs = [conversation(built, call, swap) for call in (by_module, by_program) for swap in (True, False)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("loader", ["_load_program", "_load_for_executorch"])
def test_results_left_in_the_runtime_s_memory_may_be_passed_back(loader: str, built: Built) -> None:
    """What an Android app does: a new state is passed on as it lies, without a copy."""
    folder, manifest = built
    library = runtime.library()
    expected = conversation(built, library._load_for_executorch(str(folder / "decoder.pte")).run_method, True)
    program = getattr(library, loader)(str(folder / "decoder.pte"))
    methods: dict[str, Any] = {}
    kept: dict[str, torch.Tensor] = {}

    def call(entry: str, inputs: list[torch.Tensor]) -> Any:
        signature = "decode" if entry == "decode_step" else entry
        whole = {n: b for n, b in manifest["signatures"][signature]["stages"][0]["states"].items() if "update" not in b}
        for name, binding in whole.items():
            inputs[int(binding["input"])] = kept.get(name, inputs[int(binding["input"])])
        if loader == "_load_program":
            if entry not in methods:
                methods[entry] = program.load_method(entry)
            outputs = methods[entry].call(inputs, clone_outputs=False)
        else:
            outputs = program.run_method(entry, inputs, clone_outputs=False)
        kept.update({name: outputs[int(binding["output"])] for name, binding in whole.items()})
        return outputs

    found = conversation(built, call, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# -- what a method is made of ---------------------------------------------------------------------------
def plans(folder: Path, file: str = "decoder.pte") -> dict[str, Any]:
    return {plan.name: plan for plan in Pte(folder / file).program.execution_plan}


def test_delegates_and_kernels_are_pinned(built: Built, small: Any) -> None:
    """A delegate ends only where a kernel must run: before the first layer, and around the cache of an attention."""
    text = small.model_config.text
    attention = sum(kind == "full_attention" for kind in text.layer_types)
    found = plans(built[0])
    for name in ("decode_step", "prefill_16"):
        plan = found[name]
        assert len(plan.delegates) == attention + 1, "the layers between attentions"
        assert len(plan.delegates) <= text.num_hidden_layers
        kernels = Counter(
            f"{plan.operators[call.op_index].name}.{plan.operators[call.op_index].overload}".rstrip(".")
            for call in (i.instr_args for i in plan.chains[0].instructions)
            if hasattr(call, "op_index")
        )
        assert set(kernels) <= set(operators.KERNELS)
        assert kernels["llama::custom_sdpa.out"] == attention
        assert kernels["llama::update_cache.out"] == 2 * attention
        once = {k: n for k, n in kernels.items() if not k.startswith("llama::")}
        padding = {} if name == "decode_step" else {"aten::lt.Tensor_out": 1, "aten::where.self_out": 1}
        casts = 1 if name == "decode_step" else 2
        assert once == {"aten::_to_copy.out": casts, "aten::_local_scalar_dense": 1, **padding}
    for name, plan in plans(built[0], "vision.pte").items():
        assert (len(plan.delegates), len(plan.operators)) == (1, 0), name
    assert not any(word in k for k in operators.KERNELS for word in ("matmul", "mm.", "mean", "sum", "softmax"))
    assert all(operators.KERNELS.values()), "each with a reason"


def test_methods_that_runners_read(built: Built) -> None:
    library = runtime.library()
    program = library._load_program(str(built[0] / "decoder.pte"))

    def value(name: str) -> Any:
        return program.load_method(name).call([])

    assert value("get_max_seq_len") == [128]
    assert value("get_max_context_len") == [128]
    assert value("get_vocab_size") == [64]
    assert value("get_n_layers") == [5]
    assert value("get_eos_ids") == []  # the tests' jobs name none; `test_text_runner` stops at the true ones
    assert value("use_kv_cache") == [True]
    assert value("enable_dynamic_shape") == [False]


def test_a_tied_matrix_is_stored_once(small: Any, tmp_path: Path) -> None:
    _, manifest, _ = build(small, tmp_path, load_recipe("int4", 32), NAME, lengths=(16,))
    (stage,) = manifest["signatures"]["embed"]["stages"]
    pte = Pte(tmp_path / stage["file"])
    (key,) = (key for key in pte._named if key.startswith("decoder.head.weight#"))
    assert stage["file"] == "decoder.pte"
    assert stage["table"]["data_offset"] == pte._base + pte.program.segments[pte._named[key]].offset
    assert not (tmp_path / lower.EMBEDDING).exists()


# -- refusals ---------------------------------------------------------------------------------------------
def test_an_older_runtime_is_refused(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda package: "1.3.0")
    with pytest.raises(ExportError, match=r"needs executorch >= 1\.\d+\.\d+, and 1\.3\.0 is installed; upgrade"):
        load_target(NAME).open(*built, 1)


def test_a_missing_kernel_is_named_before_anything_is_loaded(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor:
        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def _get_operator_names(self) -> list[str]:
            return [n for n in library._get_operator_names() if "custom_sdpa" not in n]

        def _load_program(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("must not be reached")

    library = runtime.library()
    monkeypatch.setattr(runtime, "library", Poor)
    session = load_target(NAME).open(*built, 1)
    with pytest.raises(ExportError, match=r"decoder\.pte calls llama::custom_sdpa\.out, which this runtime does not"):
        session.load(["decode"])


def test_a_missing_backend_is_named(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor:
        def __getattr__(self, name: str) -> Any:
            return (lambda backend: False) if name == "_is_available" else getattr(library, name)

    library = runtime.library()
    monkeypatch.setattr(runtime, "library", Poor)
    session = load_target(NAME).open(*built, 1)
    with pytest.raises(ExportError, match=r"decoder\.pte needs XnnpackBackend, which this runtime was built without"):
        session.load(["decode"])


def test_a_damaged_file_is_refused(built: Built, tmp_path: Path) -> None:
    folder, manifest = built
    for name, damage in (("short", lambda b: b[: len(b) // 2]), ("text", lambda b: b"no program at all" * 99)):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        data = (broken / "decoder.pte").read_bytes()
        (broken / "decoder.pte").write_bytes(damage(data))
        session = load_target(NAME).open(broken, manifest, 1)
        with pytest.raises(ExportError, match=r"decoder\.pte"):
            session.load(["decode"])


def test_a_failed_call_leaves_no_states_to_go_on_with(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load_target(NAME).open(*built, 1)
    talk = Conversation(session, Contract.of(built[1]))
    talk.feed([9, 10, 11])
    kept = talk.snapshot()
    expected = talk.feed([12])

    def failing(*args: Any) -> Any:
        raise ExportError("the runtime stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "call", failing)
        with pytest.raises(ExportError, match="the runtime stopped"):
            talk.feed([13])
    with pytest.raises(ExportError, match="an earlier call failed and left no states; reset the session, or restore"):
        talk.feed([13])
    talk.restore(kept)
    picture = next(name for name in built[1]["signatures"] if name.startswith("vision_"))
    (image,) = built[1]["signatures"][picture]["inputs"]
    with monkeypatch.context() as patch:  # a picture that fails costs no conversation
        patch.setattr(runtime, "call", failing)
        with pytest.raises(ExportError, match="the runtime stopped"):
            session.run(picture, {"image": np.zeros(image["shape"], np.float32)})
    assert np.array_equal(talk.feed([12]), expected)
    session.close()


def test_a_failure_in_the_last_of_several_files_leaves_no_states(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones have new states by then, whatever the last one is given: here hidden rows for the head."""
    _, manifest, _ = build(small, tmp_path, Recipe.unquantised(), NAME, lengths=(16,), max_file_layers=1)
    session = load_target(NAME).open(tmp_path, manifest, 1)
    talk = Conversation(session, Contract.of(manifest))
    talk.feed([9])
    right, calls = runtime.call, []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == len(manifest["signatures"]["decode"]["stages"]):
            raise ExportError("the runtime stopped")
        return right(*given)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "call", failing)
        with pytest.raises(ExportError, match="the runtime stopped"):
            talk.feed([10])
    assert len(calls) > 1
    with pytest.raises(ExportError, match="an earlier call failed and left no states; reset the session, or restore"):
        talk.feed([10])
    session.close()


def test_token_ids_outside_the_vocabulary_are_refused(built: Built) -> None:
    session = load_target(NAME).open(*built, 1)
    for wrong in (-1, 64):
        with pytest.raises(ExportError, match=f"token id {wrong} has no row in the embedding; ids are 0 to 63"):
            session.run("embed", {"input_ids": np.asarray([[3, wrong]])})


def test_a_second_session_with_other_threads_is_refused(built: Built) -> None:
    first = load_target(NAME).open(*built, 1)
    with pytest.raises(ExportError, match="one pool of threads for the process, and an open session uses 1"):
        load_target(NAME).open(*built, 2)
    first.close()
    load_target(NAME).open(*built, 2).close()


def test_an_output_must_be_a_tensor_of_its_own() -> None:
    from targets.to_executorch.program import Constants

    method = Method("wrong", Constants())
    with pytest.raises(ValueError, match="wrong: output 0 is no tensor of its own"):
        method.output(method.input((1, 1)))
