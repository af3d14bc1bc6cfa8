"""A small classifier in few bits: round it after training (PTQ), or train it rounded (QAT)?

    python examples/digits.py

The data are scikit-learn's handwritten digits, 8 x 8 pixels, 1797 of them; the network has three linear layers. Each is
quantized to 2, 3, 4 and 8 bits a weight, one scale a channel, and activations stay in floats. PTQ rounds the trained
weights on min/max grids, once plainly and once with searched clips; QAT begins with the latter and trains weights and
step sizes (LSQ) for 30 epochs more. Both are converted, and the converted networks are the ones that are tested.
"""

import copy
import time
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit

EPOCHS, BATCH = 30, 64


@dataclass(frozen=True)
class Digits:
    """Pixels in [0, 1], float32 [n, 64], and classes, int64 [n]; a third is held out."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls) -> "Digits":
        found = load_digits()
        x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[:1198], order[1198:]
        return cls(x[train], y[train], x[test], y[test])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def fit(model: nn.Module, digits: Digits, lr: float) -> nn.Module:
    """Train for EPOCHS epochs by Adam, the learning rate falling to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(digits.x), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(digits.x[chosen]), digits.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of held-out digits that are told right, in per cent."""
    return 100 * (model(digits.x_test).argmax(-1) == digits.y_test).float().mean().item()


def rounded(model: nn.Module, scheme: lowbit.QuantScheme, initial: str) -> nn.Module:
    """PTQ: a copy whose weights are rounded on grids that no training has moved."""
    fake = lowbit.qat.prepare(copy.deepcopy(model), scheme, options=lowbit.qat.QatOptions(initial=initial))
    return lowbit.qat.convert(fake)


def trained(model: nn.Module, scheme: lowbit.QuantScheme, digits: Digits) -> nn.Module:
    """QAT: a copy that is trained under the rounding."""
    return lowbit.qat.convert(fit(lowbit.qat.prepare(copy.deepcopy(model), scheme), digits, lr=2e-3))


def compare(digits: Digits, model: nn.Module, bits: tuple[int, ...] = (8, 4, 3, 2)) -> dict[int, tuple[float, ...]]:
    """Bits -> accuracy in per cent of PTQ with min/max grids, PTQ with searched clips, and QAT."""
    table = {}
    for count in bits:
        scheme = lowbit.QuantScheme.parse(f"w{count}a16")
        candidates = (
            rounded(model, scheme, "minmax"),
            rounded(model, scheme, "mse"),
            trained(model, scheme, digits),
        )
        table[count] = tuple(accuracy(candidate, digits) for candidate in candidates)
    return table


def main() -> None:
    started, digits = time.perf_counter(), Digits.load()
    model = fit(network(), digits, lr=5e-3)
    print(f"floats: {accuracy(model, digits):.1f}% of {len(digits.y_test)} held-out digits")
    print("bits   PTQ min/max   PTQ clipped    QAT")
    for bits, (plain, clipped, learned) in compare(digits, model).items():
        print(f"{bits:4}   {plain:10.1f}%   {clipped:10.1f}%   {learned:5.1f}%")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
