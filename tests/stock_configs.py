"""Tiny configurations of transformers' families, by model type: two SSM layers, in hybrids also attention."""

from importlib.util import find_spec
from typing import Any


ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2}
DELTA_NET = {
    **ATTENTION,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 2,
    "num_experts_per_tok": 2,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 1,
    "hc_count": 2,
    "hc_lowrank": 4,
}

LATENT_ATTENTION = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
KIMI_DELTA_NET = {
    **LATENT_ATTENTION,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}

COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SIZE_FIELDS = {
    "mamba": "state_size",
    "falcon_mamba": "state_size",
    "jamba": "mamba_d_state",
    "zamba": "mamba_d_state",
    "mamba2": "state_size",
    "bamba": "mamba_d_state",
    "zamba2": "mamba_d_state",
    "falcon_h1": "mamba_d_state",
    "granitemoehybrid": "mamba_d_state",
    "nemotron_h": "ssm_state_size",
    "qwen3_next": "linear_key_head_dim",
    "qwen3_5": "linear_key_head_dim",
    "qwen3_5_moe": "linear_key_head_dim",
    "qwen4_exp": "linear_key_head_dim",
    "lara_mini": "linear_key_head_dim",
    "olmo_hybrid": "linear_key_head_dim",
    "xlstm": "qk_dim_factor",
    "kimi_linear": "linear_head_dim",
    "bailing_hybrid": "head_dim",
    "minimax": "head_dim",
}
GROUP_FIELDS = {
    "mamba2": "n_groups",
    "bamba": "mamba_n_groups",
    "zamba2": "mamba_ngroups",
    "falcon_h1": "mamba_n_groups",
    "granitemoehybrid": "mamba_n_groups",
    "nemotron_h": "n_groups",
}
# The other way round than by default: no bias in the convolution, one in the projections.
OTHER_BIASES: dict[str, dict[str, bool]] = {
    "mamba": {"use_conv_bias": False, "use_bias": True},
    "falcon_mamba": {"use_conv_bias": False, "use_bias": True},
    "jamba": {"mamba_conv_bias": False, "mamba_proj_bias": True},
    "zamba": {"mamba_conv_bias": False, "mamba_proj_bias": True},
    "mamba2": {"use_conv_bias": False, "use_bias": True},
    "bamba": {"mamba_conv_bias": False, "mamba_proj_bias": True},
    "zamba2": {"add_bias_linear": True},  # its convolution always has a bias
    "falcon_h1": {"mamba_conv_bias": False, "mamba_proj_bias": True, "projectors_bias": True},
    "granitemoehybrid": {"mamba_conv_bias": False, "mamba_proj_bias": True},
    "nemotron_h": {"use_conv_bias": False, "use_bias": True},
}
# Stock Zamba2 and NemotronH clamp the time step of a whole sequence from below, and not that of a cached one.
UNCLAMPED: dict[str, dict[str, float]] = {"zamba2": {"time_step_min": 1e-9}, "nemotron_h": {"time_step_min": 1e-9}}
OWN: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "jamba": {
        **ATTENTION,
        "num_experts": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "zamba": {
        **ATTENTION,
        "num_key_value_heads": 2,
        "layers_block_type": ["hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "bamba": {**ATTENTION, **HEADS, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "zamba2": {
        **ATTENTION,
        "num_key_value_heads": 2,
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
        "num_mem_blocks": 1,
    },
    "falcon_h1": {**ATTENTION, **HEADS, "mamba_d_ssm": 32},
    "granitemoehybrid": {
        **ATTENTION,
        **HEADS,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_intermediate_size": 24,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    },
    "nemotron_h": {
        **ATTENTION,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mamba"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "qwen3_next": {**DELTA_NET, **EXPERTS, "decoder_sparse_step": 4},
    "qwen3_5": DELTA_NET,
    "qwen3_5_moe": {**DELTA_NET, **EXPERTS},
    "qwen4_exp": {**DELTA_NET, **EXPERTS, **INDEXER},
    "lara_mini": {**DELTA_NET, **EXPERTS, "tie_word_embeddings": True},
    "olmo_hybrid": DELTA_NET,
    "xlstm": {
        "hidden_size": 64,
        "num_heads": 64,
        "v_dim_factor": 4.0,
        "ffn_proj_factor": 1.0,
        "chunk_size": 16,
        "use_cache": False,  # its cache is overwritten in place, and then there are no gradients
    },
}
# Families whose stock layers have no state size of their own: their field is also the width of other things.
WITHOUT_SIZE: dict[str, dict[str, Any]] = {
    "kimi_linear": {**KIMI_DELTA_NET, "linear_num_heads": 2},
    "bailing_hybrid": KIMI_DELTA_NET,
    "minimax": {
        **ATTENTION,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "block_size": 8,
    },
}


# Delta rules by the name of their modeling file, with the model type of the causal language model. Where that needs
# more settings than a tiny model is worth, None: its function is that of the others.
DELTA: dict[str, str | None] = {
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": None,
    "lara_mini": "lara_mini",
    "olmo_hybrid": "olmo_hybrid",
    "kimi_linear": "kimi_linear",
    "bailing_hybrid": "bailing_hybrid",
    "glm5_next": None,
}


def is_there(family: str) -> bool:
    """Whether this version of transformers has the family; the oldest lacks some."""
    return find_spec(f"transformers.models.{family}") is not None


HAVE_FILES = [name for name in dict.fromkeys((*OWN, *DELTA)) if is_there(name) and name != "xlstm"]
CAUSAL_DELTA = [name for name in HAVE_FILES if DELTA.get(name) is not None]


def stock_settings(family: str, state_size: int) -> dict[str, Any]:
    """Keyword arguments of a family's configuration; with as many heads as channels, xLSTM's factor is the size."""
    size = float(state_size) if family == "xlstm" else state_size
    return {**COMMON, **{**OWN, **WITHOUT_SIZE}[family], SIZE_FIELDS[family]: size}
