"""The published tensor names and shapes that a config implies, and how other tools spell the names.

`expected` mirrors the state dict of transformers' Qwen3_5ForConditionalGeneration; a test compares both.
`canonical` turns the spelling of every known tool into that one.
"""

from __future__ import annotations

from export.model.config import LINEAR, ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
"""What PEFT, DistributedDataParallel and torch.compile put before every name of the model they wrap."""

PREFIXES: tuple[tuple[str, str], ...] = (
    # Qwen3_5ForConditionalGeneration, the published form; some trainers keep the encoder inside the decoder
    ("model.language_model.visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("lm_head.", "lm_head."),
    ("mtp.", "mtp."),
    # MLX and vLLM: the decoder is a model of its own
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.visual."),
    # Qwen3_5Model, saved without the head
    ("language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    # Qwen3_5ForCausalLM, and Qwen2-VL's older spelling
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    # Qwen3_5TextModel
    ("embed_tokens.", "model.language_model.embed_tokens."),
    ("layers.", "model.language_model.layers."),
    ("norm.", "model.language_model.norm."),
)
"""How a stored name begins -> how the published one does. The first row that fits counts."""


def canonical(name: str) -> str:
    """The published spelling of a tensor's name (or of a module's path with a closing dot); unknown ones stay."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            if name.startswith(wrapper):
                name, stripped = name[len(wrapper) :], True
    for stored, published in PREFIXES:
        if name.startswith(stored):
            return published + name[len(stored) :]
    return name


def expected(config: ModelConfig) -> dict[str, Shape]:
    """Published name -> shape of every tensor the exported model is made of."""
    names = _text(config.text)
    if config.vision is not None:
        names |= _vision(config.vision)
    return names


def _text(c: TextConfig) -> dict[str, Shape]:
    model = "model.language_model"
    names: dict[str, Shape] = {f"{model}.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for index, kind in enumerate(c.layer_types):
        layer = f"{model}.layers.{index}"
        names[f"{layer}.input_layernorm.weight"] = (c.hidden_size,)
        names |= _delta_net(f"{layer}.linear_attn", c) if kind == LINEAR else _attention(f"{layer}.self_attn", c)
        names[f"{layer}.post_attention_layernorm.weight"] = (c.hidden_size,)
        names[f"{layer}.mlp.gate_proj.weight"] = (c.intermediate_size, c.hidden_size)
        names[f"{layer}.mlp.up_proj.weight"] = (c.intermediate_size, c.hidden_size)
        names[f"{layer}.mlp.down_proj.weight"] = (c.hidden_size, c.intermediate_size)
    names[f"{model}.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        names[HEAD] = (c.vocab_size, c.hidden_size)
    return names


def _attention(prefix: str, c: TextConfig) -> dict[str, Shape]:
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        f"{prefix}.q_proj.weight": (2 * query, c.hidden_size),  # per head: query, then output gate
        f"{prefix}.k_proj.weight": (key, c.hidden_size),
        f"{prefix}.v_proj.weight": (key, c.hidden_size),
        f"{prefix}.o_proj.weight": (c.hidden_size, query),
        f"{prefix}.q_norm.weight": (c.head_dim,),
        f"{prefix}.k_norm.weight": (c.head_dim,),
    }


def _delta_net(prefix: str, c: TextConfig) -> dict[str, Shape]:
    return {
        f"{prefix}.in_proj_qkv.weight": (c.conv_dim, c.hidden_size),
        f"{prefix}.in_proj_z.weight": (c.linear_value_dim, c.hidden_size),
        f"{prefix}.in_proj_b.weight": (c.linear_num_value_heads, c.hidden_size),
        f"{prefix}.in_proj_a.weight": (c.linear_num_value_heads, c.hidden_size),
        f"{prefix}.conv1d.weight": (c.conv_dim, 1, c.linear_conv_kernel_dim),
        f"{prefix}.A_log": (c.linear_num_value_heads,),
        f"{prefix}.dt_bias": (c.linear_num_value_heads,),
        f"{prefix}.norm.weight": (c.linear_value_head_dim,),
        f"{prefix}.out_proj.weight": (c.hidden_size, c.linear_value_dim),
    }


def _vision(c: VisionConfig) -> dict[str, Shape]:
    model = "model.visual"
    width, merged = c.hidden_size, c.hidden_size * c.spatial_merge_size**2
    names: dict[str, Shape] = {
        f"{model}.patch_embed.proj.weight": (width, 3, c.temporal_patch_size, c.patch_size, c.patch_size),
        f"{model}.patch_embed.proj.bias": (width,),
        f"{model}.pos_embed.weight": (c.num_position_embeddings, width),
        f"{model}.merger.norm.weight": (width,),
        f"{model}.merger.norm.bias": (width,),
    }
    linears = {"merger.linear_fc1": (merged, merged), "merger.linear_fc2": (c.out_hidden_size, merged)}
    for index in range(c.depth):
        block = f"blocks.{index}"
        for norm in ("norm1", "norm2"):
            names[f"{model}.{block}.{norm}.weight"] = (width,)
            names[f"{model}.{block}.{norm}.bias"] = (width,)
        linears[f"{block}.attn.qkv"] = (3 * width, width)
        linears[f"{block}.attn.proj"] = (width, width)
        linears[f"{block}.mlp.linear_fc1"] = (c.intermediate_size, width)
        linears[f"{block}.mlp.linear_fc2"] = (width, c.intermediate_size)
    for linear, (rows, columns) in linears.items():
        names[f"{model}.{linear}.weight"] = (rows, columns)
        names[f"{model}.{linear}.bias"] = (rows,)
    return names
