"""FP8 checkpoints as DeepSeek-V3 and transformers' finegrained fp8 publish them (quant_method "fp8").

    {m}.weight            float8_e4m3fn [N, K]
    {m}.weight_scale_inv  float32 or float8_e8m0 [ceil(N/128), ceil(K/128)]   w = weight * scale, despite the name;
                          a lone number where the config has no weight_block_size
    {m}.activation_scale  float32, where activations are static

Source: DeepSeek-V3 README, "FP8 weights"; transformers 5.23 integrations/finegrained_fp8.py.
"""

from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.io.stored import Reader, Stored, need
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
