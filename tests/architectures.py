"""Tiny randomly initialized causal language models, one per architecture, for tests that must not depend on one family.

Every model has a vocabulary of 128, a hidden size of 64, 2 to 4 blocks and weights from a seeded generator; it is in
float32, in eval mode, and built in well under a second. Weights that transformers initializes to zero or one (biases,
norms, sinks) get noise as well, so that a bias which is lost or a norm which is skipped changes the output.
"""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 16}  # where the default is not hidden_size / num_attention_heads
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# What differs from _SIZES, per model_type of transformers.
_CONFIGS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": _HEAD,
    "gemma2": {**_HEAD, "sliding_window": 8},
    "gemma3_text": {**_HEAD, "sliding_window": 8, "num_hidden_layers": 4, "layer_types": _SLIDING_THEN_FULL},
    "gemma3n_text": {
        **_HEAD,
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_THEN_FULL,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
        "sliding_window": 8,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "cohere2": {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": _SLIDING_THEN_FULL},
    "starcoder2": {"sliding_window": 8},
    "stablelm": {"use_parallel_residual": True},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {
        **_HEAD,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_HEAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": _SLIDING_THEN_FULL,
    },
    "deepseek_v3": {
        **_MLA,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama4_text": {
        **_HEAD,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
}


def tiny(model_type: str) -> PreTrainedModel:
    """The seeded tiny model of one architecture, in float32 and eval mode."""
    config = AutoConfig.for_model(model_type, **{**_SIZES, **_CONFIGS[model_type]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _builder(model_type: str) -> Callable[[], PreTrainedModel]:
    return lambda: tiny(model_type)


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(name) for name in _CONFIGS}
