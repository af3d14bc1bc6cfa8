"""Oracle: bitsandbytes' optimizers on a CPU, bit for bit; torch's own AdamW for the size of the difference."""

import copy
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lowbit.errors import CheckpointError, InputError
from lowbit.numerics.codebook import state_levels
from lowbit.train.optim import Adam8bit, AdamW4bit, AdamW8bit, Lion8bit, SGD8bit, StateOptions, parameter_groups
from lowbit.train.states import decode_state, encode_state

PAIRS = {
    "adamw": (AdamW8bit, bnb.optim.AdamW8bit, {"lr": 1e-3, "weight_decay": 0.1}),
    "adam": (Adam8bit, bnb.optim.Adam8bit, {"lr": 1e-3}),
    "lion": (Lion8bit, bnb.optim.Lion8bit, {"lr": 1e-4, "weight_decay": 0.1}),
    "sgd": (SGD8bit, bnb.optim.SGD8bit, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
}
NAMES = {"exp_avg": "1", "momentum_buffer": "1", "exp_avg_sq": "2"}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 96), (5000,), (4097,), (16, 16)]  # whole blocks, tails, and one too small for 8 bits
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            generator = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (-step % 3)
            gradient.view(-1)[:300] = 0  # a block of zeros and zeros beside numbers
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PAIRS)
def test_states_and_parameters_are_bitwise_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    make, make_theirs, options = PAIRS[name]
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, their_optimizer = make(ours, **options), make_theirs(theirs, **options)
    train(optimizer, 5)
    train(their_optimizer, 5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        for key, value in optimizer.state[mine].items():
            if key == "step":
                continue
            kind = "absmax" if key.endswith("_absmax") else "state"
            expected = their_optimizer.state[other][kind + NAMES[key.removesuffix("_absmax")]]
            assert torch.equal(value.view(-1), expected.view(-1)), (key, mine.shape)


def test_small_tensors_and_embeddings_keep_float32_states() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(128, 64), "linear": nn.Linear(128, 64), "norm": nn.LayerNorm(64)})
    optimizer = AdamW8bit(parameter_groups(model, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    dtypes = {name: optimizer.state[parameter]["exp_avg"].dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.uint8} == {"linear.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize("make", [AdamW8bit, Adam8bit, Lion8bit, SGD8bit, AdamW4bit])
def test_training_resumes_bit_equal_from_a_state_dict(make: type, tmp_path: Path) -> None:
    whole, halves = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(make(whole), 6)
    first = make(halves)
    train(first, 3)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = make(halves)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(second, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_no_gradient_is_kept_alive() -> None:
    ours = parameters()
    optimizer = AdamW8bit(ours)
    train(optimizer, 1)
    gradient = weakref.ref(ours[0].grad)
    optimizer.zero_grad()
    assert gradient() is None


def damaged(state_dict: dict, kind: str) -> dict:
    state = state_dict["state"][0]
    if kind == "missing":
        del state["exp_avg_sq"]
    elif kind == "truncated":
        state["exp_avg"] = state["exp_avg"][:-1]
    elif kind == "nan":
        state["exp_avg_absmax"][3] = torch.nan
    elif kind == "dtype":
        state["exp_avg_absmax"] = state["exp_avg_absmax"].bfloat16()
    else:
        state_dict["param_groups"][0]["params"].pop()
    return state_dict


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "lacks 'exp_avg_sq'"),
        ("truncated", "belongs to another model"),
        ("nan", "load an earlier checkpoint"),
        ("dtype", "bfloat16"),
        ("groups", "other parameter groups"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(kind: str, message: str) -> None:
    ours = parameters()
    optimizer = AdamW8bit(ours)
    train(optimizer, 2)
    before = {key: value.clone() for key, value in optimizer.state[ours[0]].items() if key != "step"}
    copied = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(damaged(copied, kind))
    assert all(torch.equal(before[key], optimizer.state[ours[0]][key]) for key in before)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="lr is -1"):
        AdamW8bit(parameters(), lr=-1)
    with pytest.raises(InputError, match="betas"):
        AdamW8bit(parameters(), betas=(0.9, 1.0))
    optimizer = AdamW8bit(parameters(), options=StateOptions(bits=5))
    with pytest.raises(InputError, match="choose 8, 4 or 32"):
        train(optimizer, 1)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_a_4_bit_state_takes_the_nearest_of_16_levels(signed: bool) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    codes, absmax = encode_state(x, 4, signed)
    decoded = decode_state(codes, absmax, 1000, 4, signed)
    table = state_levels(4, signed)
    assert codes.numel() == 500
    assert absmax.numel() == 8
    assert table.numel() == 16
    assert signed or (table > 0).all()
    scale = absmax.repeat_interleave(128)[:1000]
    best = (x[:, None] / scale[:, None] - table).abs().min(1).values
    assert torch.allclose((x / scale - decoded / scale).abs(), best, atol=1e-6)


def regression_loss(make: type, seed: int, **options: object) -> float:
    """The loss after 150 steps of a small network on a fixed teacher."""
    torch.manual_seed(seed)
    teacher, x = nn.Linear(64, 64), torch.randn(256, 64)
    y = teacher(x).tanh().detach()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = make(model.parameters(), lr=3e-3, weight_decay=0.0, **options)
    for _ in range(150):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(("make", "within"), [(AdamW8bit, 0.15), (AdamW4bit, 2.0)], ids=["8 bits", "4 bits"])
def test_few_bits_train_as_well_as_32(make: type, within: float) -> None:
    seeds = range(3)
    full = sum(regression_loss(torch.optim.AdamW, seed) for seed in seeds)
    few = sum(regression_loss(make, seed) for seed in seeds)
    assert few < full * (1 + within)
