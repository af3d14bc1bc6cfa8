"""Opening a published-size checkpoint: memory and speed of convert and inspect on the shapes of Llama-3-8B in 4 bits.

    PYTHONPATH=src python bench/interop/open_8b.py WORK OUT

Makes WORK/source (GPTQ, groups of 128, random codes, four shards), then times `cp`, `lowbit convert` to compressed-tensors
with and without the second decoding, to AWQ, and `lowbit inspect`, each in a process of its own with the page cache
emptied first where that is allowed. MB/s counts the source's bytes once. Writes OUT/open_8b.json.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.io.tensorfile import TensorWriter, header_bound

HIDDEN, INNER, KEYS, LAYERS, VOCABULARY, GROUP = 4096, 14336, 1024, 32, 128256, 128
LINEARS = {
    **{"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN)},
    **{"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)},
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "float16"},
    **{"intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "quantization_config": {
        **{"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        "checkpoint_format": "gptq",
    },
}


def tensors(layers: range) -> Iterator[tuple[str, Tensor]]:
    for layer in layers:
        for name, (rows, columns) in LINEARS.items():
            module, groups = f"model.layers.{layer}.{name}", columns // GROUP
            yield f"{module}.qweight", torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32)
            yield f"{module}.qzeros", torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
            yield f"{module}.scales", torch.rand(groups, rows).half() * 0.01
            yield f"{module}.g_idx", torch.arange(columns, dtype=torch.int32) // GROUP
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(HIDDEN).half()


def outside() -> Iterator[tuple[str, Tensor]]:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float16)
    yield "model.norm.weight", torch.ones(HIDDEN).half()


def make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    parts = [tensors(range(start, start + LAYERS // 4)) for start in range(0, LAYERS, LAYERS // 4)]
    for index, part in enumerate([*parts, outside()]):
        shard = f"model-{index + 1:05d}-of-00005.safetensors"
        with TensorWriter(folder / shard, header_bound(["x" * 60] * 400)) as writer:
            for name, tensor in part:
                writer.add(name, tensor)
                weight_map[name] = shard
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def empty_cache() -> bool:
    """Whether the page cache could be emptied."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(command: list[str], size: int) -> dict[str, Any]:
    """Seconds (with sync), peak memory and MB/s of a process."""
    emptied, started = empty_cache(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command} ended with {status}")
    row = {"seconds": round(seconds, 1), "MB_per_s": round(size / seconds / 1e6, 1), "cache_emptied": emptied}
    return row | {
        "peak_MB": round(usage.ru_maxrss * 1024 / 1e6),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def main(work: Path, out: Path) -> None:
    source, target = work / "source", work / "out"
    if not (source / "config.json").is_file():
        make(source)
    size = sum(path.stat().st_size for path in source.iterdir())
    lowbit = [sys.executable, "-W", "ignore", "-m", "lowbit"]
    convert = [*lowbit, "convert", str(source), "-o", str(target), "--format"]
    commands = {
        "cp": ["cp", "-r", str(source), str(target)],
        "inspect": [*lowbit, "inspect", str(source)],
        "convert to compressed-tensors, not verified": [*convert, "compressed-tensors", "--no-verify"],
        "convert to compressed-tensors": [*convert, "compressed-tensors"],
        "convert to awq, not verified": [*convert, "awq", "--no-verify"],
        "cp again": ["cp", "-r", str(source), str(target)],
    }
    rows: dict[str, Any] = {"bytes": size, "cores": os.cpu_count(), "torch": torch.__version__, "rows": {}}
    for name, command in commands.items():
        rows["rows"][name] = timed(command, size)
        print(name, rows["rows"][name], flush=True)
        (out / "open_8b.json").write_text(json.dumps(rows, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
