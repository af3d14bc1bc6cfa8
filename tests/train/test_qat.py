"""Oracle: the converted model, which knows nothing of training; torch's own compile, checkpointing and autocast."""

import pytest
import torch
from architectures import TINY
from torch import nn

from lowbit.errors import CheckpointError, InputError, SchemeError
from lowbit.kernels.registry import use
from lowbit.model.select import Rule
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.nn.linear import QuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.train.qat import QatOptions, convert, prepare, scale_parameters

IDS = torch.arange(48).view(2, 24) % 120 + 3
SCHEMES = ["w2a16-g32-asym", "w3a16-g16", "w4a16-g32", "w4a16-g32-asym", "w4a16", "w8a16-tensor", "w4a8-g32", "w8a8",
           "w8a8-dynamic-asym", "w8a8-static", "w8a8-static-asym"]  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(scheme: str, learn: str, steps: int = 4) -> nn.Module:
    options = QatOptions(FakeOptions(learn=learn, warmup=2, freeze=3))
    model = prepare(TINY["llama"](), QuantScheme.parse(scheme), options=options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = [step(model, optimizer) for _ in range(steps)]
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("learn", ["steps", "ranges", "nothing"])
def test_the_converted_model_has_the_logits_of_the_fake_quantized_one(scheme: str, learn: str) -> None:
    model = trained(scheme, learn)
    with torch.no_grad():
        before = model(IDS).logits
        fast = convert(model)(IDS).logits
        with use("reference"):
            after = model(IDS).logits
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 21
    assert torch.allclose(before, after, rtol=0, atol=2e-5)
    # an int8 product sums integers where the fake one sums floats, and a last bit can flip a later activation's code
    assert torch.allclose(before, fast, rtol=0, atol=0.1)


def test_preparing_in_bfloat16_stores_the_scales_that_the_training_used() -> None:
    model = prepare(TINY["llama"]().bfloat16(), QuantScheme.parse("w4a16-g32-asym"))
    with torch.no_grad():
        before, after = model(IDS).logits, convert(model)(IDS).logits
    assert torch.equal(before, after)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16


@pytest.mark.parametrize("learn", ["steps", "ranges"])
def test_every_scale_gets_a_gradient(learn: str) -> None:
    scheme = QuantScheme.parse("w3a16-g32-asym")
    model = prepare(TINY["llama"](), scheme, options=QatOptions(FakeOptions(learn=learn))).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    scales = scale_parameters(model)
    assert len(scales) == 42
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scales)
    assert sum(int(p.grad.count_nonzero()) for p in scales) > 0


def test_static_activations_warm_up_and_freeze() -> None:
    options = QatOptions(FakeOptions(warmup=2, freeze=4))
    model = prepare(nn.Sequential(nn.Linear(32, 16)), QuantScheme.parse("w8a8-static"), options=options).train()
    layer, x = model[0], torch.randn(8, 32)
    assert torch.equal(layer.fake_input(x), x)
    assert torch.equal(layer.fake_input(x), x)
    assert not torch.equal(layer.fake_input(x), x)
    layer.fake_input(x)
    frozen = layer.input_low.clone(), layer.input_high.clone()
    assert torch.allclose(frozen[1], x.max())
    layer.fake_input(10 * x)
    assert (layer.input_low, layer.input_high) == frozen
    layer.eval().fake_input(x)
    assert layer.input_seen == 5


def test_gradient_checkpointing_changes_neither_losses_nor_counters() -> None:
    results = []
    for checkpointing in (False, True):
        options = QatOptions(FakeOptions(warmup=1, freeze=3))
        model = prepare(TINY["llama"](), QuantScheme.parse("w4a8-static"), options=options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        results.append(([step(model, optimizer) for _ in range(4)], model.model.layers[0].mlp.up_proj.input_seen))
    assert results[0] == results[1]


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_parameters() -> None:
    model = prepare(TINY["llama"](), QuantScheme.parse("w4a16-g32")).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.grad.dtype == layer.weight_scale.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(("scheme", "backend"), [("w4a16-g32-asym", "aot_eager"), ("w8a8-static", "eager")])
def test_a_layer_compiles_without_a_graph_break(scheme: str, backend: str) -> None:
    torch.manual_seed(0)
    options = QatOptions(FakeOptions(warmup=0))
    model = prepare(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), QuantScheme.parse(scheme), options=options
    )
    x = torch.randn(8, 64)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    found.square().sum().backward()
    torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-4)
    assert all(
        torch.allclose(p.grad, g, rtol=1e-3, atol=1e-4) for p, g in zip(model.parameters(), gradients, strict=True)
    )


def test_training_from_a_solved_model_begins_where_it_ended() -> None:
    scheme = QuantScheme.parse("w4a16-g32-asym")
    solved = convert(prepare(TINY["llama"](), scheme, options=QatOptions(initial="minmax")))
    model = prepare(TINY["llama"](), scheme, start=solved)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, solved(IDS).logits, atol=1e-5)
    with pytest.raises(InputError, match="shall start from a layer quantized as w8a16"):
        prepare(TINY["llama"](), QuantScheme.parse("w8a16"), start=solved)


def test_rules_choose_layers_and_schemes() -> None:
    rules = (Rule("*.down_proj", QuantScheme.parse("w8a16")), Rule("*.q_proj", None))
    model = prepare(TINY["llama"](), QuantScheme.parse("w4a16-g32"), rules)
    layer = model.model.layers[0]
    assert str(layer.mlp.down_proj.scheme) == "w8a16"
    assert type(layer.self_attn.q_proj) is nn.Linear
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prepare(net, QuantScheme.parse("w4a16"), (Rule("1", None),))
    assert [type(module) for module in net] == [FakeQuantLinear, nn.Linear]


def test_what_cannot_be_trained_or_converted_is_refused() -> None:
    with pytest.raises(SchemeError, match="nf4-b64 is none"):
        prepare(nn.Sequential(nn.Linear(64, 64)), QuantScheme.parse("nf4-b64"))
    with pytest.raises(SchemeError, match="does not divide"):
        prepare(nn.Sequential(nn.Linear(48, 64)), QuantScheme.parse("w4a16-g32"))
    with pytest.raises(InputError, match=r"call lowbit\.qat\.prepare first"):
        convert(nn.Linear(8, 8))
    static = prepare(nn.Sequential(nn.Linear(64, 64)), QuantScheme.parse("w8a8-static"))
    with pytest.raises(InputError, match="has seen 0 training forwards"):
        convert(static)
    diverged = prepare(nn.Sequential(nn.Linear(64, 64)), QuantScheme.parse("w4a16"))
    with torch.no_grad():
        diverged[0].weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="training diverged"):
        convert(diverged)


def test_a_grid_that_a_solver_gave_lies_in_memory_as_a_kernel_reads_it() -> None:
    """As a transposed view the kernel read zero-points in the wrong order, and the optimizer went slow."""
    scheme, start = QuantScheme.parse("w2a16-g32-asym"), prepare(TINY["llama"](), QuantScheme.parse("w2a16-g32-asym"))
    start = convert(start)
    packed = start.model.layers[0].mlp.up_proj.packed
    assert packed.zero_points().is_contiguous()
    student = prepare(TINY["llama"](), scheme, start=start)
    assert all(parameter.is_contiguous() for parameter in student.parameters())
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight_zero, packed.zero_points().float())
    with torch.no_grad():
        assert torch.allclose(student(IDS).logits, start(IDS).logits, rtol=0, atol=2e-5)


def test_masters_are_float32_in_a_16_bit_model_that_computes_as_without_them() -> None:
    scheme = QuantScheme.parse("w4a16-g32-asym")
    options = QatOptions(FakeOptions(masters=True))
    plain = prepare(TINY["llama"]().bfloat16(), scheme)
    model = prepare(TINY["llama"]().bfloat16(), scheme, options=options)
    fakes = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    assert {module.weight.dtype for module in fakes} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    before = fakes[0].weight.detach().clone()
    optimizer = torch.optim.AdamW([module.weight for module in fakes], lr=1e-6)
    step(model, optimizer)
    moved = (fakes[0].weight - before).abs()
    assert 0 < moved.max() < 2e-6  # far below half a step of bfloat16 at weights of 0.02: 6e-5
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(convert(model)(IDS).logits, logits)
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16
