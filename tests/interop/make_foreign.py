"""Makes tests/interop/fixtures: tiny checkpoints packed by gptqmodel and autoawq, with what these make of them.

    pip install --no-deps gptqmodel autoawq ... ; PYTHONPATH=src python tests/interop/make_foreign.py

Written by gptqmodel 7.7.0 and autoawq 0.2.9 (torch 2.13, transformers 5.23). A file holds the checkpoint's tensors, its
config.json under the metadata key "config", the weights that the owner's layer dequantizes to ("expected.NAME") and the
logits of a model that runs on the owner's layers ("expected.logits").
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "fixtures"
TOKENS = torch.arange(24).view(2, 12) * 7 % 32
SIZES = {
    **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}


def grid(
    w: Tensor, bits: int, group: int, symmetric: bool, order: Tensor | None, lowest: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(scales [N, G] in float16's numbers, zero-points [N, G], g_idx [K]) for w [N, K]."""
    columns = w.shape[1]
    g_idx = torch.arange(columns, dtype=torch.int32) // group
    if order is not None:
        g_idx = g_idx[torch.argsort(order)]
    scales, zeros = [], []
    for index in range(columns // group):
        part = w[:, g_idx == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales.append(2 * torch.maximum(-low, high) / (2**bits - 1))
            zeros.append(torch.full_like(low, 2 ** (bits - 1)))
        else:
            scales.append((high - low) / (2**bits - 1))
            zeros.append((-low / scales[-1]).round().clamp(lowest, 2**bits - 1))
    return torch.stack(scales, 1).half().float(), torch.stack(zeros, 1), g_idx


def gptq_layer(linear: nn.Linear, bits: int, group: int, symmetric: bool, ordered: bool, version: int) -> TorchLinear:
    size = linear.in_features if group == -1 else group
    order = torch.randperm(linear.in_features) if ordered else None
    scales, zeros, g_idx = grid(linear.weight.data, bits, size, symmetric, order)
    layer = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=ordered, in_features=linear.in_features,
        out_features=linear.out_features, bias=linear.bias is not None, pack_dtype=torch.int32,
    )  # fmt: skip
    layer.pack_original(linear, scales.clone(), zeros.clone(), g_idx)
    return layer


def gptq_tensors(layer: TorchLinear, bits: int, version: int) -> dict[str, Tensor]:
    """Its buffers as it saves them; v1 subtracts one from the zero-points on the way out."""
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, type("Q", (), {"bits": bits, "pack_dtype": torch.int32})())
    named = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    return {key: value.clone().contiguous() for key, value in named.items()}


def awq_layer(linear: nn.Linear, group: int, kind: type) -> nn.Module:
    scales, zeros, _ = grid(linear.weight.data, 4, linear.in_features if group == -1 else group, False, None, 0)
    if kind is WQLinear_GEMM:
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    return kind.from_linear(linear, 4, group, scales=scales, zeros=zeros)


def tiny(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter)).copy_(parameter.half())
    return model.eval()


class Dequantized(nn.Module):
    """Runs on the weight that the owner's layer dequantizes to, in float32, so that logits have no float16 rounding."""

    def __init__(self, w: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.w, self.bias = w.float(), bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w, self.bias)


@torch.no_grad()
def write_model(name: str, model_type: str, config: dict, layer: Callable[[nn.Linear], tuple[dict, Tensor]]) -> None:
    model = tiny(model_type)
    tensors = dict(model.state_dict())
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            own, w = layer(module)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{key}": value for key, value in own.items()}
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Dequantized(w, module.bias))
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    tensors["expected.logits"] = model(TOKENS).logits
    settings = model.config.to_dict() | {"dtype": "float16", "quantization_config": config}
    save_file(tensors, FOLDER / f"{name}-{model_type}.safetensors", metadata={"config": json.dumps(settings)})


@torch.no_grad()
def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    layers: dict[str, Tensor] = {}
    for bits in (2, 3, 4, 8):
        for version in (1, 2):
            for kind in ("sym", "asym", "order"):
                linear = nn.Linear(64, 32 if bits == 3 else 16, bias=False)
                linear.weight.data[3] = linear.weight.data[3].abs() + 0.01  # a row whose asymmetric zero-point is low
                name = f"gptq{bits}v{version}{kind}"
                layer = gptq_layer(linear, bits, -1 if kind == "sym" and bits == 8 else 32, kind != "asym",
                                   kind == "order", version)  # fmt: skip
                layers[f"expected.{name}"] = layer.dequantize_weight().T.contiguous().half()
                layers |= {f"{name}.{key}": value for key, value in gptq_tensors(layer, bits, version).items()}
    for kind, cls in (("gemm", WQLinear_GEMM), ("gemv", WQLinear_GEMV)):
        for group in (32, 64):
            linear = nn.Linear(128, 32, bias=False)
            layer, name = awq_layer(linear, group, cls), f"awq{kind}{group}"
            layers |= {f"{name}.{key}": getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
            gemm = layer if kind == "gemm" else awq_layer(linear, group, WQLinear_GEMM)
            layers[f"expected.{name}"] = dequantize_gemm(gemm.qweight, gemm.qzeros, gemm.scales, 4, group).T
    save_file({key: value.contiguous() for key, value in layers.items()}, FOLDER / "layers.safetensors")

    def gptq(bits: int, group: int, symmetric: bool, ordered: bool, version: int) -> Callable:
        def layer(linear: nn.Linear) -> tuple[dict, Tensor]:
            own = gptq_layer(linear, bits, group, symmetric, ordered, version)
            half, own.scales = own.scales, own.scales.float()
            w = own.dequantize_weight().T.contiguous()  # in float32, so that logits have no float16 rounding
            own.scales = half
            return gptq_tensors(own, bits, version), w

        return layer

    def awq(linear: nn.Linear) -> tuple[dict, Tensor]:
        own = awq_layer(linear, 32, WQLinear_GEMM)
        w = dequantize_gemm(own.qweight, own.qzeros, own.scales.float(), 4, 32).T.contiguous()
        return {key: getattr(own, key) for key in ("qweight", "qzeros", "scales")}, w

    common = {"quant_method": "gptq", "pack_dtype": "int32", "lm_head": False, "true_sequential": True}
    for model_type, bits, symmetric, ordered, version in (
        ("llama", 4, True, False, 1), ("qwen2", 4, False, False, 2), ("mistral", 4, True, True, 1),
        ("phi3", 8, True, False, 2),
    ):  # fmt: skip
        config = common | {"bits": bits, "group_size": 32, "desc_act": ordered, "sym": symmetric}
        config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
        write_model("gptq", model_type, config, gptq(bits, 32, symmetric, ordered, version))
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    for model_type in ("llama", "qwen2", "mistral", "phi3"):
        write_model("awq", model_type, config | {"modules_to_not_convert": None}, awq)


if __name__ == "__main__":
    main()
