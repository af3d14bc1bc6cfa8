"""What compressed-tensors has no form for is written in our own. Oracle: the quantized model in memory, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import TOKENS, write_quantized

import lowbit
from lowbit.errors import InputError
from lowbit.io.convert import convert

TEXTS = ["gptq:nvfp4-search", "rtn-weighted:mxfp4-search", "gptq:w4a4-g16-asym-dynamic-asym-search"]


def _method(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_searched_activations_survive_writing_and_loading(text: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, "llama", text)
    assert _method(written.out) == "lowbit"
    loaded = lowbit.load(written.out, torch.float32)
    assert torch.equal(loaded(TOKENS).logits, written.model(TOKENS).logits)
    with pytest.raises(InputError, match="compressed-tensors can't hold the codes of"):
        convert(written.out, tmp_path / "other", "compressed-tensors")


@pytest.mark.parametrize("text", ["aligned:nvfp4", "rtn-weighted:mxfp4a16", "gptq:w4a4-g16", "gptq:w4a8-g16"])
@torch.no_grad()
def test_the_others_stay_compressed_tensors(text: str, tmp_path: Path) -> None:
    written = write_quantized(tmp_path, "llama", text)
    assert _method(written.out) == "compressed-tensors"
    loaded = lowbit.load(written.out, torch.float32)
    assert torch.equal(loaded(TOKENS).logits, written.model(TOKENS).logits)
