"""A model without weights, built from a config that the files must justify.

A config is a promise of sizes, and building the model allocates them. So each size is held against the files first: a
layer has tensors, a row of the vocabulary has codes, two a byte at most and 16 a byte for good measure.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lowbit.errors import CheckpointError

_MOST_ELEMENTS_PER_BYTE = 16
_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError, AssertionError)


def empty_model(config: Any, name: str, dtype: torch.dtype, tensors: int, stored_bytes: int) -> PreTrainedModel:
    """The model of a transformers config in `dtype`, for files of so many tensors and bytes.

    Raises CheckpointError where the config asks for more than the files can hold, or for no model at all.
    """
    sizes = config.get_text_config() if hasattr(config, "get_text_config") else config
    elements = _MOST_ELEMENTS_PER_BYTE * stored_bytes
    limits = {
        "num_hidden_layers": tensors,
        "hidden_size": elements,
        "intermediate_size": elements,
        "vocab_size": elements,
    }
    for key, limit in limits.items():
        value = getattr(sizes, key, None)
        if isinstance(value, int) and not 0 < value <= limit:
            raise CheckpointError(f"{name}: config.json says {key} = {value}, which its files can't hold")
    products = [getattr(sizes, key, None) for key in ("vocab_size", "intermediate_size")]
    hidden = getattr(sizes, "hidden_size", None)
    for value in products:
        if isinstance(value, int) and isinstance(hidden, int) and value * hidden > elements:
            raise CheckpointError(
                f"{name}: config.json says matrices of {value} x {hidden}, which its files can't hold"
            )
    try:
        with no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except _ERRORS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: transformers can't build a model of this config ({first})") from error
