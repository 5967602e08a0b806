"""The forms in which a Qwen3.5 checkpoint reaches us, made from the shipped tiny one: published, fine-tuned, resaved.

A form is a function that rewrites a copy of the folder. `FORMS` are to be read rightly; what transformers makes of
the same folder is the truth, but for those of `OURS_ALONE`, whose spelling it does not read and whose function is
tiny's own. `REFUSED` are told apart by a sentence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from export.checkpoint.names import EMBEDDING, HEAD
from export.checkpoint.shards import INDEX, SINGLE
from export.sizes import shipped_tiny

Tensors = dict[str, torch.Tensor]
Form = Callable[[Path], None]


def copy_tiny(folder: Path) -> Path:
    """The shipped checkpoint without its training notes."""
    return Path(shutil.copytree(shipped_tiny(), folder))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply a change to the object in a JSON file, made if absent."""
    document = json.loads(path.read_text()) if path.exists() else {}
    change(document)
    path.write_text(json.dumps(document))


def edit_weights(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Rewrite model.safetensors; `change` edits the tensors in place or returns others."""
    tensors = load_file(folder / SINGLE)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / SINGLE, {"format": "pt"})


def config(**fields: Any) -> Form:
    """Set fields of config.json's top level; None removes."""

    def change(document: dict[str, Any]) -> None:
        document.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del document[name]

    return lambda folder: edit_json(folder / "config.json", change)


def text_config(**fields: Any) -> Form:
    """Set fields of text_config."""
    return lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(fields))


def renamed(rename: Callable[[str], str]) -> Form:
    """Give every tensor another name."""
    return lambda folder: edit_weights(folder, lambda t: {rename(name): value for name, value in t.items()})


def cast(dtype: torch.dtype) -> Form:
    return lambda folder: edit_weights(folder, lambda t: {name: value.to(dtype) for name, value in t.items()})


def no_vision(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if "visual" not in name}


def text_only(folder: Path) -> None:
    """What Qwen3_5ForCausalLM.save_pretrained writes."""
    edit_weights(folder, lambda t: {n.replace("language_model.", ""): v for n, v in no_vision(t).items()})
    document = json.loads((folder / "config.json").read_text())["text_config"]
    document |= {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "preprocessor_config.json").unlink()


def text_base(folder: Path) -> None:
    """What Qwen3_5TextModel.save_pretrained writes: names without any prefix."""
    text_only(folder)
    edit_weights(folder, lambda t: {name.removeprefix("model."): value for name, value in t.items()})


def vision_missing(folder: Path) -> None:
    """A text fine-tune that kept the whole config."""
    edit_weights(folder, no_vision)


def other_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].roll(1, 0).clone()


def untied(folder: Path, **flags: bool) -> None:
    """A head of its own, and what the two places of the flag say."""
    edit_weights(folder, other_head)
    config(tie_word_embeddings=flags["top"])(folder)
    text_config(tie_word_embeddings=flags["text"])(folder)


def same_head(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))


def head_alone(folder: Path) -> None:
    """A tied pair of which the head was saved."""
    edit_weights(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))


def resized(rows: int) -> Form:
    """What resize_token_embeddings leaves: rows added (the mean) or cut."""

    def change(folder: Path) -> None:
        def resize(tensors: Tensors) -> None:
            old = tensors[EMBEDDING]
            added = old.float().mean(0, keepdim=True).to(old.dtype).expand(max(0, rows - len(old)), -1)
            tensors[EMBEDDING] = torch.cat([old, added])[:rows].clone()

        edit_weights(folder, resize)
        text_config(vocab_size=rows)(folder)

    return change


def sharded(
    count: int,
    *,
    index: bool = True,
    stem: str = "model",
    edit: Callable[[dict[str, str]], object] = lambda m: None,
) -> Form:
    """Shards, with an index that `edit` makes stale, or without one."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names, placed = sorted(tensors), dict[str, str]()
        for i in range(count):
            file = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
            part = {name: tensors[name] for name in names[i::count]}
            save_file(part, folder / file, {"format": "pt"})
            placed |= dict.fromkeys(part, file)
        edit(placed)
        if index:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))

    return change


def pruned(folder: Path) -> None:
    """The first four of eight layers, as depth pruning leaves them."""
    edit_weights(folder, lambda t: {n: v for n, v in t.items() if not any(f"layers.{i}." in n for i in range(4, 8))})

    def cut(document: dict[str, Any]) -> None:
        text = document["text_config"]
        text |= {"num_hidden_layers": 4, "layer_types": text["layer_types"][:4]}

    edit_json(folder / "config.json", cut)


def extra(**tensors: torch.Tensor) -> Form:
    """Tensors that a tool wrote beside the model's; double underscores stand for dots."""
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return lambda folder: edit_weights(folder, lambda t: t.update(named))


def old_rope(scaling: dict[str, Any] | None) -> Form:
    """transformers 4 kept rope's values in text_config and the rest in rope_scaling."""

    def change(document: dict[str, Any]) -> None:
        text = document["text_config"]
        rope = text.pop("rope_parameters")
        # Not the defaults, which a reader that overlooks these places would take.
        text |= {"rope_theta": 20000.0, "partial_rotary_factor": 0.5}
        section = {"mrope_section": rope["mrope_section"], "mrope_interleaved": True}
        text["rope_scaling"] = None if scaling is None else {**scaling, **section}

    return lambda folder: edit_json(folder / "config.json", change)


def nulls(folder: Path) -> None:
    """Fields without a value, and fields of other tools."""
    text_config(
        pad_token_id=None, bos_token_id=None, rope_scaling=None, full_attention_interval=None, mlp_only_layers=[],
        mamba_ssm_dtype="float32", output_gate_type="swish",
    )(folder)  # fmt: skip


def pixels(**fields: Any) -> Form:
    return lambda folder: edit_json(folder / "preprocessor_config.json", lambda p: p.update(fields))


def processor_of_5(folder: Path) -> None:
    """transformers 5 writes one processor_config.json; here with a mean and a std of its own."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.26, 0.27]}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))


def no_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def only_end_of_text(folder: Path) -> None:
    edit_json(folder / "generation_config.json", lambda g: g.update(eos_token_id=392))


def old_tokenizer(folder: Path) -> None:
    """transformers 4: the template in tokenizer_config.json as one of two."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ messages[0].content }}"}]
    edit_json(folder / "tokenizer_config.json", lambda t: t.update(chat_template=named))


def trainer_files(folder: Path) -> None:
    """What a trainer leaves beside a checkpoint."""
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "trainer_state.json").write_text('{"loss": NaN}')


def both(*forms: Form) -> Form:
    def change(folder: Path) -> None:
        for form in forms:
            form(folder)

    return change


FORMS: dict[str, Form] = {
    "published": no_generation_config,
    "float32": cast(torch.float32),
    "float64": cast(torch.float64),
    "float16": cast(torch.float16),
    "text decoder alone": text_only,
    "text decoder without head": text_base,
    "vision tensors missing": vision_missing,
    "vision config null": both(
        vision_missing, lambda f: edit_json(f / "config.json", lambda c: c.update(vision_config=None))
    ),
    "vision config absent": both(vision_missing, config(vision_config=None)),
    "base model": renamed(lambda name: name.removeprefix("model.")),
    "tied head stored": same_head,
    "tied head differs": lambda folder: edit_weights(folder, other_head),
    "tied head alone": head_alone,
    "untied at the top": lambda folder: untied(folder, top=False, text=True),
    "untied in text_config": lambda folder: untied(folder, top=True, text=False),
    "untied": lambda folder: untied(folder, top=False, text=False),
    "449 rows": resized(449),
    "413 rows": resized(413),
    "412 rows": resized(412),
    "pruned depth": pruned,
    "one shard": sharded(1),
    "three shards": sharded(3, stem="model.safetensors"),
    "index with tensors that are gone": sharded(2, edit=lambda m: m.update({"mtp.norm.weight": m[EMBEDDING]})),
    "index that misses a tensor": sharded(2, edit=lambda m: m.pop("model.language_model.norm.weight")),
    "extra head": extra(mtp__norm__weight=torch.full((128,), float("nan"))),
    "old buffers": extra(model__language_model__rotary_emb__inv_freq=torch.ones(8)),
    "zero biases": extra(model__language_model__layers__3__self_attn__q_proj__bias=torch.zeros(512)),
    "rope of transformers 4": old_rope({"rope_type": "default", "type": "default"}),
    "rope without scaling": old_rope(None),
    "null fields": nulls,
    "own mean and std": pixels(image_mean=[0.48, 0.45, 0.40], image_std=[0.26, 0.26, 0.27]),
    "not normalised": pixels(do_normalize=False),
    "processor of transformers 5": processor_of_5,
    "stops at the end of text": only_end_of_text,
    "tokenizer of transformers 4": old_tokenizer,
    "trainer's folder": trainer_files,
}
OURS_ALONE: dict[str, Form] = {
    "PEFT's prefix": renamed(lambda name: "base_model.model." + name),
    "prefix of data parallel": renamed(lambda name: "module." + name),
    "prefix of torch.compile": renamed(lambda name: "_orig_mod." + name),
    "older prefixes": renamed(
        lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    ),
    "MLX's prefixes": renamed(
        lambda name: name.replace("model.language_model.", "language_model.model.").replace(
            "model.visual.", "vision_tower."
        )
    ),
    "encoder inside the decoder": renamed(
        lambda name: name.replace("model.visual.", "model.language_model.visual.")
    ),
    "shards without index": sharded(3, index=False),
    "shards of the other spelling without index": sharded(2, index=False, stem="model.safetensors"),
    "left-over quantisation config": config(quantization_config={"quant_method": "bitsandbytes"}),
}
REFUSED: dict[str, tuple[Form, str]] = {
    "untied without head": (
        config(tie_word_embeddings=False),
        r"lacks lm_head.weight; config.json implies this tensor, and it holds 165 others: it does not tie the head",
    ),
    "head of other rows": (
        lambda folder: edit_weights(folder, lambda t: t.update({HEAD: torch.zeros(400, 128)})),
        r"lm_head.weight has shape \[400, 128\]; config.json implies \[448, 128\]: save the model again",
    ),
    "placeholder of ZeRO-3": (
        lambda folder: edit_weights(folder, lambda t: t.update({HEAD: torch.empty(0)})),
        r"lm_head.weight has shape \[0\] \(DeepSpeed ZeRO-3 leaves such a placeholder\)",
    ),
    "classifier": (
        extra(score__weight=torch.ones(2, 128)),
        r"holds score.weight: a head that classifies or scores, not one that writes text; give a language model",
    ),
    "GPTQ": (
        extra(model__language_model__layers__0__mlp__up_proj__qweight=torch.zeros(16, 384, dtype=torch.int32)),
        r"up_proj.qweight: weights quantised by GPTQ or AWQ; use the checkpoint in bfloat16, from before",
    ),
    "FP8": (
        lambda folder: edit_weights(
            folder, lambda t: {n: v.to(torch.float8_e4m3fn) if "up_proj" in n else v for n, v in t.items()}
        ),
        r"up_proj.weight as F8_E4M3; BF16, F16, F32, F64 are read: use the checkpoint that was published in bfloat16",
    ),
    "bitsandbytes": (
        extra(model__language_model__layers__3__self_attn__o_proj__weight__absmax=torch.zeros(16)),
        r"o_proj.weight.absmax: weights quantised by bitsandbytes; use the checkpoint in bfloat16",
    ),
    "PEFT's wrappers": (
        extra(model__language_model__embed_tokens__modules_to_save__default__weight=torch.zeros(448, 128)),
        r"modules_to_save.default.weight: the wrappers of an adapter that was not merged; merge the adapter",
    ),
    "YaRN": (
        text_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        r"text_config.rope_scaling.rope_type 'yarn' \(it wins over rope_parameters beside it\)",
    ),
    "old name of YaRN": (
        old_rope({"type": "yarn", "factor": 4.0}),
        r"text_config.rope_scaling.rope_type 'yarn'",
    ),
    "adapter beside weights": (
        lambda folder: edit_json(folder / "adapter_config.json", lambda a: a.update(peft_type="LORA")),
        r"holds weights and an adapter that is not merged into them .* --adapter none leaves it out",
    ),
    "no stop token": (
        both(
            no_generation_config,
            text_config(eos_token_id=None),
            lambda folder: edit_json(folder / "tokenizer_config.json", lambda t: t.update(eos_token=None)),
            lambda folder: (folder / "chat_template.jinja").unlink(),
        ),
        r"no stop token is known: neither generation_config.json, config.json, the tokenizer nor the chat template",
    ),
}
