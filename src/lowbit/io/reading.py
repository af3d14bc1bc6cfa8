"""Which reader reads a checkpoint: told by quant_method, and for bitsandbytes by what it loads."""

from collections.abc import Mapping
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.io.awq import AwqReader
from lowbit.io.bitsandbytes import Bitsandbytes4BitReader
from lowbit.io.compressed_tensors_reader import CompressedTensorsReader
from lowbit.io.fp8 import Fp8Reader
from lowbit.io.gptq import GptqReader
from lowbit.io.llm_int8 import LlmInt8Reader
from lowbit.io.mxfp4 import Mxfp4Reader
from lowbit.io.own import LowbitReader
from lowbit.io.stored import Reader
from lowbit.io.tensorfile import Files

READERS: dict[str, type[Reader]] = {
    "compressed-tensors": CompressedTensorsReader,
    "gptq": GptqReader,
    "awq": AwqReader,
    "fp8": Fp8Reader,
    "mxfp4": Mxfp4Reader,
    "lowbit": LowbitReader,
}


def reader_of(config: Mapping[str, Any], files: Files) -> Reader:
    """The reader of a checkpoint's files under its quantization_config. Raises CheckpointError where there is none."""
    shapes = {name: file.entries[name].shape for name, file in files.places.items()}
    method = config.get("quant_method")
    if method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            return LlmInt8Reader(config, shapes, files.get)
        return Bitsandbytes4BitReader(config, shapes, files.get)
    if not isinstance(method, str) or method not in READERS:
        known = ", ".join([*READERS, "bitsandbytes"])
        raise CheckpointError(f"the checkpoint is quantized by {method!r}; lowbit reads {known} and GGUF")
    return READERS[method](config, shapes, files.get)
