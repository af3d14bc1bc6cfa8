"""bitsandbytes' LLM.int8() checkpoints (0.50).

    {m}.weight         int8 [N, K]
    {m}.SCB            float32 [N]     largest magnitude of each row: w = weight SCB / 127
    {m}.weight_format  uint8 scalar    0, row by row; the other layouts (1 to 3) are no longer written

The threshold that parts the outlying columns stands in the config, llm_int8_threshold (numerics/scheme.py, int8-t6).
Written are the codes as they are and the SCB whose 127th part, in float32, is the scale. There is one for every scale
that was bitsandbytes' or is a 16-bit number, but for one in 128 of other float32 numbers there is none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
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


def _maxima(scale: Tensor) -> Tensor | None:
    """float32 [N] whose quotients by 127 are scale [N, 1], or None where float32 has no such numbers."""
    wanted = scale.float().view(-1)
    found = wanted * _LARGEST
    for side in (torch.inf, -torch.inf):
        found = torch.where(found / _LARGEST == wanted, found, torch.nextafter(wanted * _LARGEST, torch.tensor(side)))
    return found if torch.equal(found / _LARGEST, wanted) else None


def refusal(weight: PackedWeight) -> str | None:
    """Why LLM.int8() can't hold these very codes, or None."""
    activations = weight.scheme.activations
    if activations is None or activations.outlier is None:
        return f"LLM.int8() holds int8-t6 and its like, not {weight.scheme}"
    assert isinstance(weight.scale, Tensor)
    if _maxima(weight.scale) is None:
        return "one of its float32 scales is no 127th part of a float32 number"
    return None


def tensors_8bit(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The checkpoint's entries for module `name`. Raises InputError where LLM.int8() can't hold these codes."""
    if why := refusal(weight):
        raise InputError(f"{name}: {why}")
    assert isinstance(weight.scale, Tensor)
    maxima = _maxima(weight.scale)
    assert maxima is not None
    layout = torch.tensor(0, dtype=torch.uint8)
    return {f"{name}.weight": weight.codes, f"{name}.SCB": maxima, f"{name}.weight_format": layout}


def config_8bit(scheme: QuantScheme, skip: Sequence[str]) -> dict[str, object]:
    """The quantization_config; skip names every linear layer that is not quantized ("lm_head", for one)."""
    assert scheme.activations is not None
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": scheme.activations.outlier,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
