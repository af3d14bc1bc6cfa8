"""`lowbit.qat`: quantization-aware training (train/qat.py), with a config that says what the converted model holds.

model = lowbit.qat.prepare(model, QuantScheme.parse("w4a16-g64"))
... train ...        (or reopen(quantized), which begins from a quantized model and all that its method did to it)
lowbit.qat.convert(model).save_pretrained(folder)     and lowbit.load, transformers or vLLM read it
"""

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from lowbit.io.compressed_tensors import quantization_config
from lowbit.io.hf import LowbitConfig, described
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.nn.linear import QuantLinear
from lowbit.train import qat
from lowbit.train.qat import QatOptions, prepare, reopen, scale_parameters

__all__ = ["FakeOptions", "FakeQuantLinear", "QatOptions", "convert", "prepare", "reopen", "scale_parameters"]
Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model) -> Model:
    """`model` with its fake-quantized layers made real, in place; its config then describes them.

    Raises InputError where there is nothing to convert, or static activations have not been watched for long enough.
    """
    converted = qat.convert(model)
    if isinstance(converted, PreTrainedModel):
        linears = {name: module for name, module in converted.named_modules() if isinstance(module, nn.Linear)}
        layers = {name: module for name, module in linears.items() if isinstance(module, QuantLinear)}
        if any(layer.rotation is not None for layer in layers.values()):  # compressed-tensors has no form for that
            modules = {name: described(layer) for name, layer in layers.items()}
            config = LowbitConfig(str(next(iter(layers.values())).scheme), (), modules).to_dict()
        else:
            schemes = {name: layer.scheme for name, layer in layers.items()}
            config = quantization_config(schemes, set(linears) - set(schemes))
        converted.config.quantization_config = config
    return converted
