"""gpt-oss's MXFP4 experts (quant_method "mxfp4").

    {p}_blocks  uint8 [E, N, K/32, 16]    E2M1 codes, the even column in the low nibble
    {p}_scales  uint8 [E, N, K/32]        exponents with bias 127

{p} is a 3-D parameter, mlp.experts.gate_up_proj or down_proj, which the model keeps as [E, K, N] and multiplies x by.
Source: transformers 5.23 integrations/mxfp4.py; OCP Microscaling Formats 1.0.
"""

from typing import Any

import torch

from lowbit.io.stored import Reader, Stored, need
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight


class Mxfp4Reader(Reader):
    """Reads experts; gpt-oss leaves everything else in bfloat16."""

    endings = ("_blocks", "_scales")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.experts, self.modules = self.modules, ()

    def describe(self, module: str) -> str:
        return "mxfp4a16"

    def read_experts(self, name: str) -> list[Stored]:
        blocks, scales = self.get(f"{name}_blocks"), self.get(f"{name}_scales")
        fits = blocks.dtype == scales.dtype == torch.uint8 and blocks.dim() == 4 and blocks.shape[3] == 16
        need(fits and blocks.shape[:3] == scales.shape, name,
             f"blocks {list(blocks.shape)} and scales {list(scales.shape)} don't fit each other")  # fmt: skip
        scheme, (_, rows, groups, _) = QuantScheme.parse("mxfp4a16"), blocks.shape
        packed = blocks.flatten(2)  # [E, N, K/32, 16] -> [E, N, K/2]
        pairs = zip(packed.unbind(), scales.unbind(), strict=True)
        return [Stored(PackedWeight(scheme, (rows, 32 * groups), codes, scale)) for codes, scale in pairs]
