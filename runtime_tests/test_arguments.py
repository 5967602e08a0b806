"""The command line: every message, every exit code, and no torch before it is needed."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
from export import arguments, plan
from export.__main__ import main
from export.checkpoint.weights import parameters
from export.model.config import ModelConfig
from export.progress import SAMPLE_SECONDS, Reporter
from export.quantize.recipe import ROLES, load_recipe
from export.sizes import SIZES, shipped_tiny
from export.spec import DEFAULT_RECIPE, ExportError, ExportSpec, GateError, UsageError
from targets import TARGETS

ONNX = "--target onnx --size"


def spec_of(line: str) -> ExportSpec:
    return arguments.spec_from(arguments.build_parser().parse_args(line.split()))


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


USAGE = {
    "--size tiny": r"--target is missing; choose one of onnx",
    "--target onnx": r"--size is missing; choose one of tiny, 0.8b, 2b, 4b, 9b",
    "--target tflite --size tiny": r"--target tflite: unknown; choose one of onnx",
    f"{ONNX} tinny": r"--size tinny: unknown; choose one of tiny, 0.8b, 2b, 4b, 9b \(did you mean tiny\?\)",
    f"{ONNX} tiny --recipe int5": r"unknown recipe 'int5'; choose one of: fp32, int8, int4, .*\.toml file",
    f"{ONNX} tiny --recipe absent.toml": r"--recipe absent.toml: cannot read it .*give a TOML file",
    f"{ONNX} tiny --group-size 24": r"--group-size 24: choose 32, 64 or 128",
    f"{ONNX} tiny --group-size 64 --recipe int8": r"--group-size 64: recipe int8 has no 4-bit role",
    f"{ONNX} tiny --context-length 1": r"--context-length 1: must be 2 to 262144",
    f"{ONNX} tiny --context-length 300000": r"--context-length 300000: must be 2 to 262144",
    f"{ONNX} tiny --prefill-lengths 64,2048": r"2048: longer than --context-length 1024; lengthen the context",
    f"{ONNX} tiny --prefill-lengths 1": r"--prefill-lengths 1: a chunk has at least 2 tokens",
    f"{ONNX} tiny --prefill-lengths 64;": r"--prefill-lengths 64;: give numbers separated by commas",
    f"{ONNX} tiny --max-file-size x": r"--max-file-size x: give a size such as 900M, 1.5G or a number of bytes",
    f"{ONNX} tiny --max-file-size 0": r"--max-file-size 0: give a size such as 900M",
    f"{ONNX} tiny --max-file-layers 0": r"--max-file-layers 0: must be 1 to 1024",
    f"{ONNX} tiny --image-sizes 100x64": r"100x64: both sides must be multiples of 32, .*; try 96x64",
    f"{ONNX} tiny --image-sizes 0x64": r"0x64: both sides must be multiples of 32, .*; try 32x64",
    f"{ONNX} tiny --image-sizes big": r"--image-sizes big: give HEIGHTxWIDTH in pixels",
    f"{ONNX} tiny --image-sizes 64x64 --no-vision": r"--image-sizes and --no-vision exclude each other",
    f"{ONNX} 0.8b --context-length 100": r"--context-length 100: one 448x448 picture takes 196 tokens; .*--no-vision",
    f"{ONNX} tiny --base": r"--base: the shipped tiny checkpoint has no base variant",
    f"{ONNX} tiny --revision main": r"--revision main: only a hub id has revisions, not the shipped tiny",
    f"{ONNX} 2b --checkpoint random --revision x": r"--revision x: only a hub id .* not --checkpoint random",
    f"{ONNX} 2b --seed 3": r"--seed 3: only random weights have one; add --checkpoint random",
    f"{ONNX} 2b --num-layers 25": r"--num-layers 25: 2b has 24; use 1 to 24",
    f"{ONNX} 2b --num-layers 0": r"--num-layers 0: must be 1 to 1024",
    f"{ONNX} tiny --threads 0": r"--threads 0: must be 1 to 1024",
    f"{ONNX} tiny --threads two": r"--threads: invalid int value: 'two'; see `python -m export --help`",
    f"{ONNX} tiny -o .": r"--output-dir \.: give the bundle folder a name of its own, such as qwen3.5-tiny-onnx-int4",
    f"{ONNX} tiny -o ..": r"--output-dir \.\.: give the bundle folder a name of its own",
    f"{ONNX} tiny --recipee int4": r"unknown option --recipee \(did you mean --recipe\?\); see",
    "validat BUNDLE": r"unknown command 'validat'; choose one of export, .* \(did you mean validate\?\)",
    "validate": r"required: BUNDLE; see `python -m export validate --help`",
    "validate B --rung L9": r"--rung: invalid choice: 'L9'",
    "run B": r"required: --prompt",
    "run B --prompt x --top-p 1.5": r"--top-p 1.5: must be 0 to 1",
    "run B --prompt x --temperature nan": r"--temperature nan: must be 0 to 100",
    "run B --prompt x --image absent.png": r"--image absent.png: no such file; give the path of a picture",
    "bench B --runs 0": r"--runs 0: must be 1 to 10000",
}


@pytest.mark.parametrize("line", USAGE)
def test_bad_usage(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert re.search(USAGE[line], err), err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = [*f"{ONNX} tiny -o".split(), str(tmp_path)]
    assert main(line) == 2
    assert "exists; choose another -o, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 2
    assert "is no bundle; --overwrite only replaces bundles" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_defaults() -> None:
    tiny, small = spec_of(f"{ONNX} tiny"), spec_of(f"{ONNX} 0.8b")
    assert (tiny.prefill_lengths, small.prefill_lengths) == ((64,), (64, 512))
    assert (tiny.context_length, small.context_length) == (1024, 1024)
    assert small.image_sizes == ((448, 448),) and (64, 96) in tiny.image_sizes
    assert small.output == Path("qwen3.5-0.8b-onnx-int4-mlp")
    # A default chunk that does not fit the context is the tool's affair, not the user's.
    assert spec_of(f"{ONNX} 0.8b --context-length 256").prefill_lengths == (64,)
    assert spec_of(f"{ONNX} tiny --context-length 32").prefill_lengths == (32,)


def test_values_reach_the_spec() -> None:
    spec = spec_of(
        f"{ONNX} 2b --base --checkpoint random --seed 5 --recipe int4-mixed --group-size 32 --context-length 2048 "
        "--prefill-lengths 512,64,64 --image-sizes 448x672,448X672,64x64 --num-layers 4 -o out/x/ --overwrite "
        "--resume --skip-validation --threads 1"
    )
    assert spec == ExportSpec(
        target="onnx", size="2b", base=True, checkpoint="random", seed=5, recipe="int4-mixed", group_size=32,
        context_length=2048, prefill_lengths=(64, 512), image_sizes=((448, 672), (64, 64)), num_layers=4,
        output=Path("out/x"), overwrite=True, resume=True, skip_validation=True, threads=1,
    )  # fmt: skip
    assert spec.name == "qwen3.5-2b-base-onnx-int4-mixed-g32"
    assert not spec_of(f"{ONNX} tiny --no-vision").vision
    assert spec_of(f"{ONNX} tiny --no-vision").image_sizes == ()


def test_a_recipe_file_gives_a_name_the_contract_allows(tmp_path: Path) -> None:
    file = tmp_path / "My Recipe.toml"
    roles = "\n".join(f"{role} = {{ bits = 8 }}" for role in ROLES)
    file.write_text(f"[mine]\n{roles}\n")
    options = arguments.build_parser().parse_args([*f"{ONNX} tiny --recipe".split(), str(file)])
    assert arguments.spec_from(options).name == "qwen3.5-tiny-onnx-my-recipe"


def test_only_what_changes_the_bundle_is_in_the_resume_key() -> None:
    base = spec_of(f"{ONNX} tiny")
    same = spec_of(f"{ONNX} tiny --threads 1 --resume --overwrite -o elsewhere")
    assert base.build_key() == same.build_key()
    assert base.build_key() != spec_of(f"{ONNX} tiny --context-length 512").build_key()


FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "export": (ExportError("the shard is truncated"), 1, "error: the shard is truncated"),
    "gate": (GateError("L3 kl"), 3, "error: L3 kl"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted; .*--resume"),
    "space": (OSError(errno.ENOSPC, "No space left on device", "x/weights.bin"), 1, "no space left on the disk of x"),
    "system": (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied"),
    "memory": (MemoryError(), 1, "out of memory; --dry-run"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_exit_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export import pipeline

    error, code, message = FAILURES[name]

    def fail(spec: ExportSpec, progress: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    line = [*f"{ONNX} tiny --threads 1 -o".split(), str(tmp_path / "b")]
    assert main([*line, "--quiet"]) == code
    out, err = capsys.readouterr()
    assert re.search(message, err), err
    assert out == ""
    assert main([*line, "--json"]) == code
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == code and result["error"]


def test_json_reports_bad_usage_too() -> None:
    done = python("-m", "export", "--target", "onnx", "--size", "big", "--json")
    assert done.returncode == 2 and done.stderr.startswith("error: --size big: unknown")
    assert json.loads(done.stdout) == {"error": done.stderr[7:].strip(), "exit_code": 2}


@pytest.mark.parametrize("words", [["--help"], ["validate", "--help"], ["run", "--help"], ["bench", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "usage: python -m export" in capsys.readouterr().out


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = (
        "--target --size --base --checkpoint --revision --recipe --group-size --context-length --prefill-lengths "
        "--image-sizes --no-vision --num-layers --output-dir -o --overwrite --resume --skip-validation --threads "
        "--json --dry-run --quiet"
    )
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [option for option in wanted.split() if f" {option}" not in shown and f"[{option}" not in shown] == []


TORCH_FREE = """
import sys
from export.__main__ import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "onnxruntime", "onnx", "PIL", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("words", "code", "limit_s"),
    [
        (["--help"], 0, 0.5),
        (["--target", "onnx", "--size", "nine"], 2, 0.5),
        (["--target", "onnx", "--size", "9b", "--checkpoint", "random", "--dry-run"], 0, 2.0),
    ],
)
def test_quick_and_without_torch(words: list[str], code: int, limit_s: float) -> None:
    done = python("-c", TORCH_FREE, *words)
    assert done.returncode == code, done.stderr
    # The best of a few: what the command needs, not what else this machine does just now.
    assert min(_seconds(lambda: python("-m", "export", *words)) for _ in range(3)) < limit_s


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_missing_package_is_named_with_its_extra(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert main(["--target", target, "--size", "tiny", "-o", str(tmp_path / "b")]) == 1
    assert f"install it with pip install 'qwen35-mobile[{target}]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("executorch 0.8b --recipe int4-asym", "executorch has no zero points at 4 bits; recipe int4-asym needs them"),
        ("onnx 0.8b --text-runner", "--text-runner: onnx needs no method for it"),
        ("onnx 0.8b --max-file-size 1.5G", "--max-file-size 1500000000: onnx keeps its decoder in one file"),
        ("executorch 0.8b --text-runner --max-file-layers 2", "holds the whole decoder, which --max-file-layers cuts"),
    ],
)
def test_a_dry_run_refuses_what_the_export_would(words: str, message: str) -> None:
    target, size, *more = words.split()
    spec = spec_of(" ".join(["--target", target, "--size", size, "--checkpoint random", *more]))
    with pytest.raises(UsageError, match=message):
        plan.make(spec)


@pytest.mark.parametrize("size", [name for name, row in SIZES.items() if row.config])
def test_the_plan_counts_what_the_pipeline_stores(size: str) -> None:
    made = plan.make(spec_of(f"{ONNX} {size} --checkpoint random"))
    config = SIZES[size].config
    assert config is not None
    model = ModelConfig.from_dict(config)
    recipe = load_recipe(DEFAULT_RECIPE)
    counts: dict[str, int] = {}
    for parameter in parameters(model).values():
        if parameter.role == "embedding" and model.text.tie_word_embeddings:
            continue  # stored once, as the head
        role = "kept" if parameter.role == "kept" else recipe.entry(parameter.role)[0]
        counts[role] = counts.get(role, 0) + math.prod(parameter.shape)
    planned = {role.role: role.parameters for role in made.roles}
    assert {role: n for role, n in planned.items() if role != "kept"} == {
        role: n for role, n in counts.items() if role != "kept"
    }
    if model.text.tie_word_embeddings:
        counts["kept"] += model.text.hidden_size**2  # before the head, because the default recipe rotates the stream
    # The patch embedding is stored summed over the two frames of a still picture.
    assert counts["kept"] < planned["kept"] < 1.3 * counts["kept"]


def test_the_plan_follows_the_options() -> None:
    full = plan.make(spec_of(f"{ONNX} 0.8b --checkpoint random"))
    part = plan.make(spec_of(f"{ONNX} 0.8b --checkpoint random --num-layers 4 --no-vision --skip-validation"))
    assert full.signatures == ("embed", "vision_448x448", "prefill_64", "prefill_512", "decode")
    assert part.signatures == ("embed", "prefill_64", "prefill_512", "decode") and part.num_layers == 4
    assert part.bundle_bytes < full.bundle_bytes and part.peak_memory_bytes < full.peak_memory_bytes
    # 24 layers, every fourth with keys and values of 2 heads x 1535 rows x 256; 18 with 16 x 128 x 128 and 3 conv rows.
    assert full.state_bytes == 4 * (6 * 2 * 2 * 1535 * 256 + 18 * (16 * 128 * 128 + 3 * 6144))
    text = plan.render(full, as_json=False)
    assert "would build qwen3.5-0.8b-onnx-int4" in text and "peak memory" in text
    assert json.loads(plan.render(full, as_json=True))["dry_run"] is True


def test_the_plan_knows_how_a_target_stores() -> None:
    """Core ML: floats and states in two bytes, palettes of each group for the Neural Engine, one for the GPU; its
    emulator holds weights as float32.
    """
    line = "--target {} --size 0.8b --checkpoint random --recipe {} --no-vision {}"

    def made(target: str, recipe: str, more: str = "") -> plan.Plan:
        return plan.make(spec_of(line.format(target, recipe, more)))

    onnx, coreml = made("onnx", "fp32"), made("coreml", "fp32")
    assert onnx.bundle_bytes == 2 * coreml.bundle_bytes
    recurrent = 18 * 16 * 128 * 128
    # Caches have a multiple of 32 rows, 1536; a convolution on the Neural Engine keeps 32 inputs.
    assert coreml.state_bytes == 2 * (6 * 2 * 2 * 1536 * 256 + recurrent + 18 * 3 * 6144)
    assert made("coreml", "fp32", "--profile ane").state_bytes == coreml.state_bytes + 2 * 18 * 29 * 6144
    assert made("coreml", "fp32", "--state-layout explicit").state_bytes == coreml.state_bytes + 2 * recurrent
    four, palettes = made("coreml", "int4"), made("coreml", "int4", "--palettes --profile ane")
    assert made("coreml", "int4", "--palettes").bundle_bytes == four.bundle_bytes
    counts = {role.role: role.parameters for role in four.roles}
    assert palettes.bundle_bytes - four.bundle_bytes == (
        30 * (counts["decoder"] // 128) + 30 * (counts["linear_attention"] // 128)
    )
    assert four.peak_memory_bytes - made("onnx", "int4").peak_memory_bytes > 2 * sum(counts.values())
    nine = plan.make(spec_of("--target coreml --size 9b --checkpoint random"))
    assert nine.peak_memory_bytes < 16 * 2**30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no config.json; give the folder of a complete Qwen3.5 checkpoint"),
        ("{", r"config.json is not readable JSON"),
        ("[]", r"config.json holds a list; it must be a JSON object"),
        ('{"model_type": "llama"}', r"model_type 'llama'"),
    ],
)
def test_the_plan_refuses_a_strange_folder(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        plan.make(spec_of(f"{ONNX} tiny --checkpoint {tmp_path}"))


def test_the_plan_does_not_guess_a_foreign_hub_checkpoint() -> None:
    with pytest.raises(UsageError, match=r"cannot know the size of someone/else without downloading it"):
        plan.make(spec_of(f"{ONNX} tiny --checkpoint someone/else"))


def test_stages_are_recorded_whatever_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(json_lines=True)
    with reporter.stage("lower", total=10) as bar:
        bar.advance(10)
    reporter.notice("mtp.* is not exported yet")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["start", "end", "notice"]
    assert events[1]["stage"] == "lower" and events[1]["peak_bytes"] > 2**20
    quiet = Reporter(quiet=True)
    with pytest.raises(ExportError), quiet.stage("lower"):
        raise ExportError("stop")
    assert capsys.readouterr() == ("", "")
    assert "lower" in quiet.table() and quiet.as_json()[0]["stage"] == "lower"


def test_peak_memory_sees_what_a_stage_held() -> None:
    reporter = Reporter(quiet=True)
    with reporter.stage("before"):
        pass
    with reporter.stage("large"):
        block = bytearray(200 * 2**20)
        block[:: 4096] = b"x" * len(block[:: 4096])
        time.sleep(4 * SAMPLE_SECONDS)
        del block
    before, large = (stage.peak_bytes for stage in reporter.stages)
    assert large - before > 150 * 2**20


def test_relatives_of_the_family_go_by_a_name_of_their_own(tmp_path: Path) -> None:
    """The 27B, whose config only is needed: its width, depth and heads are in no table of this project."""
    config = json.loads(json.dumps(SIZES["9b"].config))
    config["text_config"] |= {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
        "linear_num_value_heads": 48, "layer_types": None,
    }  # fmt: skip
    config["vision_config"]["out_hidden_size"] = 5120
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan.make(spec_of(f"--target onnx --checkpoint {tmp_path}"))
    assert made.name == "qwen3.5-custom-onnx-int4-mlp" and made.num_layers == 64
    assert made.num_parameters == pytest.approx(27e9, rel=0.03)
    assert plan.make(spec_of(f"{ONNX} 27b --checkpoint {tmp_path}")).name == "qwen3.5-27b-onnx-int4-mlp"
    with pytest.raises(UsageError, match=r"--size 9b: .*hidden_size 5120, 9b has 4096; .*called custom\), or give it"):
        plan.make(spec_of(f"{ONNX} 9b --checkpoint {tmp_path}"))
    with pytest.raises(UsageError, match=r"--size 27B!: a size's name has small letters, digits, dots and dashes"):
        spec_of(f"{ONNX} 27B! --checkpoint {tmp_path}")


def test_the_size_of_a_published_hub_id_is_known_and_of_another_one_asked_for() -> None:
    assert spec_of("--target onnx --checkpoint Qwen/Qwen3.5-4B").size == "4b"
    assert spec_of("--target onnx --checkpoint Qwen/Qwen3.5-0.8B-Base").name == "qwen3.5-0.8b-base-onnx-int4-mlp"
    assert spec_of("--target onnx --checkpoint modelscope:Qwen/Qwen3.5-2B-Base").name == "qwen3.5-2b-base-onnx-int4-mlp"
    with pytest.raises(UsageError, match=r"--base: Qwen/Qwen3.5-2B is the instruct model; give Qwen/Qwen3.5-2B-Base"):
        spec_of("--target onnx --checkpoint Qwen/Qwen3.5-2B --base")
    with pytest.raises(UsageError, match=r"--size is missing: what me/tuned holds is only known after its download"):
        spec_of("--target onnx --checkpoint me/tuned")
    assert spec_of(f"{ONNX} custom --checkpoint me/tuned").size == "custom"


def test_a_dry_run_looks_at_the_adapter(tmp_path: Path) -> None:
    line = f"--target onnx --checkpoint {shipped_tiny()} --adapter"
    with pytest.raises(ExportError, match=r"--adapter .*absent: the folder has no adapter_config.json; give the"):
        plan.make(spec_of(f"{line} {tmp_path / 'absent'}"))
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 6, "use_dora": true}')
    with pytest.raises(ExportError, match=r"use_dora True; DoRA scales every merged row"):
        plan.make(spec_of(f"{line} {tmp_path}"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 6}')
    assert plan.make(spec_of(f"{line} {tmp_path}")).source.endswith(f"with the adapter {tmp_path.name} of rank 6")
