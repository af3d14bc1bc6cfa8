"""FP8 checkpoints as DeepSeek-V3 and transformers' finegrained fp8 publish them (quant_method "fp8").

    {m}.weight            float8_e4m3fn [N, K]
    {m}.weight_scale_inv  float32 or float8_e8m0 [ceil(N/128), ceil(K/128)]   w = weight * scale, despite the name;
                          a lone number where the config has no weight_block_size
    {m}.activation_scale  float32, where activations are static

Source: DeepSeek-V3 README, "FP8 weights"; transformers 5.23 integrations/finegrained_fp8.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.io.stored import Reader, Stored, need
from lowbit.numerics.formats import FP8_E4M3
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight


class Fp8Reader(Reader):
    """Reads square blocks and whole tensors."""

    endings = (".weight", ".weight_scale_inv", ".activation_scale", ".input_scale")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        block = self.config.get("weight_block_size")
        scheme = self.config.get("activation_scheme", "dynamic")
        is_square = isinstance(block, list) and len(block) == 2 and all(_is_size(side) for side in block)
        if block is not None and not (is_square and block[0] == block[1]):
            raise CheckpointError(f"lowbit reads fp8 in square blocks, not in weight_block_size {block!r}")
        if scheme not in ("dynamic", "static"):
            raise CheckpointError(f"lowbit reads fp8 with dynamic or static activations, not {scheme!r}")
        text = f"fp8-tile{block[0]}" if block is not None else "fp8-tensor"
        self.scheme = QuantScheme.parse(text + "-static" * (scheme == "static"))

    def _modules(self) -> dict[str, None]:
        end = ".weight_scale_inv"
        return dict.fromkeys(name.removesuffix(end) for name in self.shapes if name.endswith(end))

    def describe(self, module: str) -> str:
        return str(self.scheme)

    def read(self, module: str) -> Stored:
        named = self.tensors(module)
        need("weight" in named and named["weight"].dim() == 2, module, "it has no matrix weight")
        codes, scale = named["weight"], named["weight_scale_inv"].float()
        need(codes.dtype == torch.float8_e4m3fn, module, f"weight is {codes.dtype}, not float8_e4m3fn")
        if self.scheme.weights.granularity == "tensor":
            need(scale.numel() == 1, module, f"weight_scale_inv {list(scale.shape)} is no lone number")
            scale = scale.reshape(1)
        weight = PackedWeight(self.scheme, (codes.shape[0], codes.shape[1]), codes, scale)
        weight.check(module)
        grids = [named[key].float().reshape(-1) for key in ("activation_scale", "input_scale") if key in named]
        need(all(grid.numel() == 1 for grid in grids), module, "its activation scale is no lone number")
        static = self.scheme.activations is not None and not self.scheme.activations.dynamic
        need(bool(grids) or not static, module, "it has no activation_scale, and the config says static")
        return Stored(weight, {"input_scale": grids[0]} if static else {})


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= 4096


def refusal(scheme: QuantScheme) -> str | None:
    """Why this form of fp8 can't hold codes under `scheme`, or None."""
    weights, activations = scheme.weights, scheme.activations
    if weights.format != FP8_E4M3 or weights.granularity not in ("tile", "tensor") or activations is None:
        return f"fp8 checkpoints hold square blocks or whole tensors beside fp8 activations, not {scheme}"
    return None


def tensors_fp8(name: str, stored: Stored) -> dict[str, Tensor]:
    """The checkpoint's entries for module `name`; scales widened to float32, which changes none."""
    weight = stored.weight
    assert isinstance(weight.scale, Tensor)
    scale = weight.scale.float()
    named = {"weight": weight.codes, "weight_scale_inv": scale if scale.dim() == 2 else scale.reshape(())}
    if "input_scale" in stored.inputs:
        named["activation_scale"] = stored.inputs["input_scale"].float().reshape(())
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in named.items()}


def config_fp8(schemes: Mapping[str, QuantScheme], skip: Sequence[str]) -> dict[str, Any]:
    """The quantization_config; skip names linear modules that stay as they are. Raises InputError for two schemes."""
    kinds = set(schemes.values())
    if len(kinds) > 1:
        raise InputError(
            f"an fp8 checkpoint has one scheme for all layers, and this model has {sorted(map(str, kinds))}"
        )
    scheme = kinds.pop()
    side = scheme.weights.group_size
    assert scheme.activations is not None
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic" if scheme.activations.dynamic else "static",
        "weight_block_size": [side, side] if side else None,
        "modules_to_not_convert": list(skip),
    }
