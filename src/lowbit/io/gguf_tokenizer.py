"""tokenizer.json -> the tokenizer keys of a GGUF file, for two kinds of BPE.

    byte-level (Llama 3, Qwen, newer Mistral, GPT-2)
        tokenizer.ggml.model "gpt2", .pre the name of the splitting rule, .tokens, .token_type, .merges, special ids
    SentencePiece with bytes for what it lacks (Llama 1 and 2, Mistral 7B)
        tokenizer.ggml.model "llama", .tokens, .scores, .token_type, .add_space_prefix, special ids

llama.cpp knows splitting rules by name only, so the pre-tokenizer must be one that it has a name for; others are
refused, because a wrong rule gives other tokens without a word. Of SentencePiece's pieces it joins those with the best
score, where tokenizer.json joins by the order of its merges; so a piece's score is minus the place of its first merge.
"""

import json
import re
from pathlib import Path
from typing import Any

from lowbit.errors import InputError
from lowbit.io.source import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_IS_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # SentencePiece's sign for a space
# what the splitting rule's own pattern holds -> llama.cpp's name for it (src/llama-vocab.cpp)
_PATTERNS = {
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+": "tekken",
}


def tokenizer_keys(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The keys for the tokenizer of a model folder, filled up to `vocabulary` tokens.

    Raises InputError for a tokenizer that is none of both, or splits text by a rule without a name.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(
            f"lowbit writes GGUF for BPE tokenizers, not for the {model.get('type')} of {folder}; "
            "use llama.cpp's convert_hf_to_gguf.py on a float checkpoint (lowbit convert --format float)"
        )
    by_id = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, _NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        keys["tokenizer.ggml.add_space_prefix"] = _begins_with_space(tokenizer, folder)
        keys["tokenizer.ggml.scores"] = _scores(model, tokens)
        kinds |= {number: _BYTE for number, token in by_id.items() if _IS_BYTE.fullmatch(token)}
        kinds |= {number: _UNKNOWN for number, token in by_id.items() if token == model.get("unk_token")}
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": merges}
        keys["tokenizer.ggml.pre"] = _rule_name(tokenizer.get("pre_tokenizer") or {}, folder)
    keys["tokenizer.ggml.token_type"] = [kinds.get(number, _UNUSED) for number in range(vocabulary)]
    return keys | _special(folder, by_id) | _template(folder)


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece's score of each piece: the earlier its merge, the better; 0 for what no merge makes."""
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        places.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
    return [-float(places.get(token, 0)) for token in tokens]


def _begins_with_space(tokenizer: dict[str, Any], folder: Path) -> bool:
    """Whether a space is put before every text. Raises InputError for a rule that SentencePiece does not have."""
    normalizer, rule = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers") or ([normalizer] if normalizer else [])
    kinds = [step.get("type") for step in steps]
    if not rule and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend"
    if not steps and rule.get("type") == "Metaspace" and rule.get("replacement") == _SPACE and not rule.get("split"):
        return rule.get("prepend_scheme") != "never"
    raise InputError(
        f"the tokenizer of {folder} has bytes for what it lacks, but not SentencePiece's rule for spaces: "
        f"{str(normalizer)[:100]}, {str(rule)[:100]}"
    )


def _rule_name(rule: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for the way that text is split."""
    steps = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        for part, name in _PATTERNS.items():
            if part in pattern:
                return name
    raise InputError(
        f"the tokenizer of {folder} splits text by a rule that llama.cpp has no name for: {str(rule)[:200]}"
    )


def _special(folder: Path, by_id: dict[int, str]) -> dict[str, Any]:
    """The numbers of the special tokens, and whether texts begin with one."""
    config, keys = read_json(folder / "config.json"), {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = config.get(f"{ours}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number in by_id:
            keys[f"tokenizer.ggml.{theirs}_token_id"] = number
    return keys | {"tokenizer.ggml.add_bos_token": _adds_bos(folder, by_id)}


def _adds_bos(folder: Path, by_id: dict[int, str]) -> bool:
    """Whether the post-processor begins every text with a special token."""
    processor = json.dumps(read_json(folder / "tokenizer.json").get("post_processor") or {})
    single = json.loads(processor).get("single") or []
    nested = [step.get("single") for step in json.loads(processor).get("processors") or [] if step.get("single")]
    first = (single or (nested[0] if nested else [None]))[0]
    return isinstance(first, dict) and "SpecialToken" in first


def _template(folder: Path) -> dict[str, str]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"tokenizer.chat_template": path.read_text(encoding="utf-8")}
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
