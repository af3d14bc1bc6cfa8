"""Makes a checkpoint of Llama-3-8B's shapes: GPTQ, 4 bits, groups of 128, random codes, five shards.

PYTHONPATH=src python bench/interop/make_8b.py FOLDER
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowbit.io.tensorwriter import TensorWriter, header_bound

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


if __name__ == "__main__":
    make(Path(sys.argv[1]))
