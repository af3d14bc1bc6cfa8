"""Training's kernels and graphs on a GPU. Oracles: numerics/fake.py under autograd, KL in float64, an eager run."""

import logging

import pytest
import torch
from architectures import TINY
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.kernels import fake as kernels
from lowbit.kernels import nibbles_triton
from lowbit.model.capturable import Capturable
from lowbit.nn.fake import FakeOptions
from lowbit.numerics import fake
from lowbit.numerics.affine import choose_scale, value_range
from lowbit.numerics.scheme import QuantScheme
from lowbit.optional import installed
from lowbit.tensors import PackedWeight
from lowbit.train.distill import Objective, Teacher, frozen, kl_loss, next_token_loss
from lowbit.train.loop import LoopOptions, train
from lowbit.train.optim import AdamW8bit, StateOptions
from lowbit.train.qat import QatOptions, convert, prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not installed("triton"), reason="triton is not installed")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
WINDOWS = torch.randint(3, 128, (12, 16), generator=torch.Generator().manual_seed(0))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def model() -> PreTrainedModel:
    return TINY["llama"]().bfloat16().cuda()


@DTYPES
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16 scales", "fp32 scales"])
@pytest.mark.parametrize("text", ["w4a16-g64", "w2a16-g64-asym", "w4a16", "w3a16-g48-asym"])
def test_fake_weights_and_their_gradients_are_those_of_the_reference(
    text: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    scheme, w, dy = QuantScheme.parse(text), random(576, 576) * 0.2, random(576, 576, seed=1).to(dtype)
    scale, zero = choose_scale(*value_range(w, scheme.weights), scheme.weights, torch.float32)
    grid = [scale * 0.8, None if zero is None else (zero.float() + 0.3).T.contiguous().T]  # as a solver leaves it
    ours, theirs = ([None if one is None else one.clone().requires_grad_() for one in (w, *grid)] for _ in range(2))
    expected = fake.fake_quantize(*theirs, scheme.weights, stored).to(dtype)
    expected.backward(dy)
    found = kernels.fake_weight(*ours, scheme, stored, dtype)
    found.backward(dy)
    assert torch.equal(found, expected)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    for one, other in zip(ours[1:], theirs[1:], strict=True):  # sums of up to 576 terms in another order
        assert one is None or (one.grad - other.grad).norm() < 1e-5 * other.grad.norm()


@DTYPES
@pytest.mark.parametrize("text", ["w4a4-g64", "w4a4-g64-dynamic-asym", "w8a8"])
def test_fake_activations_are_bitwise_those_of_the_reference(text: str, dtype: torch.dtype) -> None:
    scheme, x = QuantScheme.parse(text), random(4, 70, 576).to(dtype)
    x[0, 0] = 0
    # on a CPU: torch divides by a number there, where on CUDA it multiplies with the number's inverse
    expected = fake.fake_quantize_dynamic(x.cpu(), scheme.activations)
    assert torch.equal(kernels.fake_activations(x, scheme).cpu(), expected)


@DTYPES
@pytest.mark.parametrize("text", ["w8a8-static", "w8a8-static-asym"])
def test_static_activations_and_their_gradients_are_those_of_the_reference(text: str, dtype: torch.dtype) -> None:
    scheme, x, dy = QuantScheme.parse(text), random(2, 71, 576), random(2, 71, 576, seed=1).to(dtype)
    scale, zero = choose_scale(*value_range(x, scheme.activations), scheme.activations, torch.float32)
    grid = [scale * 0.8, None if zero is None else zero.float()]
    ours, theirs = ([None if one is None else one.clone().requires_grad_() for one in (x, *grid)] for _ in range(2))
    expected = fake.fake_quantize(*theirs, scheme.activations, torch.bfloat16).to(dtype)
    expected.backward(dy)
    found = kernels.fake_inputs(*ours, scheme, torch.bfloat16, dtype)
    found.backward(dy)
    assert torch.equal(found, expected)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    for one, other in zip(ours[1:], theirs[1:], strict=True):  # sums of 81792 terms in another order
        assert one is None or (one.grad - other.grad).norm() < 1e-4 * other.grad.norm()


def test_kl_and_its_gradient_are_those_of_float64() -> None:
    logits = (3 * random(64, 49152)).bfloat16()
    wanted = (logits.float() + random(64, 49152, seed=1)).bfloat16()
    log_p, log_q = wanted.double().log_softmax(-1), logits.double().log_softmax(-1)
    expected, gradient = (log_p.exp() * (log_p - log_q)).sum(-1).mean(), (log_q.exp() - log_p.exp()) / 64
    leaf = logits.requires_grad_()
    loss = kl_loss(leaf, wanted)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-4 * expected.item()
    assert (leaf.grad.double() - gradient).norm() < 4e-3 * gradient.norm()  # the gradient is rounded to bf16: 2^-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("text", ["nf4-b64-dq", "nf4-b64", "fp4-b64-dq"])
def test_nibbles_decode_to_the_bits_of_the_reference(text: str, dtype: torch.dtype) -> None:
    weight = PackedWeight.from_float((random(1024, 512) * 0.02).to(dtype), QuantScheme.parse(text), dtype)
    x = torch.empty(1, 512, dtype=dtype, device="cuda")
    assert nibbles_triton.refusal(x, weight) is None
    assert torch.equal(nibbles_triton.dequantize(x, weight), weight.dequantize(dtype))


def trained(scheme: str, graphed: bool, distilled: bool) -> tuple[nn.Module, list[float]]:
    """A bfloat16 student with masters after 30 steps, and its losses; it starts where rounding left its grids."""
    start = convert(prepare(model(), QuantScheme.parse(scheme))) if "static" not in scheme else None
    options = QatOptions(FakeOptions(masters=True, warmup=5, freeze=20))
    student, teacher = prepare(model(), QuantScheme.parse(scheme), options=options, start=start), model()
    frozen([teacher])
    objective: Objective = Teacher(Capturable(teacher)) if distilled else next_token_loss
    optimizer = AdamW8bit(student.parameters(), lr=1e-3, options=StateOptions(min_size=1))
    run = train(Capturable(student), WINDOWS, objective, optimizer, LoopOptions(30, 4, 2, graphed=graphed))
    return student.eval(), run.losses


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "next token"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g32-asym", "w4a4-g32-dynamic-asym", "w8a8-static"])
def test_a_graphed_run_has_the_losses_of_an_eager_one(
    scheme: str, distilled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        student, graphed = trained(scheme, True, distilled)
        _, eager = trained(scheme, False, distilled)
    assert "not contiguous" not in caplog.text
    assert graphed[0] == pytest.approx(eager[0], rel=1e-2, abs=1e-3)
    assert sum(graphed[-5:]) == pytest.approx(sum(eager[-5:]), rel=0.1, abs=5e-3)
    if "a16" in scheme:
        with torch.no_grad():
            before = student(WINDOWS.cuda()).logits
            after = convert(student)(WINDOWS.cuda()).logits
        assert (after - before).norm() < 3e-2 * before.norm()


def test_the_optimizer_says_when_a_strided_parameter_makes_it_slow(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(random(64, 128).T)
    parameter.grad = torch.ones_like(parameter)
    with caplog.at_level(logging.WARNING, "lowbit"):
        AdamW8bit([parameter]).step()
    assert "[128, 64] or its gradient is not contiguous; make it so before training" in caplog.text
