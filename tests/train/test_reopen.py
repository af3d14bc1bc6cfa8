"""Training a quantized model on. Oracle: the quantized model before it was reopened, and after it was converted."""

from pathlib import Path

import pytest
import torch
from architectures import TINY
from torch import nn

import lowbit
from lowbit.errors import InputError, SchemeError
from lowbit.model.quantize import Job, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.rotation import Rotation
from lowbit.model.select import select
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.train.qat import QatOptions, convert, reopen

IDS = torch.arange(48).view(2, 24) % 120 + 3


def quantized(scheme: str, method: str, rotation: Rotation | None = None) -> nn.Module:
    model, recipe = TINY["llama"](), Recipe(QuantScheme.parse(scheme), method, rotation=rotation)
    selection = select(model, find_blocks(model)[0], recipe.scheme)
    quantize_blocks(model, Job(recipe, selection, [IDS], torch.float32))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("w4a16-g32", "gptq"), ("w2a16-g32-asym", "aligned"), ("w4a4-g32-dynamic-asym", "rotate")],
)
def test_a_quantized_model_is_reopened_where_it_was_and_learns_on(scheme: str, method: str) -> None:
    model = quantized(scheme, method)
    with torch.no_grad():
        before = model(IDS).logits
    reopened = reopen(model.requires_grad_(False), QatOptions(FakeOptions(masters=True)))
    rotations = [module.rotation for module in reopened.modules() if isinstance(module, FakeQuantLinear)]
    assert len(rotations) == 21
    assert (rotations.count(None) < 21) == (method == "rotate")
    with torch.no_grad():
        assert torch.allclose(reopened(IDS).logits, before, rtol=0, atol=2e-5)
    optimizer = torch.optim.AdamW([p for p in reopened.parameters() if p.requires_grad], lr=2e-3)
    losses = [step(reopened.train(), optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        learned = reopened.eval()(IDS).logits
        assert torch.allclose(convert(reopened)(IDS).logits, learned, rtol=0, atol=2e-5)


def test_only_an_integer_quantized_model_is_reopened() -> None:
    with pytest.raises(InputError, match="no quantized layer to train on"):
        reopen(TINY["llama"]())
    with pytest.raises(SchemeError, match="training learns integer grids"):
        reopen(quantized("nf4-b64", "rtn"))


def test_a_reopened_rotated_model_is_saved_with_its_rotations(tmp_path: Path) -> None:
    reopened = lowbit.qat.reopen(quantized("w4a16-g32", "rotate", Rotation(online="down")))
    model = lowbit.qat.convert(reopened.eval())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(lowbit.load(tmp_path)(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
