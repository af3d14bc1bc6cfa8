"""How llama.cpp names the tensors and settings of the Llama, Mistral and Qwen families, and where its rows stand.

In its "llama" architecture (Llama, Mistral) the rows of q and k are permuted within each head, because it rotates
neighbours where transformers rotates halves: row (h, j, half) here is row (h, half, j) there. A permutation of rows
moves codes and scales together, so it costs nothing and loses nothing.
Source: llama.cpp convert_hf_to_gguf.py (LlamaModel.permute), gguf-py constants.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> llama.cpp's
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_TO_GGUF = {name: key for key, name in (_OUTSIDE | _INSIDE).items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def to_transformers(name: str) -> str | None:
    """The name of llama.cpp's tensor in transformers, or None for one that has none."""
    if match := _BLOCK.fullmatch(name):
        inside = _INSIDE.get(match[2])
        return f"model.layers.{match[1]}.{inside}.{match[3]}" if inside else None
    stem, _, kind = name.rpartition(".")
    return f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE else None


def to_gguf(name: str) -> str:
    """The inverse. Raises InputError for a tensor that these families don't have."""
    match = _LAYER.fullmatch(name)
    stem, _, kind = name.rpartition(".")
    if match and match[2] in _TO_GGUF:
        return f"blk.{match[1]}.{_TO_GGUF[match[2]]}.{match[3]}"
    if stem in _TO_GGUF:
        return f"{_TO_GGUF[stem]}.{kind}"
    raise InputError(f"{name} has no name in GGUF's Llama, Mistral and Qwen families, so the model can't be written")


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """The heads within which llama.cpp permutes the rows of transformers' tensor `name`, or None."""
    if ARCHITECTURES.get(config["model_type"]) != "llama":
        return None
    if ".self_attn.q_proj." in name:
        return int(config["num_attention_heads"])
    if ".self_attn.k_proj." in name:
        return int(config["num_key_value_heads"])
    return None


def rows_to_gguf(rows: int, heads: int) -> Tensor:
    """Which of transformers' rows stands where in GGUF: int64 [rows]."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)  # [h, half, j] -> [h, j, half]


def rows_from_gguf(rows: int, heads: int) -> Tensor:
    """The inverse permutation."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's keys for a transformers config. Raises InputError for a family that is not written."""
    if config["model_type"] not in ARCHITECTURES:
        raise InputError(f"lowbit writes GGUF for {', '.join(ARCHITECTURES)}, not for {config['model_type']!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"lowbit writes GGUF with plain rotary embeddings, not with {rope['rope_type']!r}")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        context = min(context, window)  # llama.cpp's "llama" knows no window: up to here it makes no difference
    keys = {
        "context_length": context,
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "vocab_size": config["vocab_size"],
    }
    architecture = ARCHITECTURES[config["model_type"]]
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


def config_of(metadata: Mapping[str, Any], has_output: bool) -> dict[str, Any]:
    """A transformers config out of a file's metadata. Raises CheckpointError where a key is missing or no number."""
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise CheckpointError(f"lowbit reads the GGUF families {', '.join(MODEL_TYPES)}, not {architecture!r}")

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise CheckpointError(f"the GGUF file's {architecture}.{name} is {value!r}; download it again")
        return value

    heads, hidden = key("attention.head_count"), key("embedding_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "model_type": MODEL_TYPES[architecture],
        "architectures": [_CLASSES[architecture]],
        "vocab_size": len(tokens) if isinstance(tokens, list) else key("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": key("block_count"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": key("attention.key_length", hidden // heads),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)},
        "tie_word_embeddings": not has_output,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
