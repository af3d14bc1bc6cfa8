"""Our own method id, what save_pretrained writes for a model with QuantLinear in it (io/hf.py).

A layer's buffers under their own names (tensors.py), whatever its scheme; the config names each with its scheme and,
where it turns its input at run time, the rotation (numerics/hadamard.py). `lowbit quantize` writes this form where
compressed-tensors has none: searched or outlying activations, rotated inputs.
"""

from typing import Any

from lowbit.errors import CheckpointError, SchemeError
from lowbit.io.stored import Reader, Stored, need
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

_INPUTS = (".input_scale", ".input_zero_point", ".input_global_scale")


class LowbitReader(Reader):
    """Reads every scheme that lowbit has."""

    endings = (
        *(".weight_packed", ".weight", ".weight_scale", ".weight_absmax", ".weight_zero_point", ".weight_shape"),
        *(".weight_global_scale", ".weight_order", ".weight_nested_absmax", ".weight_nested_offset"),
        *_INPUTS,
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.schemes: dict[str, QuantScheme] = {}
        self.rotations: dict[str, Hadamard] = {}
        named = self.config.get("modules")
        if not isinstance(named, dict) or not all(isinstance(saved, dict) for saved in named.values()):
            raise CheckpointError("quantization_config names no modules; get a clean copy of the model")
        for module, saved in named.items():
            try:
                self.schemes[module] = QuantScheme.parse(str(saved.get("scheme")))
                if "rotation" in saved:
                    self.rotations[module] = Hadamard.parse(str(saved["rotation"]))
            except SchemeError as error:
                raise CheckpointError(f"{module}: {error}") from None
        self.modules = self.schemes

    def describe(self, module: str) -> str:
        return str(self.schemes[module])

    def rotated(self) -> str | None:
        return next(iter(self.rotations), None)

    def read(self, module: str) -> Stored:
        named, scheme = self.tensors(module), self.schemes[module]
        inputs = {key[1:]: named.pop(key[1:]) for key in _INPUTS if key[1:] in named}
        codes = named.get("weight_packed", named.get("weight"))
        need(codes is not None, module, "it has no codes")
        saved = self.config["modules"][module].get("shape")
        fits = isinstance(saved, list) and len(saved) == 2 and all(type(size) is int and size > 0 for size in saved)
        need(fits, module, f"quantization_config says its shape is {saved!r}")
        need({"weight_scale", "weight_absmax"} & named.keys() != set(), module, "it has no scales")
        weight = PackedWeight.from_tensors(named, scheme, (saved[0], saved[1]))
        weight.check(module)
        rotation = self.rotations.get(module)
        need(
            rotation is None or rotation.size == saved[1],
            module,
            f"it has {saved[1]} inputs, and {rotation} turns others",
        )
        return Stored(weight, inputs, rotation)
