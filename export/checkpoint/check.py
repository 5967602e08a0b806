"""The check of a checkpoint's tensors against its config, before any work starts.

A tensor too few or of another shape is refused, and one too many as well: leaving out what the model was trained
with (a bias, an adapter, a head of another kind) gives wrong output. What is known to mean nothing is told and left.
"""

from __future__ import annotations

import re

from export.checkpoint.base import Checkpoint, CheckpointError
from export.checkpoint.names import EMBEDDING, HEAD, expected
from export.model.config import ModelConfig

MTP_NOTICE = "the checkpoint's multi-token-prediction head (mtp.*) is not exported yet"
PUBLICATION = "take weights and config.json from the same publication"
MERGE = "merge the adapter in the training tool (merge_and_unload, then save_pretrained)"
QUANTISED = "use the checkpoint in bfloat16, from before it was quantised: this project quantises itself"

BUFFERS = re.compile(r".*\.inv_freq")
"""Tables that older versions of transformers saved; they follow from config.json."""

FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r".*\.(qweight|qzeros|g_idx)", "weights quantised by GPTQ or AWQ", QUANTISED),
    (r".*\.(absmax|quant_map|nested_absmax|quant_state\..*)", "weights quantised by bitsandbytes", QUANTISED),
    (r".*(_scale_inv|\.weight_scale(_inv)?)", "weights quantised to FP8", QUANTISED),
    (r".*\.(weight_packed|weight_shape|weight_zero_point)", "weights quantised by compressed-tensors", QUANTISED),
    (r".*\.scales", "quantised weights", QUANTISED),
    (r".*\.lora_\w+.*", "an adapter that was not merged", MERGE),
    (r".*\.(modules_to_save|original_module)\..*", "the wrappers of an adapter that was not merged", MERGE),
    (
        r".*\.(in_proj_qkvz|in_proj_ba)\.weight",
        "projections fused as in Qwen3-Next",
        "convert it to the published Qwen3.5 names (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a)",
    ),
    (r".*\.experts\..*", "a mixture of experts", "this project exports the dense models of the family"),
    (
        r"(score|classifier|v_head|value_head)\..*",
        "a head that classifies or scores, not one that writes text",
        "give a language model",
    ),
)
"""(published name, what such a tensor is, remedy) of what other tools write."""


def check(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """Compare all names, shapes and dtypes with the config; `config` without vision asks for no encoder.

    Returns:
        Notices for the user: what the checkpoint holds that is known and not exported.

    Raises:
        CheckpointError: a missing, misshaped, quantised or unknown tensor.
    """
    wanted, found = expected(config), set(checkpoint.names())
    notices: list[str] = []
    extra = found - set(wanted) - {HEAD}  # a tied head may be stored as well
    if config.vision is None:
        extra = {name for name in extra if not name.startswith("model.visual.")}
    if any(name.startswith("mtp.") for name in extra):
        notices.append(MTP_NOTICE)
    unknown = sorted(name for name in extra if not name.startswith("mtp.") and not BUFFERS.fullmatch(name))
    for pattern, meaning, remedy in FOREIGN:
        foreign = [name for name in unknown if re.fullmatch(pattern, name)]
        if foreign:
            raise CheckpointError(f"the checkpoint holds {_listed(foreign)}: {meaning}; {remedy}")
    missing = sorted(set(wanted) - found)
    if missing:
        raise _missing(missing, unknown, found)
    for name, shape in wanted.items():
        _check_shape(name, checkpoint.shape(name), shape)
    silent = [name for name in unknown if _is_zero_bias(checkpoint, name, wanted)]
    if silent:
        notices.append(f"{_listed(silent)}: biases that are all zero, as the model without them is; left out")
    unknown = [name for name in unknown if name not in silent]
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds {_listed(unknown)}, which no Qwen3.5 of this config.json has; use an "
            "unmodified checkpoint, adapters merged and not quantised"
        )
    if checkpoint.config.get("quantization_config"):
        notices.append("config.json has a quantization_config, but the weights are plain numbers: it is ignored")
    return notices


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found == wanted:
        return
    rule = f"{name} has shape {list(found)}; config.json implies {list(wanted)}"
    if name.endswith("conv1d.weight") and found == (wanted[0], wanted[2], wanted[1]):
        raise CheckpointError(f"{rule}: MLX wrote it, with other norms too; give the checkpoint it was made from")
    if found == (0,):
        raise CheckpointError(
            f"{rule}: DeepSpeed ZeRO-3 leaves such placeholders; gather the weights when saving "
            "(stage3_gather_16bit_weights_on_model_save), or run zero_to_fp32"
        )
    if name == EMBEDDING and len(found) == 2 and found[1] == wanted[1]:
        raise CheckpointError(f"{rule}: correct vocab_size if the embedding was resized, else {PUBLICATION}")
    raise CheckpointError(f"{rule}: {PUBLICATION}")


def _missing(missing: list[str], unknown: list[str], found: set[str]) -> CheckpointError:
    """What is missing beside what is there: a person sees from the two which spelling or part it is."""
    there = f"it holds {_listed(unknown)} instead" if unknown else f"it holds {len(found)} others"
    what = "this tensor" if len(missing) == 1 else f"these {len(missing)} tensors"
    remedy = PUBLICATION
    if missing == [HEAD]:
        remedy = "it does not tie the head to the embedding: save the whole model, or set tie_word_embeddings to true"
    elif all(name.startswith("model.visual.") for name in missing):
        remedy = f"{PUBLICATION}, or leave the vision encoder out with --no-vision"
    return CheckpointError(
        f"the checkpoint lacks {_listed(missing)}; config.json implies {what}, and {there}: {remedy}"
    )


def _is_zero_bias(checkpoint: Checkpoint, name: str, wanted: dict[str, tuple[int, ...]]) -> bool:
    """A bias of zeros beside a known weight adds nothing; some frameworks write them."""
    weight = name.removesuffix("bias") + "weight"
    shape = checkpoint.shape(name)
    if not name.endswith(".bias") or weight not in wanted or shape != wanted[weight][:1]:
        return False
    return not bool(checkpoint.read(name).any())


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if name.isprintable() and name else ascii(name) for name in names[:3]) + rest
