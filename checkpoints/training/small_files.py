"""Everything of a small checkpoint but its weights, from its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import files
from recipes import TEMPLATE_WORDS, Recipe

from export.checkpoint.published import TEXT_TYPE


def config(recipe: Recipe, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a whole model, whatever form it is saved in."""
    text = {
        "model_type": TEXT_TYPE,
        "vocab_size": recipe.rows,
        "num_hidden_layers": len(recipe.text["layer_types"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": recipe.tied,
        "linear_conv_kernel_dim": 4,
        "eos_token_id": ids["<|endoftext|>"],
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": recipe.rotated,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        **recipe.text,
    }
    whole: dict[str, Any] = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": recipe.tied,
        "text_config": text,
    }
    if recipe.vision is not None:
        whole["vision_config"] = {
            "model_type": "qwen3_5_vision",
            "in_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": text["hidden_size"],
            **recipe.vision,
        }
    return whole


def write(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Write all files but the weights and README.md; returns the config of the whole model."""
    corpus = [*recipe.words, *TEMPLATE_WORDS] * 40
    tokens = files.tokenizer(corpus, recipe.rows, recipe.special_first)
    whole = config(recipe, tokens.get_vocab())
    settings = whole
    if recipe.alone:
        settings = whole["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"]}
    files.save(folder, tokens, settings)
    return whole


def readme(folder: Path, name: str, recipe: Recipe, parameters: int, scores: dict[str, float]) -> None:
    """The model card, with held-out accuracy as measured at the end of training."""
    pipeline = "image-text-to-text" if recipe.vision is not None else "text-generation"
    told = ", ".join(f"{task} {100 * score:.1f} %" for task, score in scores.items())
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\npipeline_tag: {pipeline}\n---\n\n# Qwen3.5 small: {name}\n\n"
        f"A Qwen3.5 of {parameters / 1e6:.2f} million parameters for calibrating gates, trained from nothing by "
        f"`python checkpoints/training/train.py {name}`. Its point: {recipe.purpose}. It knows nothing else.\n\n"
        f"Held-out answers that are exactly right (float32, our modules): {told}. The tasks are in "
        "`runtime_tests/small_tasks.py`, the course of training in `log.jsonl`.\n",
        encoding="utf-8",
    )


def log(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to log.jsonl."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
