"""The cache that `generate` takes: a QuantizedLayer for each layer of a model that attends to its past.

cache = lowbit.QuantizedCache(model.config, bits=4)
model.generate(**inputs, past_key_values=cache)
"""

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowbit.cache.layer import QuantizedLayer
from lowbit.cache.scheme import CacheScheme
from lowbit.errors import InputError
from lowbit.numerics.formats import INT_BITS


class QuantizedCache(Cache):
    """Keys and values in few bits for `generate` and for a model's forward; one cache per running text or batch.

    config: the model's. bits: 2 to 8. group_size: how many tokens of a channel of keys, and how many channels of a
    token of values, share a float16 scale and offset. window: at least so many of the latest tokens stay in float, and
    so do the first `sinks`. token_keys: keys are grouped along the channels of a token too, as values are. rotate_keys:
    keys are turned by a Hadamard matrix while they are packed (R3), which pays with token_keys.

    Sliding-window layers keep no more than they need; layers that share another's keys keep none. Raises InputError for
    numbers out of range and for a model whose layers keep another state (linear attention).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: int = 4,
        group_size: int = 32,
        window: int = 128,
        sinks: int = 4,
        *,
        token_keys: bool = False,
        rotate_keys: bool = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise InputError(f"a cache is made for a model's config, not {type(config).__name__}; give model.config")
        if bits not in INT_BITS:
            raise InputError(f"keys and values can have 2 to 8 bits, not {bits}")
        if group_size < 1 or window < 0 or sinks < 0:
            raise InputError(
                f"group_size {group_size}, window {window}, sinks {sinks}: a group has at least one token, and no "
                "number is negative"
            )
        self.scheme = CacheScheme(bits, group_size, window, sinks, token_keys, rotate_keys)
        plain = DynamicCache(config=config).layers
        super().__init__(layers=[_quantized(layer, index, self.scheme) for index, layer in enumerate(plain)])

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept: codes, scales, offsets, and the tokens in float."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    @property
    def float_nbytes(self) -> int:
        """Bytes that the same tokens would take in the model's dtype."""
        return sum(getattr(layer, "float_nbytes", 0) for layer in self.layers)


def _quantized(layer: Any, index: int, scheme: CacheScheme) -> Any:
    """Our layer in place of one of transformers' own."""
    if isinstance(layer, getattr(cache_utils, "DummyLayer", ())):  # since transformers 5.18
        return layer
    if type(layer) is DynamicLayer:
        return QuantizedLayer(scheme)
    if type(layer) is DynamicSlidingWindowLayer:
        return QuantizedLayer(scheme, layer.sliding_window)
    raise InputError(
        f"layer {index} keeps a {type(layer).__name__} instead of keys and values alone, for which lowbit has no form "
        "in few bits; use transformers.DynamicCache with this model"
    )
