"""Twins: transformers answers the same on source and twin, and the activations are those of trained large models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from export.checkpoint import Checkpoint, open_checkpoint
from export.sizes import CUSTOM, shipped_tiny
from export.spec import ExportSpec
from export.validate.metrics import relative
from export.validate.probe import Probe
from export.validate.transformers_model import whole_model
from runtime_tests import forms, twins
from runtime_tests.activations import Statistics, axes, known_text, statistics
from runtime_tests.conftest import MemoryCheckpoint, variant

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "streams": {"stream": 1024, "vision_stream": 64},
    "outliers": {"outliers": 32, "mlp_outliers": 32},
    "concentrate": {"concentrate": True},
    "all": {"stream": 1024, "vision_stream": 64, "outliers": 32, "mlp_outliers": 32, "concentrate": True},
}
SAME = 2e-5
"""Largest difference of logits over the largest logit, transformers in float32 on source and twin."""


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ExportSpec(target="onnx", size=CUSTOM, checkpoint=str(folder)))


def answers(checkpoint: Checkpoint, probe: Probe) -> NDArray[np.float32]:
    """Logits [T, V] of transformers' whole model in float32."""
    logits = whole_model(checkpoint, checkpoint.model_config, probe.ids, probe.images).logits
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def tiny() -> tuple[Probe, NDArray[np.float32], Statistics]:
    source = opened(shipped_tiny())
    probe, _ = known_text(source)
    return probe, answers(source, probe), statistics(source)


@pytest.fixture(scope="module")
def twin_of_tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("twin")
    return request.param, twins.write(shipped_tiny(), folder, **KINDS[request.param])


@pytest.mark.parametrize("twin_of_tiny", KINDS, indirect=True)
def test_transformers_answers_tiny_and_its_twin_alike(twin_of_tiny: tuple[str, Path], tiny: Any) -> None:
    probe, right, _ = tiny
    found = answers(opened(twin_of_tiny[1]), probe)
    assert len(probe.images) == 2
    assert relative(right, found) <= SAME
    assert (found.argmax(-1) == right.argmax(-1)).all()


def test_one_matrix_forgotten_is_seen(tiny: Any, tmp_path: Path) -> None:
    """What the comparison is worth: the merger does not follow the text stream."""
    folder = twins.write(shipped_tiny(), tmp_path, stream=1024)
    probe, right, _ = tiny

    def forget(tensors: forms.Tensors) -> None:
        tensors["model.visual.merger.linear_fc2.weight"] /= 1024

    forms.edit_weights(folder, forget)
    assert relative(right, answers(opened(folder), probe)) > 0.05


def test_statistics_are_there(tiny: Any, tmp_path: Path) -> None:
    """The same text and pictures through the twin of all kinds; tiny's own stream has no outstanding channel."""
    *_, source = tiny
    assert (source.channel_ratio < 2, source.energy_in_4 < 0.08, source.delimiter_peak < 25) == (True, True, True)
    folder = twins.write(shipped_tiny(), tmp_path, **KINDS["all"])
    twin = statistics(opened(folder))
    assert twin.channel_ratio > 15  # 16.9, from 1.7
    assert twin.energy_in_4 > 0.45  # 0.48, from 0.07
    assert twin.delimiter_peak > 300  # 312, from 21
    assert twin.delimiters_lead > 0.65  # 12 of 17; the last layers write the answer's digits as loudly
    assert twin.norm_ratio > 200  # 224, from 3.5
    assert twin.mlp_ratio > 2.9 * source.mlp_ratio  # 309, from 103
    assert 60_000 < 1024 * source.peak < twin.peak  # 300,000: beyond float16
    # 64 times but for vision's epsilon, which is 1e-6 of patches that are almost black.
    assert twin.vision_peak == pytest.approx(64 * source.vision_peak, rel=1e-5)


def test_channels_are_those_that_were_asked_for(tmp_path: Path) -> None:
    """Of the norm and the MLP alone: so many channels, all others as before."""
    source = opened(shipped_tiny())
    tensors = load_file(twins.write(source, tmp_path, outliers=32, mlp_outliers=8, channels=3) / "model.safetensors")
    layer = "model.language_model.layers.3"
    before, after = 1 + source.read(f"{layer}.input_layernorm.weight"), 1 + tensors[f"{layer}.input_layernorm.weight"]
    assert (after / before).round(decimals=4).unique(return_counts=True)[1].tolist() == [125, 3]
    down = tensors[f"{layer}.mlp.down_proj.weight"] / source.read(f"{layer}.mlp.down_proj.weight")
    assert (down.nanmedian(0).values == 1 / 8).sum() == 3
    merger = tensors["model.visual.merger.linear_fc1.weight"] / source.read("model.visual.merger.linear_fc1.weight")
    assert (merger.nanmedian(0).values == 1 / 32).sum() == 4 * 3


def test_transformers_answers_a_random_model_and_its_twins_alike(tmp_path: Path) -> None:
    """Random models amplify every rounding, and their stream of 0.1 feels the epsilon of the norms."""
    source = MemoryCheckpoint(variant(linear_num_key_heads=4, tied=False, num_hidden_layers=4))
    probe, _ = known_text(source)
    right = answers(source, probe)
    found = {
        kind: relative(right, answers(opened(twins.write(source, tmp_path / kind, **options)), probe))
        for kind, options in KINDS.items()
    }
    assert found["outliers"] <= 2e-5  # 7e-6
    assert found["concentrate"] <= 1e-4  # 4e-5
    assert max(found["streams"], found["all"]) <= 1e-3  # 5e-4


def test_a_scaled_stream_is_exact_where_epsilon_is_negligible(tmp_path: Path) -> None:
    """Powers of two commute with every rounding, so that not a bit of the logits changes."""
    source = MemoryCheckpoint(variant(rms_norm_eps=1e-20, num_hidden_layers=4))
    probe, _ = known_text(source)
    twin = opened(twins.write(source, tmp_path, stream=2.0**-6))
    assert np.array_equal(answers(source, probe), answers(twin, probe))


def test_axes_are_orthogonal_and_find_what_was_planted() -> None:
    """The embedding gets a random direction hundreds of times as large as itself: one channel has it afterwards."""
    source = MemoryCheckpoint(variant(num_hidden_layers=4))
    embedding = source.tensors["model.language_model.embed_tokens.weight"]
    direction = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(1)), dim=0)
    embedding += 300 * embedding.norm(dim=1, keepdim=True) * direction
    basis = axes(source)
    assert torch.allclose(basis.T @ basis, torch.eye(128, dtype=torch.float64), atol=1e-12)
    assert (direction.double() @ basis).abs().max() > 0.99


def test_a_decoder_alone_stays_one(tiny: Any, tmp_path: Path) -> None:
    """What Qwen3_5ForCausalLM saves becomes a twin that the same class loads."""
    source = forms.copy_tiny(tmp_path / "source")
    forms.text_only(source)
    twin = opened(twins.write(source, tmp_path / "twin", **KINDS["all"]))
    assert twin.model_config.vision is None
    probe, _ = known_text(opened(source))
    whole = whole_model(twin, twin.model_config, probe.ids, [])
    assert whole.logits is not None and "Qwen3_5ForCausalLM as from_pretrained loads it" in whole.note
    assert relative(answers(opened(source), probe), whole.logits) <= SAME


SPELLINGS: dict[str, forms.Form] = {
    "shards": forms.sharded(3),
    "MLX's prefixes": forms.OURS_ALONE["MLX's prefixes"],
    "head saved alone": forms.head_alone,
    "head stored too": forms.same_head,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.write(shipped_tiny(), tmp_path_factory.mktemp("plain") / "twin")


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_published_one(name: str, plain: Path, tmp_path: Path) -> None:
    folder = forms.copy_tiny(tmp_path / "source")
    SPELLINGS[name](folder)
    found, wanted = (load_file(f / "model.safetensors") for f in (twins.write(folder, tmp_path / "twin"), plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_files_of_a_plain_twin(plain: Path) -> None:
    tiny = shipped_tiny()
    assert {f.name for f in plain.iterdir()} == {f.name for f in tiny.iterdir()}
    assert (plain / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    tensors = load_file(plain / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    source = opened(tiny)
    assert tensors.keys() - set(source.names()) == {"lm_head.weight"}
    assert all(torch.equal(source.read(name), tensors[name]) for name in source.names())
    document, wanted = (json.loads((f / "config.json").read_text()) for f in (plain, tiny))
    wanted["tie_word_embeddings"] = wanted["text_config"]["tie_word_embeddings"] = False
    wanted["text_config"]["dtype"] = "float32"
    assert document == wanted


def test_an_own_head_is_kept(tmp_path: Path) -> None:
    folder = forms.copy_tiny(tmp_path / "source")
    forms.untied(folder, top=False, text=False)
    found = load_file(twins.write(folder, tmp_path / "twin", stream=4) / "model.safetensors")
    source = opened(folder)
    assert torch.equal(found["lm_head.weight"], source.read("lm_head.weight"))
    name = "model.language_model.embed_tokens.weight"
    assert torch.equal(found[name], 4 * source.read(name))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"stream": 1000}, r"stream 1000: only a power of two rounds no weight; give such as 1024"),
        ({"vision_stream": -2.0}, r"vision_stream -2.0: only a power of two"),
        ({"outliers": 0.0}, r"outliers 0.0: a channel is scaled back by 1 / factor; give a finite one above 0"),
        ({"mlp_outliers": float("inf")}, r"mlp_outliers inf: a channel is scaled back"),
        ({"channels": 65}, r"channels 65: the narrowest norm has 64; give 0 to 64"),
    ],
)
def test_what_would_not_preserve_the_function_is_refused(kinds: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(twins.TwinError, match=message):
        twins.write(shipped_tiny(), tmp_path / "twin", **kinds)
    assert not (tmp_path / "twin").exists()


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(twins.TwinError, match=r"is not empty; give a new folder"):
        twins.write(shipped_tiny(), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["note.txt"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins.main([str(shipped_tiny()), str(tmp_path / "twin"), "--stream", "8", "--vision-stream", "2"])
    told = json.loads(capsys.readouterr().out)
    assert told["twin"]["peak"] == pytest.approx(8 * told["source"]["peak"], rel=1e-4)
    assert told["twin"]["vision_peak"] == pytest.approx(2 * told["source"]["vision_peak"], rel=1e-4)
