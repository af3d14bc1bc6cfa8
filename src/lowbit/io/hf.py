"""lowbit inside transformers: our own method id, registered when lowbit is imported.

    from_pretrained(model, quantization_config=lowbit.LowbitConfig("nf4"))    quantizes while loading
    model.save_pretrained(folder), from_pretrained(folder)                    the same bits again

While loading, each weight is rounded (nearest code, min/max scales) as soon as it is read and its float tensor freed,
so that the float model is never there as a whole. The saved config names every layer with its scheme. transformers
(5.23) has no entry point by which a package could register without being imported, so `import lowbit` comes first.
"""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import InputError
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.hadamard import Hadamard
from lowbit.numerics.scheme import QuantScheme, check_fits
from lowbit.tensors import PackedWeight

_LOG = logging.getLogger("lowbit")
METHOD = "lowbit"
SHORT = {"nf4": "nf4-b64", "fp4": "fp4-b64", "int8": "int8-t6", "int4": "w4a16-g64"}


class LowbitConfig(QuantizationConfigMixin):
    """How a model is quantized. scheme: what `QuantScheme.parse` reads, or one of nf4, fp4, int8, int4.

    ignore: globs of linear layers that stay as they are, beside the head. modules: of a saved model, each layer with
    its scheme, its shape, the dtype of its scales and of the calibrated buffers it has. Raises SchemeError.
    """

    def __init__(
        self,
        scheme: str = "nf4",
        ignore: Sequence[str] = (),
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
        **unused: Any,
    ) -> None:
        if quant_method != METHOD or unused:
            raise InputError(f"LowbitConfig knows scheme, ignore and modules, not {sorted(unused) or quant_method!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.scheme = str(QuantScheme.parse(SHORT.get(scheme, scheme)))
        self.ignore, self.modules = list(ignore), dict(modules or {})

    @classmethod
    def from_bitsandbytes(
        cls,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: Sequence[str] | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
    ) -> "LowbitConfig":
        """The config that BitsAndBytesConfig's arguments of these names mean; its defaults are theirs.

        The compute dtype is that of the inputs here, so it says nothing more than from_pretrained's dtype.
        """
        if load_in_8bit == load_in_4bit:
            raise InputError("say one of load_in_8bit=True and load_in_4bit=True")
        ignore = [f"*{name}*" for name in llm_int8_skip_modules or ()]
        if load_in_8bit:
            return cls(f"int8-t{float(llm_int8_threshold):g}", ignore)
        if bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(f"bnb_4bit_quant_type is {bnb_4bit_quant_type!r}; choose nf4 or fp4")
        return cls(f"{bnb_4bit_quant_type}-b64" + "-dq" * bnb_4bit_use_double_quant, ignore)

    @classmethod
    def of(cls, model: nn.Module) -> "LowbitConfig":
        """The config that describes the quantized layers of `model` as they are."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        schemes = [str(layer.scheme) for layer in layers.values()]
        common = max(sorted(set(schemes)), key=schemes.count) if schemes else "nf4-b64"
        return cls(common, (), {name: described(layer) for name, layer in layers.items()})

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")


def described(layer: QuantLinear) -> dict[str, Any]:
    """What an empty layer must know to take the saved buffers."""
    buffers = dict(layer.named_buffers())
    scale = buffers.get("weight_scale", buffers.get("weight_absmax"))
    assert scale is not None
    dtypes = {key: str(buffers[key].dtype).removeprefix("torch.") for key in _INPUTS if key in buffers}
    shape = [layer.out_features, layer.in_features]
    rotation = {} if layer.rotation is None else {"rotation": str(layer.rotation)}
    scale_dtype = str(scale.dtype).removeprefix("torch.")
    return {"scheme": str(layer.scheme), "shape": shape, "scale": scale_dtype, **dtypes, **rotation}


class _QuantizeOnLoad(ConversionOps):
    """Takes a float weight as it is read and puts a quantized layer where it would have gone."""

    def __init__(self, quantizer: "LowbitQuantizer") -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **arguments: Any) -> dict[str, Any]:
        model, missing = arguments["model"], arguments.get("missing_keys")
        for name, value in input_dict.items():
            w = value[0] if isinstance(value, list) else value
            module = name.removesuffix(".weight")
            linear, scheme = model.get_submodule(module), self.quantizer.scheme
            check_fits(scheme.weights, w.shape[1], module)
            layer = QuantLinear.from_packed(PackedWeight.from_float(w, scheme, w.dtype), linear.bias)
            _mark_initialized(layer)
            _put(model, module, layer)
            if missing is not None:
                missing.discard(name)
        return {}


def _mark_initialized(layer: nn.Module) -> None:
    """Keep transformers from initializing what has just been loaded."""
    for thing in (layer, *layer.buffers()):
        thing._is_hf_initialized = True  # type: ignore[attr-defined]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


class LowbitQuantizer(HfQuantizer):
    """Quantizes linear layers while they load, or takes saved ones packed."""

    requires_calibration = False
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self.scheme = QuantScheme.parse(quantization_config.scheme)
        self.chosen: set[str] = set()

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        activations = self.scheme.activations
        if not self.pre_quantized and activations is not None and not activations.dynamic:
            raise InputError(
                f"{self.scheme} needs activations that were observed, which loading does not do; use lowbit.quantize"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        if self.pre_quantized:
            self._put_empty_layers(model)
            return
        kept = set(self.get_modules_to_not_convert(model, None, None, add_default_skips=True))
        self.chosen = {
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and name not in kept and min(module.weight.shape) >= 16
            if not any(fnmatchcase(name, glob) for glob in self.quantization_config.ignore)
        }
        experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
        if experts:
            _LOG.warning(
                "%d parameters with the experts of a mixture stay as they are while loading, the first is %s; "
                "lowbit.quantize rounds them too",
                len(experts),
                experts[0],
            )

    def _put_empty_layers(self, model: PreTrainedModel) -> None:
        """Quantized layers without data in the places that the saved config names. Raises InputError."""
        for name, saved in self.quantization_config.modules.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise InputError(f"the saved config names {name}, which the model does not have") from None
            assert isinstance(linear, nn.Linear)
            scheme, dtype = QuantScheme.parse(saved["scheme"]), getattr(torch, saved["scale"])
            layer = QuantLinear(linear.in_features, linear.out_features, scheme, linear.bias is not None, dtype, "meta")
            for key in _INPUTS:
                if key in saved:
                    layer.register_buffer(key, torch.empty(1, dtype=getattr(torch, saved[key]), device="meta"))
            if "rotation" in saved:
                layer.rotation = Hadamard.parse(saved["rotation"])
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(linear.bias.dtype), requires_grad=False)
            layer._is_hf_initialized = True  # type: ignore[assignment]
            _put(model, name, layer)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        return not self.pre_quantized and param_name.removesuffix(".weight") in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        attach(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def attach(model: PreTrainedModel) -> None:
    """Tell transformers that `model` is quantized, and how, so that save_pretrained writes what from_pretrained reads.

    A model with packed experts is left alone: its checkpoint form is the one it was loaded from.
    """
    if any(isinstance(module, QuantExperts) for module in model.modules()):
        return
    config = LowbitConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = LowbitQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized, model.quantization_method = True, METHOD  # type: ignore[assignment]


def register() -> None:
    """Make transformers know the method id; a second time changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LowbitConfig)
        register_quantizer(METHOD)(LowbitQuantizer)
