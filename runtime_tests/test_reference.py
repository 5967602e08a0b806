"""L0 on random configs that vary every dimension: our modules against transformers fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint.weights import Weights
from export.model.positions import PositionCounter, PromptError, splice
from export.validate import metrics, reference
from export.validate.case import make_plan
from export.validate.probe import make_probe
from export.validate.replay import state_errors

LIMIT = 2e-5
SIZES = ((64, 96), (96, 64))


def sequence(checkpoint: Any, tokens: int) -> tuple[Any, np.ndarray]:
    probe = make_probe(checkpoint.model_config, tokens, SIZES)
    rows = reference.embed(checkpoint, probe.ids)
    images = reference.hf_vision(checkpoint, checkpoint.model_config, probe.images)
    return probe, splice(rows, probe.ids, 5, images)


def whole_model(checkpoint: Any, probe: Any) -> Any:
    """transformers' complete model on the probe, with its own positions and its own splice."""
    patches, grids = [], []
    for image in probe.images:
        pixels = torch.from_numpy(image)
        rows = torch.ops.mobile.patchify((pixels - 0.5) / 0.5, 16, 2)
        rows = rows.reshape(-1, 3, 1, 16, 16).expand(-1, 3, 2, 16, 16).reshape(len(rows), -1)
        patches.append(rows)
        grids.append([1, image.shape[1] // 16, image.shape[2] // 16])
    kinds = torch.tensor([[int(i == 5) for i in probe.ids]])
    with torch.no_grad():
        return checkpoint.hf(
            input_ids=torch.tensor([probe.ids]),
            pixel_values=torch.cat(patches),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=kinds,
        )


def test_streamed_reference_equals_the_whole_transformers_model(checkpoint: Any) -> None:
    probe, rows = sequence(checkpoint, 80)
    assert len(probe.images) == 2
    logits, _ = reference.hf_sequence(checkpoint, checkpoint.model_config, rows, probe.positions)
    expected = whole_model(checkpoint, probe).logits[0].numpy()
    assert metrics.relative(expected, logits) < LIMIT


def test_own_modules_equal_transformers_after_chunks_images_and_steps(checkpoint: Any) -> None:
    config, tokens = checkpoint.model_config, 140
    probe, rows = sequence(checkpoint, tokens)
    weights = Weights(checkpoint, config)
    plan = make_plan(tokens, (16, 64))
    chunked = sum(valid for length, valid in plan if length is not None)
    truth, states = reference.hf_sequence(checkpoint, config, rows, probe.positions, chunked)
    assert any(length and valid < length for length, valid in plan), "the plan must hold a padded chunk"
    own, own_states = reference.own_sequence(weights, rows, probe.positions, plan, tokens + 63)
    assert metrics.relative(truth, own) < LIMIT
    assert max(state_errors(config, states, own_states, tokens).values()) < LIMIT
    for image, expected in zip(probe.images, reference.hf_vision(checkpoint, config, probe.images), strict=True):
        assert metrics.relative(expected, reference.own_vision(weights, [image])[0]) < LIMIT


def test_512_decode_steps_do_not_drift(small: Any) -> None:
    probe = make_probe(small.model_config, 600, SIZES)
    _, rows = sequence(small, 600)
    truth, states = reference.hf_sequence(small, small.model_config, rows, probe.positions, 88)
    plan: list[tuple[int | None, int]] = [(64, 64), (64, 24), *[(None, 1)] * 512]
    own, own_states = reference.own_sequence(
        Weights(small, small.model_config), rows, probe.positions, plan, 700
    )
    assert metrics.relative(truth, own) < LIMIT
    assert max(state_errors(small.model_config, states, own_states, 600).values()) < LIMIT


@pytest.mark.parametrize(
    "layout", [[9, 9], [(2, 3)], [4, (2, 3), 5], [(3, 2), 2, (2, 2), 7, (2, 3)], [3, (1, 4), (4, 1), 2]]
)
def test_positions_equal_transformers(small: Any, layout: list[Any]) -> None:
    """Text, one image, several images, and turns: get_rope_index against our counter."""
    ids: list[int] = []
    grids = [item for item in layout if isinstance(item, tuple)]
    for item in layout:
        ids += [6, *[5] * (item[0] * item[1]), 7] if isinstance(item, tuple) else [9] * item
    kinds = torch.tensor([[int(i == 5) for i in ids]])
    grid = torch.tensor([[1, 2 * r, 2 * c] for r, c in grids]) if grids else None
    expected, _ = small.hf.model.get_rope_index(torch.tensor([ids]), kinds, image_grid_thw=grid)
    assert np.array_equal(PositionCounter().prompt(ids, 5, grids), expected[:, 0].numpy())
    half = len(ids) - 1  # a turn ends before the last token: positions continue where they stopped
    counter = PositionCounter()
    parts = [counter.prompt(ids[:half], 5, grids), counter.prompt(ids[half:], 5, [])]
    assert np.array_equal(np.concatenate(parts, axis=1), expected[:, 0].numpy())


def test_prompt_and_images_must_agree() -> None:
    with pytest.raises(PromptError, match="1 images were given but the prompt has places for 0"):
        PositionCounter().prompt([1, 2], 5, [(2, 2)])
    with pytest.raises(PromptError, match="more than the 0 images given"):
        PositionCounter().prompt([1, 5], 5, [])
    with pytest.raises(PromptError, match="image 0 has 6 tokens but the prompt leaves 4"):
        PositionCounter().prompt([5, 5, 5, 5, 1], 5, [(2, 3)])
    with pytest.raises(PromptError, match="bring 3 embedding rows but the prompt has 1 image tokens"):
        splice(np.zeros((2, 4), np.float32), [5, 1], 5, [np.zeros((3, 4), np.float32)])
