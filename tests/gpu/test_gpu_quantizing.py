"""Quantizing on a GPU. Oracles: the same solver on the CPU, the original's own answers, x^T x in float64."""

from pathlib import Path

import pytest
import torch
from saved import save_tiny

import lowbit
from lowbit import Calibration, Conditions, InputError, QuantScheme, judge, recipe_at
from lowbit.io.source import load_float, open_source
from lowbit.observe.moments import CrossMoment, SecondMoment
from lowbit.observe.tokens import Tokens

WINDOWS = torch.randint(3, 100, (32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("level", [2, 4])
def test_every_effort_runs_on_a_gpu(level: int, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    conditions = Conditions(Calibration(WINDOWS), evaluation=None, device="cuda")
    report = lowbit.quantize(model, tmp_path / "out", recipe_at(QuantScheme.parse("w4a16-g32-asym"), level), conditions)
    assert any("windows kept apart" in words for words in (*report.notes, *report.warnings))


def test_a_reference_answers_after_its_model_went_home(tmp_path: Path) -> None:
    with open_source(save_tiny("llama", tmp_path / "model")) as source:
        model = load_float(source, torch.float32).to("cuda")
    reference = judge.Reference.of(model, Tokens(WINDOWS[:4], "random"))
    model.to("cpu")
    model.to("cuda")
    assert judge.fidelity(model, reference).kld == pytest.approx(0, abs=1e-6)
    model.to("cpu")
    assert reference.head(reference.hidden[0].to("cuda")).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_moments_are_those_of_all_tokens_at_once(dtype: torch.dtype) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    d = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    moment, cross = SecondMoment(96, torch.device("cuda")), CrossMoment(40, 96, torch.device("cuda"))
    for xs, ds in zip(x.cuda().split(16), d.cuda().split(16), strict=True):
        moment.update(xs)
        cross.update(ds, xs)
    # 64 products and sums in float32, each rounded once: 65 * 2^-24 of E[|x_i x_j|] <= about 1
    torch.testing.assert_close(moment.value.cpu().double(), x.double().T @ x.double() / 64, rtol=0, atol=2e-5)
    torch.testing.assert_close(cross.value.cpu().double(), d.double().T @ x.double() / 64, rtol=0, atol=2e-5)
    assert torch.equal(moment.value, moment.value.T)


def test_activations_that_are_not_finite_are_refused_when_the_moment_is_read() -> None:
    x = torch.randn(8, 16, device="cuda")
    x[3, 4] = torch.inf
    moment = SecondMoment(16, torch.device("cuda"))
    moment.update(x)
    with pytest.raises(InputError, match="not finite"):
        _ = moment.value
