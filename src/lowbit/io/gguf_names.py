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
FACTORS = "rope_freqs.weight"
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


def _head(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary embedding's settings under the keys of transformers 5."""
    old = config.get("rope_scaling") or {}
    return config.get("rope_parameters") or {**old, "rope_type": old.get("rope_type", old.get("type", "default"))}


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 [head / 2] ("rope_freqs"), or None for plain ones.

    Llama 3's rule: wavelengths above the original context's are stretched by `factor`, short ones not, between them
    it passes over smoothly. Source: transformers 5.23 modeling_rope_utils.py, _compute_llama3_parameters.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head, low, high = _head(config), rope["low_freq_factor"], rope["high_freq_factor"]
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    frequency = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _rope_of(factors: Tensor | None, theta: float, head: int) -> dict[str, Any]:
    """The settings whose factors these are. Raises CheckpointError where they are none of Llama 3's."""
    plain = {"rope_type": "default", "rope_theta": theta}
    if factors is None or bool((factors == 1).all()):
        return plain
    scaled = {**plain, "rope_type": "llama3", "factor": round(float(factors.max()), 3), "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of every Llama 3 to 3.3
    expected = rope_factors({"rope_parameters": scaled, "head_dim": head})
    if expected is None or expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-3):
        raise CheckpointError("the GGUF file scales its rotary embeddings (rope_freqs) otherwise than Llama 3 does")
    return scaled


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's keys for a transformers config. Raises InputError for a family that is not written."""
    if config["model_type"] not in ARCHITECTURES:
        raise InputError(f"lowbit writes GGUF for {', '.join(ARCHITECTURES)}, not for {config['model_type']!r}")
    rope, head = _rope(config), _head(config)
    known = ("default", "llama3") if ARCHITECTURES[config["model_type"]] == "llama" else ("default",)
    if rope.get("rope_type", "default") not in known:
        raise InputError(
            f"lowbit writes GGUF of {config['model_type']} with rotary embeddings of type {' or '.join(known)}, not of "
            f"{rope['rope_type']!r}; use llama.cpp's convert_hf_to_gguf.py on a float checkpoint (lowbit convert "
            "--format float)"
        )
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


def config_of(metadata: Mapping[str, Any], has_output: bool, factors: Tensor | None = None) -> dict[str, Any]:
    """A transformers config out of a file's metadata and rope_freqs. Raises CheckpointError where a key is missing or
    no number, or for rotary embeddings that are scaled in a way that has no words here."""
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise CheckpointError(f"lowbit reads the GGUF families {', '.join(MODEL_TYPES)}, not {architecture!r}")

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            raise CheckpointError(f"the GGUF file's {architecture}.{name} is {value!r}; download it again")
        return value

    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "") or f"{architecture}.expert_count" in metadata:
        what = "experts" if scaling in ("none", "") else f"rotary embeddings scaled by {scaling!r}"
        raise CheckpointError(f"lowbit does not read GGUF files with {what} of the architecture {architecture!r}")
    heads, hidden = key("attention.head_count"), key("embedding_length")
    head = key("attention.key_length", hidden // heads)
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
        "head_dim": head,
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_of(factors, key("rope.freq_base", 10000.0), head),
        "tie_word_embeddings": not has_output,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
