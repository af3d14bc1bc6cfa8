"""llama.cpp on our GGUF files: it loads them, and its greedy text agrees with ours; its own bytes of Q4_K and Q6_K.

    pip install --no-deps llama-cpp-python diskcache
    PYTHONPATH=src:tests:tests/io/formats python bench/interop/by_llama_cpp.py build/smollm2 bench/results

Writes llama_cpp.json: per format the first token at which llama.cpp's 32 greedy tokens leave ours (32: nowhere); how
much of each block's bytes, and what error, ggml_quantize_chunk gives on the same weights; whether its tokens of a
SentencePiece tokenizer are transformers'; and how far its logits are from ours under Llama 3's rotary factors and
without them.
"""

import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import Llama, llama_cpp
from test_gguf import checkpoint, pieces_tokenizer
from transformers import AutoTokenizer

import lowbit
from lowbit.io.conversion import Options
from lowbit.io.convert import convert
from lowbit.io.gguf_blocks import BY_NAME
from lowbit.io.gguf_encode import encode_floats
from lowbit.model.recipe import Recipe
from lowbit.options import Conditions, Gates
from lowbit.verbs import quantize

PROMPT = "The most important thing to know about the human heart is that"
TOKENS = 32


def k_blocks() -> dict[str, Any]:
    """Our bytes and ggml's of the same weights."""
    generator = np.random.default_rng(1)
    w = generator.standard_normal((64, 512)).astype(np.float32) * generator.random((64, 1), np.float32)
    library = ctypes.CDLL(next(str(path) for path in Path(llama_cpp.__file__).parent.rglob("libggml-base.so*")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    found = {}
    for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"):
        block = BY_NAME[name]
        theirs = np.zeros((64, 512 // block.size * block.bytes), np.uint8)
        pointer = w.ctypes.data_as(ctypes.c_void_p)
        library.ggml_quantize_chunk(
            block.id, pointer, theirs.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), ctypes.c_int64(64),
            ctypes.c_int64(512), None,
        )  # fmt: skip
        ours = encode_floats(w, block)
        errors = [float(np.linalg.norm(block.decode(octets) - w) / np.linalg.norm(w)) for octets in (ours, theirs)]
        found[name] = {"equal_bytes": float((ours == theirs).mean()), "error": errors[0], "error_ggml": errors[1]}
    return found


def agreement(model: Path, path: Path) -> dict[str, Any]:
    """Where llama.cpp's greedy continuation leaves ours, on the same file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    ours = lowbit.load(path, torch.float32).generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    own = ours[0, ids.shape[1] :].tolist()
    llama = Llama(str(path), n_ctx=256, verbose=False, n_threads=1, logits_all=False)
    prompt = llama.tokenize(PROMPT.encode(), add_bos=False, special=True)
    theirs = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0, top_k=1):
        theirs.append(token)
        if len(theirs) == TOKENS:
            break
    first = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), TOKENS)
    return {"prompt_tokens_equal": prompt == ids[0].tolist(), "agree": first, "text": tokenizer.decode(theirs)}


def pieces() -> dict[str, bool]:
    """Per text whether llama.cpp's tokens are those of the tokenizer.json that was written into the file."""
    found = {}
    for prepends in (True, False):
        with tempfile.TemporaryDirectory() as name:
            start = checkpoint(Path(name) / "start", "mistral", None, vocabulary=320)
            source = pieces_tokenizer(prepends)
            source.save_pretrained(start)
            convert(start, Path(name) / "m.gguf", "gguf-q8_0")
            llama = Llama(str(Path(name) / "m.gguf"), vocab_only=True, verbose=False)
            for text in ("the cat sat on that mat", "an \u00e9t\u00e9", "ratatat hath", "  two  spaces "):
                ids = llama.tokenize(text.encode(), add_bos=False, special=False)
                found[f"{text!r}, prepends {prepends}"] = ids == source(text, add_special_tokens=False).input_ids
    return found


@torch.no_grad()
def rotary() -> dict[str, float]:
    """Largest difference of logits to llama.cpp's over 200 tokens, relative to the largest logit."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    tokens = (torch.arange(200) * 7 % 100 + 1).view(1, -1)
    with tempfile.TemporaryDirectory() as name:
        start = checkpoint(Path(name) / "start", "llama", None)
        path = start / "config.json"
        plain = json.loads(path.read_text())
        path.write_text(json.dumps(plain | {"rope_parameters": rope}))
        convert(start, Path(name) / "m.gguf", "gguf-q8_0")
        llama = Llama(str(Path(name) / "m.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
        llama.eval(tokens[0].tolist())
        theirs = torch.from_numpy(llama.scores[:200].copy())
        scaled = lowbit.load(start, torch.float32)(tokens).logits[0]
        path.write_text(json.dumps(plain))
        unscaled = lowbit.load(start, torch.float32)(tokens).logits[0]
    return {
        key: float((logits - theirs).abs().max() / theirs.abs().max())
        for key, logits in (("with the factors", scaled), ("without", unscaled))
    }


def main(model: Path, out: Path) -> None:
    rows: dict[str, Any] = {"blocks": k_blocks(), "pieces": pieces(), "rotary": rotary(), "models": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text in ("w4a16-g32", "w8a16-g32"):
            conditions = Conditions(evaluation=None, gates=Gates(None))
            quantize(model, folder / text, Recipe.parse(f"rtn:{text}"), conditions)
            try:
                convert(folder / text, folder / f"{text}.gguf", "gguf")
            except lowbit.InputError as error:
                rows["models"][f"gguf of {text}"] = {"refused": str(error)}
                continue
            rows["models"][f"gguf of {text}"] = agreement(model, folder / f"{text}.gguf")
        for kind in ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k"):
            convert(model, folder / f"{kind}.gguf", f"gguf-{kind}", Options())
            rows["models"][f"gguf-{kind}"] = agreement(model, folder / f"{kind}.gguf")
    rows["versions"] = {name: version(name) for name in ("llama_cpp_python", "torch", "lowbit")}
    (out / "llama_cpp.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
