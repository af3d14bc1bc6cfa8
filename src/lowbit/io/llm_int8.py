"""bitsandbytes' LLM.int8() checkpoints (0.50).

    {m}.weight         int8 [N, K]
    {m}.SCB            float32 [N]     largest magnitude of each row: w = weight SCB / 127
    {m}.weight_format  uint8 scalar    0, row by row; the other layouts (1 to 3) are no longer written

The threshold that parts the outlying columns stands in the config, llm_int8_threshold (numerics/scheme.py, int8-t6).
"""

import torch

from lowbit.errors import CheckpointError
from lowbit.io.stored import Reader, Stored, need
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_LARGEST = 127


class LlmInt8Reader(Reader):
    """Reads row-major LLM.int8() weights."""

    endings = (".weight", ".SCB", ".weight_format")

    def _modules(self) -> dict[str, None]:
        return dict.fromkeys(name.removesuffix(".SCB") for name in self.shapes if name.endswith(".SCB"))

    def read(self, module: str) -> Stored:
        named = self.tensors(module)
        need("weight" in named and named["weight"].dim() == 2, module, "it has no matrix weight")
        codes, maxima = named["weight"], named["SCB"]
        need(codes.dtype == torch.int8, module, f"weight is {codes.dtype}, not int8")
        need(maxima.numel() == codes.shape[0], module, f"SCB holds {maxima.numel()} values, not {codes.shape[0]}")
        layout = named.get("weight_format")
        if layout is not None and (layout.numel() != 1 or layout.item() != 0):
            raise CheckpointError(
                f"{module} is stored in a GPU's own layout, which bitsandbytes gave up; save it again"
            )
        scale = (maxima.float() / _LARGEST).view(-1, 1)
        return Stored(PackedWeight(self.scheme(), (codes.shape[0], codes.shape[1]), codes, scale))

    def describe(self, module: str) -> str:
        return str(self.scheme())

    def scheme(self) -> QuantScheme:
        """int8-t6, with the threshold of the config."""
        threshold = self.config.get("llm_int8_threshold", 6.0)
        if not isinstance(threshold, int | float) or not 0 <= threshold < 1e6:
            raise CheckpointError(f"llm_int8_threshold is {threshold!r}, which is no threshold")
        return QuantScheme.parse(f"int8-t{float(threshold):.6f}".rstrip("0").rstrip("."))
