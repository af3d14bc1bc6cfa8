"""What makes a training step fast changes no number. Oracle: the model called as ever."""

import pytest
import torch
from architectures import TINY
from torch._dynamo.utils import counters

from lowbit.model.capturable import Capturable
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.train.qat import prepare

IDS = torch.arange(48).view(2, 24) % 120 + 3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_capturable_model_gives_what_the_model_gives(name: str) -> None:
    model = TINY[name]()
    with torch.no_grad():
        assert torch.equal(Capturable(model)(input_ids=IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_one_compiled_block_serves_all_layers_of_a_capturable_model() -> None:
    model = prepare(TINY["llama"](), QuantScheme.parse("w2a16-g32-asym")).train()
    before = model(input_ids=IDS, use_cache=False).logits
    torch._dynamo.reset()
    counters.clear()
    for block in find_blocks(model)[1]:
        block.compile(backend="eager")
    after = Capturable(model)(input_ids=IDS, use_cache=False).logits
    after.sum().backward()
    assert torch.equal(after, before)
    assert counters["frames"]["ok"] == counters["stats"]["unique_graphs"] == 1
