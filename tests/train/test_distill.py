"""Oracle: torch's autograd on the definition of KL."""

from pathlib import Path

import pytest
import torch
from architectures import TINY

from lowbit.errors import CheckpointError, InputError
from lowbit.numerics.metrics import kl_divergence
from lowbit.observe.tokens import Tokens
from lowbit.train.distill import CachedTeacher, Teacher, kl_loss, next_token_loss, top_kl_loss


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(3, 700, 50, generator=torch.Generator().manual_seed(seed))


def test_loss_and_gradient_are_those_of_the_definition() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = kl_loss(student, teacher)
    (2 * loss).backward()
    plain = student.detach().clone().requires_grad_()
    expected = kl_divergence(teacher, plain).mean()
    (2 * expected).backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(student.grad, plain.grad, atol=1e-8, rtol=1e-3)


def test_the_loss_of_the_likeliest_tokens_and_a_bucket_is_a_lower_bound_with_its_own_gradient() -> None:
    student, teacher = logits(0).double().float().requires_grad_(), logits(1)
    top = torch.log_softmax(teacher, -1).topk(8, -1)
    loss = top_kl_loss(student, top.values, top.indices.int())
    loss.backward()
    plain = student.detach().clone().requires_grad_()
    log_q = torch.log_softmax(plain, -1)
    named = log_q.gather(-1, top.indices)
    p, rest_q = top.values.exp(), 1 - named.exp().sum(-1)
    rest_p = 1 - p.sum(-1)
    expected = ((p * (top.values - named)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert torch.allclose(student.grad, plain.grad, atol=1e-7, rtol=1e-2)
    assert loss < kl_loss(student, teacher)


def test_a_cached_teacher_says_nearly_what_the_teacher_says(tmp_path: Path) -> None:
    teacher, student = TINY["llama"](), TINY["llama"]()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = Tokens(torch.randint(3, 128, (6, 16)), "random")
    CachedTeacher.of(teacher, tokens, k=120, batch=4).save(tmp_path / "teacher.safetensors")
    cached = CachedTeacher.load(tmp_path / "teacher.safetensors", tokens)
    windows = torch.tensor([5, 2])
    with torch.no_grad():
        exact = Teacher(teacher)(student, tokens.ids[windows], windows)
        near = cached(student, tokens.ids[windows], windows)
        assert Teacher(teacher)(teacher, tokens.ids, windows).abs() < 1e-6
        assert next_token_loss(student, tokens.ids, windows) > 0
    assert torch.allclose(exact, near, rtol=0.02)
    with pytest.raises(InputError, match="other tokens"):
        CachedTeacher.load(tmp_path / "teacher.safetensors", Tokens(tokens.ids + 0 * 1 - 1, "others"))
    (tmp_path / "teacher.safetensors").write_bytes(b"no file")
    with pytest.raises(CheckpointError, match="no teacher's cache"):
        CachedTeacher.load(tmp_path / "teacher.safetensors", tokens)
