"""Sources of weights: folders of safetensors, random weights, and the checks before any work."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoint import CheckpointError, open_checkpoint
from export.checkpoint.base import block_rows, check_finite
from export.checkpoint.check import MTP_NOTICE, check
from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.names import expected
from export.checkpoint.random import RandomCheckpoint
from export.checkpoint.shards import INDEX, SINGLE
from export.model.config import ConfigError, ModelConfig
from export.sizes import CUSTOM, SIZES, TINY, check_size, get_size, hub_id, shipped_tiny, size_of
from export.spec import ExportError, ExportSpec, UsageError
from runtime_tests.conftest import VARIANTS, variant

Tensors = dict[str, torch.Tensor]
Q = "model.language_model.layers.3.self_attn.q_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def random_tensors(config: dict[str, Any]) -> Tensors:
    random = RandomCheckpoint(config, seed=3)
    return {name: random.read(name).to(torch.bfloat16) for name in random.names()}


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, shards: int = 1) -> Path:
    """A checkpoint folder in the published form."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or variant()))
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return folder
    placed: dict[str, str] = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def whole_check(checkpoint: Any) -> list[str]:
    return check(checkpoint, checkpoint.model_config)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(variant())


# --- names and shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*VARIANTS, *(size for size in SIZES if size != TINY)])
def test_expected_names_and_shapes_are_those_of_transformers(name: str) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = VARIANTS.get(name) or get_size(name).config
    assert config is not None
    config = json.loads(json.dumps(config))
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    published = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:  # the state dict repeats a tied head, save_pretrained does not
        del published["lm_head.weight"]
    assert expected(ModelConfig.from_dict(config)) == published


# Published parameter counts, text and vision, without the mtp head; rounded names of the sizes.
@pytest.mark.parametrize(("size", "billions"), [("0.8b", 0.85), ("2b", 2.2), ("4b", 4.5), ("9b", 9.4)])
def test_sizes_have_their_number_of_parameters(size: str, billions: float) -> None:
    config = get_size(size).config
    assert config is not None
    count = sum(math.prod(shape) for shape in expected(ModelConfig.from_dict(config)).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.03)


def test_check_accepts_a_complete_checkpoint_and_reports_mtp(tmp_path: Path, tensors: Tensors) -> None:
    assert whole_check(FolderCheckpoint(write(tmp_path / "plain", tensors))) == []
    # A tied head stored as well is the embedding again: no error and no notice.
    repeated = {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}
    assert whole_check(FolderCheckpoint(write(tmp_path / "head", repeated))) == []
    with_mtp = {**tensors, "mtp.fc.weight": torch.zeros(2, 2), "mtp.norm.weight": torch.zeros(2)}
    assert whole_check(FolderCheckpoint(write(tmp_path / "mtp", with_mtp))) == [MTP_NOTICE]


def _without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (
        lambda t: _without(t, Q),
        rf"lacks {Q}; config.json implies this tensor, and it holds \d+ others: take weights",
    ),
    "under another name": (
        lambda t: {**_without(t, Q), Q.replace("q_proj", "query"): t[Q]},
        rf"lacks {Q}; config.json implies this tensor, and it holds .*layers.3.self_attn.query.weight instead: take",
    ),
    "fused": (
        lambda t: {**t, Q.replace("self_attn.q_proj", "linear_attn.in_proj_qkvz"): t[Q].clone()},
        r"holds .*in_proj_qkvz.weight: projections fused as in Qwen3-Next; convert it to the published Qwen3.5 names",
    ),
    "a classifier": (
        lambda t: {**t, "score.weight": torch.zeros(2, 128)},
        r"holds score.weight: a head that classifies or scores, not one that writes text; give a language model",
    ),
    "an adapter inside": (
        lambda t: {**t, Q.replace("weight", "lora_A.default.weight"): torch.zeros(8, 128)},
        r"holds .*lora_A.default.weight: an adapter that was not merged; merge the adapter in the training tool",
    ),
    "placeholder": (
        lambda t: {**t, EMBEDDING: torch.empty(0)},
        r"embed_tokens.weight has shape \[0\]; config.json implies \[64, 128\]: DeepSpeed ZeRO-3 leaves such",
    ),
    "resized": (
        lambda t: {**t, EMBEDDING: t[EMBEDDING][:60].clone()},
        r"has shape \[60, 128\]; config.json implies \[64, 128\]: correct vocab_size if the embedding was resized",
    ),
    "MLX": (
        lambda t: {n: v.transpose(1, 2).contiguous() if "conv1d" in n else v for n, v in t.items()},
        r"conv1d.weight has shape \[256, 4, 1\]; config.json implies \[256, 1, 4\]: MLX wrote it, with other norms",
    ),
    "many missing": (
        lambda t: {name: value for name, value in t.items() if ".mlp." not in name or "visual" in name},
        r"lacks .*mlp.* and 12 more; config.json implies these 15 tensors, and it holds \d+ others",
    ),
    "misshaped": (
        lambda t: {**t, Q: t[Q][:-1].clone()},
        rf"{Q} has shape \[511, 128\]; config.json implies \[512, 128\]",
    ),
    "transposed": (lambda t: {**t, Q: t[Q].T.contiguous()}, rf"{Q} has shape \[128, 512\]"),
    "unknown": (
        lambda t: {**t, Q.replace("weight", "bias"): torch.ones(512)},
        r"holds .*q_proj.bias, which no Qwen3.5 of this config.json has; use an unmodified checkpoint",
    ),
}


def test_a_quantised_tensor_is_refused_before_any_work(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path, {**tensors, Q: tensors[Q].to(torch.float8_e4m3fn)})
    message = rf"stores {Q} as F8_E4M3; BF16, F16, F32, F64 are read: use the checkpoint that was published in bfloat16"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint=str(tmp_path)))


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named_before_any_work(case: str, tmp_path: Path, tensors: Tensors) -> None:
    change, message = WRONG_TENSORS[case]
    write(tmp_path, change(tensors))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint=str(tmp_path)))


# --- folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folder_reads_what_safetensors_wrote(
    shards: int, dtype: torch.dtype, tmp_path: Path, tensors: Tensors
) -> None:
    stored = {name: value.to(dtype) for name, value in tensors.items()}
    folder = FolderCheckpoint(write(tmp_path, stored, shards=shards))
    assert folder.names() == sorted(stored)
    for name, value in stored.items():
        assert folder.shape(name) == tuple(value.shape)
        read = folder.read(name)
        assert read.dtype == torch.float32
        assert torch.equal(read, value.float())
    assert torch.equal(folder.read(Q, 7, 19), stored[Q][7:19].float())
    assert folder.read(Q, 5, 5).shape == (0, 128)


def test_folder_reads_only_the_bytes_of_the_rows(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FolderCheckpoint(write(tmp_path, tensors))
    counted: list[int] = []
    real_open = Path.open

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, offset: int) -> None:
            self.file.seek(offset)

        def readinto(self, buffer: memoryview) -> int:
            counted.append(len(buffer))
            return self.file.readinto(buffer[:1000])  # a short read must be continued

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Counting(real_open(self, *a, **k)))
    rows = folder.read(Q, 10, 20)
    assert torch.equal(rows, tensors[Q][10:20].float())
    assert counted == [2560, 1560, 560]  # 10 rows of 128 bfloat16, in reads of at most 1000 bytes


def test_folder_refuses_rows_and_names_it_does_not_have(tmp_path: Path, tensors: Tensors) -> None:
    folder = FolderCheckpoint(write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=rf"{Q}: rows 500 to 513 asked of 512; ask for rows within 0 to 512"):
        folder.read(Q, 500, 513)
    with pytest.raises(CheckpointError, match=r"has no tensor model.absent; a Qwen3.5 checkpoint with this"):
        folder.read("model.absent")


def test_folder_finds_sidecars_but_nothing_outside(tmp_path: Path, tensors: Tensors) -> None:
    folder = FolderCheckpoint(write(tmp_path / "in", tensors))
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert folder.sidecar("tokenizer.json") == tmp_path / "in" / "tokenizer.json"
    assert folder.sidecar("chat_template.jinja") is None
    assert folder.sidecar("../secret.json") is None


def test_content_key_follows_every_file(tmp_path: Path, tensors: Tensors) -> None:
    folder = FolderCheckpoint(write(tmp_path, tensors))
    key = folder.content_key()
    assert FolderCheckpoint(tmp_path).content_key() == key
    os.utime(tmp_path / SINGLE, ns=(1, 1))
    touched = folder.content_key()
    assert touched != key
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")  # a pruned hub cache leaves such links
    assert folder.content_key() not in (key, touched)


def _truncate(folder: Path, by: int = 100) -> None:
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - by)


def _header(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of model.safetensors and keep its data."""
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    changed = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])


def _index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**variant(), **fields}))


def _as_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _second_set_of_shards(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model-00004-of-00004.safetensors")


def _same_shard_twice(folder: Path) -> None:
    (folder / INDEX).unlink()
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model-00003-of-00003.safetensors")


SINGLE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, r"model.safetensors is truncated: its header describes \d+ bytes, the file has \d+"),
    "cut in the header": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:60]),
        r"is truncated or no safetensors file: its header claims \d+ bytes, the file has 60",
    ),
    "empty": (lambda f: (f / SINGLE).write_bytes(b""), r"truncated or no safetensors file: .* has 0"),
    "too long": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"x"),
        r"model.safetensors is too long",
    ),
    "no safetensors": (
        lambda f: (f / SINGLE).write_bytes(b"<!DOCTYPE html><html>not found</html>" * 9),
        r"no safetensors file: its header claims",
    ),
    "header not json": (
        lambda f: (f / SINGLE).write_bytes((5).to_bytes(8, "little") + b"{oops"),
        r"has a corrupt header \(JSONDecodeError",
    ),
    "header a list": (
        lambda f: (f / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]"),
        r"has a corrupt header",
    ),
    "offsets against shape": (
        lambda f: _header(f, lambda h: h[Q].update(shape=[512, 129])),
        rf"corrupt header \(ValueError: {Q} \[512, 129\] BF16 has bytes",
    ),
    "overlap": (
        lambda f: _header(
            f, lambda h: h[EMBEDDING].update(data_offsets=[n + 2 for n in h[EMBEDDING]["data_offsets"]])
        ),
        r"is corrupt: .* begins at byte \d+, the tensor before it ends at \d+",
    ),
    "negative shape": (
        lambda f: _header(f, lambda h: h[Q].update(shape=[-512, -128])),
        r"corrupt header \(ValueError",
    ),
    "pickle only": (
        _as_pickle,
        r"holds its weights as pickle \(pytorch_model.bin\); only safetensors are read",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), r"has no weights; model.safetensors or .*index.json"),
    "shards without index": (
        lambda f: (f / SINGLE).rename(f / "model-00001-of-00002.safetensors"),
        r"has 1 shards, no model.safetensors.index.json, and lacks model-00002-of-00002.safetensors; download",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json; give the folder of a complete"),
    "config not json": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json is not readable JSON .*; download it again",
    ),
    "config too deep": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        r"config.json is not readable JSON \(maximum recursion",
    ),
    "header too deep": (
        lambda f: (f / SINGLE).write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000),
        r"has a corrupt header \(RecursionError",
    ),
    "preprocessor not json": (
        lambda f: (f / "preprocessor_config.json").write_text("{'a': 1}"),
        r"preprocessor_config.json is not readable JSON .*; download it again",
    ),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config.json holds a list; it must be a JSON object",
    ),
    "pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs\noid sha256:0123\nsize 6759776\n"),
        r"model.safetensors is the pointer of a file in Git LFS \(\d+ bytes\), not the file: run `git lfs pull`",
    ),
    "llama.cpp": (
        lambda f: (f / SINGLE).rename(f / "model.gguf"),
        r"holds model.gguf, a model converted for llama.cpp; give the safetensors checkpoint",
    ),
    "another name": (
        lambda f: (f / SINGLE).rename(f / "weights.safetensors"),
        r"safetensors files \(weights.safetensors\) but neither model.safetensors nor .*index.json; give the file its",
    ),
    "byte order mark": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        r"config.json begins with a byte order mark, which JSON has not; save it as plain UTF-8",
    ),
    "two spellings": (
        lambda f: _header(f, lambda h: h.update({"module." + Q: h.pop("model.language_model.norm.weight")})),
        rf"holds .*{Q} and .*{Q}, which are both {Q}; keep one of them",
    ),
}

SHARD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, r"model-00001-of-00003.safetensors is truncated"),
    "absent": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"index.json names the shard model-00002-of-00003.safetensors \(\d+ tensors\), which is absent; download",
    ),
    "of two checkpoints": (
        _second_set_of_shards,
        r"has 4 shards, no model.safetensors.index.json, and lacks model-00001-of-00004.safetensors, model-00002",
    ),
    "one name twice": (
        _same_shard_twice,
        r"is in model-00001-of-00003.safetensors and in model-00003-of-00003.safetensors, and no index says which",
    ),
    "outside": (
        lambda f: _index(f, lambda m: m.update({Q: "../other/model.safetensors"})),
        r"names the shard '../other/model.safetensors'; shards must lie beside the index",
    ),
    "no map": (
        lambda f: (f / INDEX).write_text("{}"),
        r"has no weight_map of tensor to file name",
    ),
}


def _shown_damage(shards: int, case: str) -> tuple[Callable[[Path], object], str]:
    return (SINGLE_DAMAGE if shards == 1 else SHARD_DAMAGE)[case]


@pytest.mark.parametrize(
    ("shards", "case"), [*((1, case) for case in SINGLE_DAMAGE), *((3, case) for case in SHARD_DAMAGE)]
)
def test_a_damaged_folder_is_refused(shards: int, case: str, tmp_path: Path, tensors: Tensors) -> None:
    damage, message = _shown_damage(shards, case)
    write(tmp_path, tensors, shards=shards)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as raised:
        FolderCheckpoint(tmp_path)
    assert raised.value.exit_code == 1


def test_a_config_of_another_family_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path, tensors)
    _config(tmp_path, model_type="llama")
    with pytest.raises(ConfigError, match=r"model_type 'llama'; this project exports 'qwen3_5'"):
        FolderCheckpoint(tmp_path)


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path: Path, tensors: Tensors) -> None:
    folder = FolderCheckpoint(write(tmp_path, tensors))
    last = max(folder.names(), key=lambda name: folder._entries[name].begin)
    _truncate(tmp_path, by=1)
    with pytest.raises(CheckpointError, match=rf"ends inside {last}: it was changed or truncated while being read"):
        folder.read(last)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: No such file"):
        folder.read(last)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(math.nan, "NaN"), (math.inf, "an infinite value"), (-math.inf, "an infinite value")],
)
def test_weights_that_are_not_finite_are_named_with_their_row(
    value: float, kind: str, tmp_path: Path, tensors: Tensors
) -> None:
    damaged = tensors[Q].clone()
    damaged[37, 5] = value
    folder = FolderCheckpoint(write(tmp_path, {**tensors, Q: damaged}))
    assert folder.read(Q, 0, 37).isfinite().all()
    with pytest.raises(CheckpointError, match=rf"{Q} has {kind} in row 37; weights must be finite"):
        folder.read(Q, 30, 50)


def test_opposite_infinities_and_large_finite_values_are_told_apart() -> None:
    cancelling = torch.zeros(4, 8)
    cancelling[2, 0], cancelling[2, 1] = math.inf, -math.inf  # their sum is NaN, not infinite
    with pytest.raises(CheckpointError, match=r"w has an infinite value in row 12"):
        check_finite("w", cancelling, start=10)
    check_finite("w", torch.full((4, 8), 3e38))  # finite, although the sum overflows


# --- random weights -------------------------------------------------------------------------------------------


def test_random_rows_do_not_depend_on_how_they_are_read() -> None:
    config = get_size("0.8b").config
    assert config is not None
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    checkpoint = RandomCheckpoint(config, seed=5)
    whole = checkpoint.read(name)
    assert whole.shape == (3584, 1024) == checkpoint.shape(name)
    generator = torch.Generator().manual_seed(0)
    cuts = [0, *sorted(torch.randint(0, 3585, (12,), generator=generator).tolist()), 3584]
    fresh = RandomCheckpoint(config, seed=5)
    parts = [fresh.read(name, a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    # In reverse order too, so that nothing hangs on what was generated before.
    for a, b in reversed(list(itertools.pairwise(cuts))):
        assert torch.equal(fresh.read(name, a, b), whole[a:b])
    whole.zero_()  # a caller may work in place
    assert fresh.read(name, 0, 10).abs().sum() > 0


def test_random_weights_follow_seed_and_name_and_are_bfloat16() -> None:
    config = variant()
    one, two = RandomCheckpoint(config, seed=1), RandomCheckpoint(config, seed=2)
    assert torch.equal(one.read(Q), RandomCheckpoint(config, seed=1).read(Q))
    assert not torch.equal(one.read(Q), two.read(Q))
    k = Q.replace("q_proj", "k_proj")
    assert not torch.equal(one.read(Q, 0, 128), one.read(k))
    for name in one.names():
        values = one.read(name)
        assert torch.equal(values, values.to(torch.bfloat16).float()), name
        assert values.isfinite().all(), name
    assert one.content_key() != two.content_key()
    assert one.source == {"kind": "random", "id": "custom", "revision": None, "seed": 1}


def test_no_two_blocks_of_a_random_tensor_are_alike() -> None:
    config = get_size("0.8b").config
    assert config is not None
    rows = block_rows((248320, 1024))
    assert rows == 1024
    blocks = RandomCheckpoint(config, seed=0).read(EMBEDDING, 0, 3 * rows).split(rows)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        correlation = torch.corrcoef(torch.stack([blocks[a].flatten(), blocks[b].flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.005


def test_random_weights_have_the_scales_of_the_family() -> None:
    config = get_size("0.8b").config
    assert config is not None
    checkpoint = RandomCheckpoint(config, seed=0)
    layer = "model.language_model.layers.0"

    def moments(name: str) -> tuple[float, float]:
        values = checkpoint.read(name, 0, min(2048, checkpoint.shape(name)[0]))
        return float(values.mean()), float(values.std())

    assert moments(f"{layer}.mlp.down_proj.weight") == pytest.approx((0, 3584**-0.5), abs=2e-4)
    assert moments(f"{layer}.input_layernorm.weight") == pytest.approx((0, 0.05), abs=0.01)
    assert moments(f"{layer}.linear_attn.norm.weight") == pytest.approx((1, 0.05), abs=0.03)
    assert moments("model.visual.blocks.0.norm1.weight") == pytest.approx((1, 0.05), abs=0.02)
    assert moments(f"{layer}.linear_attn.conv1d.weight") == pytest.approx((0, 0.3), abs=0.02)
    decay = checkpoint.read(f"{layer}.linear_attn.A_log").exp()
    assert decay.min() > 0 and decay.max() <= 16.1
    step = torch.nn.functional.softplus(checkpoint.read(f"{layer}.linear_attn.dt_bias"))
    assert step.min() > 0.0009 and step.max() < 0.11


# --- sizes and opening ----------------------------------------------------------------------------------------


def test_unknown_sizes_and_hub_ids() -> None:
    assert hub_id("0.8b") == "Qwen/Qwen3.5-0.8B"
    assert hub_id("9b", base=True) == "Qwen/Qwen3.5-9B-Base"
    with pytest.raises(UsageError, match=r"--size 3b: unknown size; choose from tiny, 0.8b, 2b, 4b, 9b"):
        get_size("3b")
    with pytest.raises(UsageError, match=r"--size tiny: the tiny checkpoint is shipped .* no base variant"):
        hub_id(TINY, base=True)


def test_a_checkpoint_of_another_size_is_refused_with_field_and_remedy() -> None:
    small, large = get_size("0.8b").config, get_size("9b").config
    assert small is not None
    assert large is not None
    check_size("0.8b", small)
    message = r"--size 0.8b: the checkpoint has text_config.hidden_size 4096, 0.8b has 1024; leave out --size \(.* 9b\)"
    with pytest.raises(UsageError, match=message):
        check_size("0.8b", large)
    with pytest.raises(UsageError, match=r"--size tiny: .*hidden_size 4096, tiny has 128; .* called 9b\), or give"):
        check_size(TINY, large)
    with pytest.raises(UsageError, match=r"--size My Model: a size's name has small letters, digits, dots and dashes"):
        check_size("My Model", large)
    assert [size_of(row.config) for row in SIZES.values() if row.config] == ["0.8b", "2b", "4b", "9b"]
    assert size_of(FolderCheckpoint(shipped_tiny()).config) == TINY
    layers = json.loads(json.dumps(small))
    layers["text_config"]["num_hidden_layers"] = 20
    with pytest.raises(UsageError, match=r"text_config.num_hidden_layers 20, 0.8b has 24; .*is called custom\)"):
        check_size("0.8b", layers)
    check_size("my-20-layers", layers)
    resized = json.loads(json.dumps(small))
    resized["text_config"]["vocab_size"] = 248_400
    assert size_of(resized) == "0.8b", "a few added tokens do not make it another model"
    check_size("0.8b", resized)


def test_a_damaged_encoder_is_left_out_on_request(tmp_path: Path, tensors: Tensors) -> None:
    lost = "model.visual.blocks.0.attn.proj.bias"
    write(tmp_path, _without(tensors, lost))
    with pytest.raises(CheckpointError, match=rf"lacks {lost}; .*or leave the vision encoder out with --no-vision"):
        open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint=str(tmp_path)))
    assert open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint=str(tmp_path), vision=False)).notices == []


def test_opening_checks_the_size_of_a_folder(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path, tensors)
    assert open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint=str(tmp_path))).source["id"] == tmp_path.name
    with pytest.raises(UsageError, match=r"--size 2b: the checkpoint has text_config.hidden_size 128, 2b has 2048"):
        open_checkpoint(ExportSpec("onnx", "2b", checkpoint=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"absent/folder/x is not a folder; give a folder with config.json"):
        open_checkpoint(ExportSpec("onnx", CUSTOM, checkpoint="absent/folder/x"))


@pytest.mark.parametrize("size", [size for size in SIZES if size != TINY])
def test_random_opens_at_every_size_without_work(size: str) -> None:
    checkpoint = open_checkpoint(ExportSpec("onnx", size, checkpoint="random", seed=4))
    assert whole_check(checkpoint) == []
    assert checkpoint.source == {"kind": "random", "id": size, "revision": None, "seed": 4}
    assert checkpoint.sidecar("tokenizer.json") is None


def test_the_shipped_tiny_checkpoint_is_complete() -> None:
    checkpoint = open_checkpoint(ExportSpec("onnx", TINY))
    assert checkpoint.notices == []
    assert checkpoint.sidecar("tokenizer.json") is not None
    assert sum(file.stat().st_size for file in shipped_tiny().iterdir()) <= 16e6
    random = open_checkpoint(ExportSpec("onnx", TINY, checkpoint="random"))
    assert random.names() == checkpoint.names()
    assert random.sidecar("tokenizer.json") == checkpoint.sidecar("tokenizer.json")


def test_every_checkpoint_error_is_an_export_error() -> None:
    assert issubclass(CheckpointError, ExportError)
    assert CheckpointError.exit_code == 1
