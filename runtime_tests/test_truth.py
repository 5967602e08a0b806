"""L0's truth is transformers' own: a wrong reading of tying, positions, splicing, pictures or tensors fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from export.checkpoint.folder import FolderCheckpoint
from export.checkpoint.names import EMBEDDING, HEAD
from export.model.config import ConfigError, ModelConfig
from export.model.operators import ops
from export.model.positions import PositionCounter, splice
from export.quantize.recipe import Recipe
from export.sizes import shipped_tiny
from export.validate import ladder, metrics
from export.validate.case import Case, Rung
from export.validate.ladder import l0
from export.validate.transformers_model import (
    SPARE_BYTES,
    bytes_needed,
    head_tensor,
    hf_positions,
    hf_splice,
    pixels,
    whole_model,
)
from runtime_tests.conftest import MemoryCheckpoint, variant
from targets import load_target

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = shipped_tiny()
SIZES = [[64, 96], [96, 64]]
"""Not square: rows and columns must not be exchanged."""
Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def write(folder: Path, edit: Edit = lambda tensors, config: None) -> Path:
    """The tiny checkpoint with changed tensors or config; `edit` may return another config."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = edit(tensors, config) or config
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class Elsewhere(FolderCheckpoint):
    """The tiny checkpoint, which transformers is told to find in another folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(TINY)
        self.folder = folder


def make_case(checkpoint: Any, config: ModelConfig | None = None, layers: int | None = 4) -> Case:
    """Four layers hold both kinds; L0 reads no file of the bundle."""
    config = (config or checkpoint.model_config).truncated(layers)
    manifest = {"image_sizes": SIZES, "prefill_lengths": [16], "context_length": 64}
    return Case(
        checkpoint, config, Recipe.unquantised(), load_target("onnx"), Path("none"), manifest, 1, tokens=48
    )


def status(rung: Rung) -> dict[str, str]:
    return {c.name.removeprefix("L0."): c.status for c in rung.checks}


RIGHT = {
    "logits": "PASS",
    "states": "PASS",
    "vision": "PASS",
    "pictures_in_text": "RECORDED",
    "rounding": "PASS",
    "whole_model": "PASS",
}


# --- tying ----------------------------------------------------------------------------------------------------


def head(top: bool | None, text: bool | None, stored: str) -> Edit:
    """Flags of both levels (None: absent) and a stored head that is absent, the same, or differs."""

    def edit(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for section, flag in ((config, top), (config["text_config"], text)):
            section.pop("tie_word_embeddings")
            if flag is not None:
                section["tie_word_embeddings"] = flag
        if stored != "absent":
            tensors[HEAD] = tensors[EMBEDDING].roll(1 if stored == "differs" else 0, 0).clone()

    return edit


def alone(edit: Edit) -> Edit:
    """The text decoder saved alone: a flat config and names without language_model."""

    def flat(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
        edit(tensors, config)
        for name in list(tensors):
            tensor = tensors.pop(name)
            if "visual" not in name:
                tensors[name.replace("model.language_model.", "model.")] = tensor
        flat_config: dict[str, Any] = config["text_config"]
        return flat_config

    return flat


TYING: Mapping[str, tuple[Edit, str]] = {
    "as published": (head(True, True, "absent"), EMBEDDING),
    "tied, stored twice": (head(True, True, "same"), EMBEDDING),
    "said to be tied, differs": (head(True, True, "differs"), HEAD),
    "untied at the top only": (head(False, True, "differs"), HEAD),
    "untied at the top only, the same": (head(False, True, "same"), HEAD),
    "untied in the text only": (head(True, False, "differs"), HEAD),
    "untied in the text only, absent": (head(True, False, "absent"), EMBEDDING),
    "untied": (head(False, False, "differs"), HEAD),
    "no flag at the top": (head(None, True, "differs"), HEAD),
}


@pytest.mark.parametrize("name", list(TYING))
def test_the_head_is_the_tensor_that_transformers_takes(name: str, tmp_path: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    edit, expected = TYING[name]
    checkpoint = FolderCheckpoint(write(tmp_path / "edited", edit))
    assert head_tensor(checkpoint) == expected
    model = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight.detach(), checkpoint.read(expected))


@pytest.mark.parametrize(
    ("text", "stored", "expected"),
    [(True, "absent", EMBEDDING), (True, "differs", HEAD), (False, "differs", HEAD), (None, "differs", HEAD)],
)
def test_a_text_decoder_saved_alone_has_its_own_flag(
    text: bool | None, stored: str, expected: str, tmp_path: Path
) -> None:
    # The flag of the config that it was cut out of says the opposite.
    checkpoint = FolderCheckpoint(write(tmp_path / "alone", alone(head(not text, text, stored))))
    assert head_tensor(checkpoint) == expected
    assert checkpoint.model_config.text.tie_word_embeddings == (expected == EMBEDDING)


@pytest.mark.parametrize("name", ["said to be tied, differs", "untied at the top only"])
def test_l0_catches_a_wrong_reading_of_the_head(name: str, tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write(tmp_path / "edited", TYING[name][0]))
    config = checkpoint.model_config
    right = replace(config, text=replace(config.text, tie_word_embeddings=False))
    wrong = replace(config, text=replace(config.text, tie_word_embeddings=True))
    assert status(l0(make_case(checkpoint, right))) == RIGHT
    assert status(l0(make_case(checkpoint, wrong))) == RIGHT | {"logits": "FAIL"}


# --- positions, splicing, pictures ----------------------------------------------------------------------------


def late_text(self: PositionCounter, rows: int, columns: int) -> Any:
    """The text after a picture begins one position late."""
    found = IMAGE(self, rows, columns)
    self.next += 1
    return found


def exchanged(self: PositionCounter, rows: int, columns: int) -> Any:
    """Rows of a picture for its columns."""
    return IMAGE(self, rows, columns)[[0, 2, 1]]


IMAGE = PositionCounter.image


@pytest.mark.parametrize("wrong", [late_text, exchanged])
def test_l0_catches_wrong_positions(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PositionCounter, "image", wrong)
    assert status(l0(make_case(FolderCheckpoint(TINY)))) == RIGHT | {"logits": "FAIL", "states": "FAIL"}


@pytest.mark.parametrize("order", ["one row late", "pictures exchanged"])
def test_l0_catches_a_wrong_splice(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: Any, ids: Any, token: int, images: Any) -> Any:
        return splice(rows, [ids[-1], *ids[:-1]], token, images) if order == "one row late" else splice(
            rows, ids, token, images[::-1]
        )

    monkeypatch.setattr(ladder, "splice", wrong)
    assert status(l0(make_case(FolderCheckpoint(TINY)))) == RIGHT | {"logits": "FAIL", "states": "FAIL"}


def test_positions_rows_and_pixels_of_the_probe_equal_ours() -> None:
    case = make_case(FolderCheckpoint(TINY))
    probe, config = case.probe, case.config
    assert config.vision is not None
    seen = pixels(case.checkpoint, config, probe.images)
    assert seen.grid.tolist() == [[1, 4, 6], [1, 6, 4]]
    assert np.array_equal(case.true_positions, probe.positions)
    text = hf_positions(case.checkpoint, config, [1, 2, 3], None)
    assert text.tolist() == [[0, 1, 2]] * 3
    rows = np.zeros((48, 128), np.float32)
    images = [np.full((6, 128), number, np.float32) for number in (1, 2)]
    ours = splice(rows, probe.ids, config.image_token_id, images)
    assert np.array_equal(hf_splice(case.checkpoint, config, rows, probe.ids, images), ours)
    mean, std = list(config.vision.image_mean), list(config.vision.image_std)
    patches = [ops.patchify(ops.normalize_image(torch.from_numpy(i), mean, std), 16, 2) for i in probe.images]
    still = torch.cat(patches).reshape(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536)
    assert torch.equal(seen.values, still), "bytes give the same float32 values, unrounded"


@pytest.mark.parametrize("field", ["image_mean", "image_std"])
def test_l0_catches_another_mean_or_deviation_of_pictures(field: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "edited")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {field: [0.4, 0.5, 0.6]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    checkpoint = FolderCheckpoint(folder)
    config = checkpoint.model_config
    assert config.vision is not None
    usual: dict[str, Any] = {field: (0.5, 0.5, 0.5)}
    wrong = replace(config, vision=replace(config.vision, **usual))
    assert status(l0(make_case(checkpoint, wrong)))["vision"] == "FAIL"
    if field == "image_mean":
        assert status(l0(make_case(checkpoint))) == RIGHT


def test_l0_catches_settings_of_pictures_from_the_wrong_file(tmp_path: Path) -> None:
    """transformers takes processor_config.json first; its settings are taken from the folder by itself."""
    folder = write(tmp_path / "edited")
    other = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    first = {"image_processor": other | {"image_mean": [0.4, 0.5, 0.6]}}
    (folder / "processor_config.json").write_text(json.dumps(first), encoding="utf-8")
    checkpoint = FolderCheckpoint(folder)
    assert status(l0(make_case(checkpoint)))["vision"] == "PASS"
    checkpoint.preprocessor = other
    wrong = ModelConfig.from_dict(checkpoint.config, other)
    assert status(l0(make_case(checkpoint, wrong)))["vision"] == "FAIL"


def test_settings_of_pictures_that_transformers_refuses_are_an_error() -> None:
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4))
    checkpoint.preprocessor = {"image_mean": None, "image_std": [0.5] * 3}
    with pytest.raises(ConfigError, match=r"image processor's settings: transformers, .*, refuses them: .*image_mean"):
        pixels(checkpoint, checkpoint.model_config, [np.zeros((3, 32, 32), np.float32)])


def test_pictures_between_bytes_and_pictures_without_an_encoder_are_refused() -> None:
    checkpoint = FolderCheckpoint(TINY)
    with pytest.raises(ValueError, match="must hold multiples of 1/255"):
        pixels(checkpoint, checkpoint.model_config, [np.full((3, 32, 32), 0.3, np.float32) + 1e-3])
    with pytest.raises(ValueError, match="no vision encoder"):
        pixels(checkpoint, checkpoint.model_config.without_vision(), [np.zeros((3, 32, 32), np.float32)])


# --- the whole model ------------------------------------------------------------------------------------------


def test_the_whole_model_catches_what_both_streamed_sides_read_wrongly() -> None:
    class Permuted(FolderCheckpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            if name == "model.language_model.layers.0.linear_attn.in_proj_a.weight":
                return super().read(name).roll(1, 0)[start:stop]
            return super().read(name, start, stop)

    checkpoint = Permuted(TINY)
    assert status(l0(make_case(checkpoint))) == RIGHT | {"whole_model": "FAIL"}


def test_the_whole_model_is_loaded_from_the_folder(capfd: pytest.CaptureFixture[str]) -> None:
    case = make_case(FolderCheckpoint(TINY), layers=None)
    rung = l0(case)
    assert status(rung) == RIGHT
    assert rung.notes == [
        "L0.whole_model ran transformers' Qwen3_5ForConditionalGeneration as from_pretrained loads it from the "
        "checkpoint's folder."
    ]
    assert capfd.readouterr() == ("", ""), "no advice, no load report, no progress bar"
    assert transformers_logging.is_progress_bar_enabled()


def test_settings_of_a_quantiser_left_over_from_training_are_ignored(tmp_path: Path) -> None:
    def stale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    rung = l0(make_case(FolderCheckpoint(write(tmp_path / "edited", stale))))
    assert status(rung) == RIGHT
    assert rung.notes[0].endswith("as from_pretrained loads it from the checkpoint's folder.")


def unreadable(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = "model.language_model.norm.weight"
    tensors["another.norm.weight"] = tensors.pop(name)


def test_the_whole_model_is_filled_where_transformers_does_not_read_the_folder(tmp_path: Path) -> None:
    loaded = make_case(FolderCheckpoint(TINY)).whole.logits
    assert loaded is not None
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(TINY / "config.json", bare)
    reasons = {
        write(tmp_path / "renamed", unreadable): r"does not find model.language_model.norm.weight in the folder\.$",
        bare: r"because it cannot load the folder \(OSError\)\.$",
    }
    for folder, reason in reasons.items():
        found = make_case(Elsewhere(folder)).whole
        assert found.logits is not None and np.array_equal(found.logits, loaded)
        assert re.search(reason, found.note), found.note


def test_a_checkpoint_in_memory_fills_the_whole_model() -> None:
    checkpoint = MemoryCheckpoint(variant(num_hidden_layers=4, tied=False))
    case = make_case(checkpoint)
    seen = pixels(checkpoint, case.config, case.probe.images)
    ids = torch.tensor([case.probe.ids])
    with torch.inference_mode():
        expected = checkpoint.hf(
            input_ids=ids, pixel_values=seen.values, image_grid_thw=seen.grid, mm_token_type_ids=(ids == 5).int()
        ).logits[0]
    found = whole_model(checkpoint, case.config, case.probe.ids, case.probe.images)
    assert found.logits is not None
    # Another form of attention, and random weights that amplify its rounding: measured 1.3e-5.
    assert metrics.relative(expected.numpy(), found.logits) < 1e-4
    assert found.note.endswith("as this project reads them, because the checkpoint is no folder that it reads.")


@pytest.mark.parametrize("saved", ["alone", "with an encoder that the bundle leaves out"])
def test_a_model_without_pictures(saved: str, tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(
        write(tmp_path / "alone", alone(head(True, True, "absent"))) if saved == "alone" else TINY
    )
    case = make_case(checkpoint, checkpoint.model_config.without_vision())
    case.manifest = {**case.manifest, "image_sizes": []}
    rung = l0(case)
    assert status(rung) == {"logits": "PASS", "states": "PASS", "whole_model": "PASS", "rounding": "PASS"}
    name = "Qwen3_5ForCausalLM" if saved == "alone" else "Qwen3_5ForConditionalGeneration"
    assert rung.notes[0].startswith(f"L0.whole_model ran transformers' {name} as from_pretrained loads it")


def test_a_model_that_does_not_fit_is_left_out_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = FolderCheckpoint(TINY)
    needed = bytes_needed(checkpoint, checkpoint.model_config, 48)
    parameters = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    assert needed == 4 * (parameters + 512 * 512 + 48 * 448) + SPARE_BYTES
    free = psutil.virtual_memory()
    for available, there in ((needed - 1, False), (needed, True)):
        memory = free._replace(available=available)
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
            found = make_case(checkpoint, layers=None).whole
        assert (found.logits is not None) == there
        left_out = "L0.whole_model was left out: transformers' whole model takes 1.1 GB in float32 and 1.1 GB are free."
        assert (found.note == left_out) != there


def test_a_config_that_transformers_refuses_is_an_error(tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["text_config"]["max_position_embeddings"] = "many"

    checkpoint = Elsewhere(write(tmp_path / "edited", refused))
    with pytest.raises(ConfigError, match=r"transformers, which the bundle is compared with, refuses it: .*max_pos"):
        head_tensor(checkpoint)
