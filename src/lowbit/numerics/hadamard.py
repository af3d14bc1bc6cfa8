"""Random Hadamard rotations: orthogonal matrices that spread one large value over all columns of its block.

    x Q,   Q = diag(signs) (I_{K/B} (x) H_m (x) H_2 (x) ... (x) H_2) / sqrt(B)         B = m 2^k divides K

H_2 is [[1, 1], [1, -1]], so its Kronecker powers cost k additions a value (Walsh and Hadamard's butterfly). H_m is a
Hadamard matrix of order m, by Paley's two constructions (J. Math. and Phys. 12, 1933): m = q + 1 for a prime q of
3 mod 4, or m = 2 (q + 1) for a prime q of 1 mod 4. So 576 = 36 16 and 1536 = 12 128 are rotated whole. A size that
has no such product is rotated in blocks of the largest divisor that has one.

Signs come from a generator that is written down here (splitmix64: Steele, Lea and Flood, OOPSLA 2014), so that a seed
means the same rotation in every version of torch. A rotation is written hadamard-K-sSEED, or hadamard-K-bBLOCK-sSEED.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import SchemeError

_TEXT = re.compile(r"hadamard-(?P<size>[1-9]\d*)(?:-b(?P<block>[1-9]\d*))?-s(?P<seed>\d+)")
_LARGEST_PALEY = 256
_STEP = 64  # the largest power of two that one product takes


@dataclass(frozen=True)
class Hadamard:
    """The rotation Q [size, size] in blocks of `block` columns, with the signs of `seed`.

    Raises SchemeError for a block that does not divide the size or has no Hadamard matrix.
    """

    size: int
    block: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size % self.block or factors(self.block) is None:
            raise SchemeError(
                f"there is no Hadamard rotation of {self.size} columns in blocks of {self.block}; "
                f"use blocks of {largest_block(self.size)}"
            )

    @classmethod
    def of(cls, size: int, block: int | None = None, seed: int = 0) -> "Hadamard":
        """The rotation of `size` columns, whole where that is possible; block: the largest block wanted."""
        return cls(size, largest_block(size, block), seed)

    def __str__(self) -> str:
        return f"hadamard-{self.size}" + f"-b{self.block}" * (self.block < self.size) + f"-s{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Hadamard":
        """The rotation that `text` writes. Raises SchemeError."""
        if (match := _TEXT.fullmatch(text)) is None:
            raise SchemeError(f"unknown rotation {text!r}; one is written hadamard-1536-s0 or hadamard-1536-b512-s0")
        size = int(match["size"])
        return cls(size, int(match["block"] or size), int(match["seed"]))

    def apply(self, x: Tensor) -> Tensor:
        """x Q for x [..., K], computed in float32 (float64 for float64), in x's dtype."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        signs = signs_of(self.size, self.seed, x.device).to(wide.dtype)
        return _transform(wide * signs, self.block, inverse=False).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        """x Q^T: the inverse of `apply`."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        signs = signs_of(self.size, self.seed, x.device).to(wide.dtype)
        return (_transform(wide, self.block, inverse=True) * signs).to(x.dtype)


def _transform(x: Tensor, block: int, inverse: bool) -> Tensor:
    """x [..., K] times the unsigned matrix, or its transpose, block by block."""
    found = factors(block)
    assert found is not None
    order, power = found
    axes = [order] if order > 1 else []
    while power > 1:
        axes.append(min(power, _STEP))
        power //= axes[-1]
    y = x.reshape(-1, *axes) * block**-0.5  # [..., K] -> [rows, m, p, ...]
    for axis, size in enumerate(axes, 1):
        h = hadamard_matrix(size, x.device).to(x.dtype)
        y = (y.movedim(axis, -1) @ (h.T if inverse else h)).movedim(-1, axis)
    return y.reshape(x.shape)


@cache
def factors(n: int) -> tuple[int, int] | None:
    """(m, 2^k) with n = m 2^k and a Hadamard matrix of order m, the smallest m there is; m = 1 for powers of two."""
    power = n & -n
    if power == n:
        return 1, n
    while power >= 1:
        order = n // power
        if order <= _LARGEST_PALEY and _paley_prime(order) is not None:
            return order, power
        power //= 2
    return None


def largest_block(size: int, at_most: int | None = None) -> int:
    """The largest divisor of `size` (not above at_most) that has a Hadamard matrix here."""
    bound = min(size, at_most or size)
    return next(n for n in range(bound, 0, -1) if size % n == 0 and factors(n) is not None)


def _paley_prime(order: int) -> int | None:
    """The prime behind a Paley matrix of this order: order - 1 of 3 mod 4, or order / 2 - 1 of 1 mod 4."""
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == rest and q > 1 and all(q % d for d in range(2, int(q**0.5) + 1)):
            return q
    return None


@cache
def hadamard_matrix(n: int, device: torch.device | None = None) -> Tensor:
    """A matrix of +1 and -1, float32 [n, n], with H H^T = n I; n a power of two, or the order of a Paley matrix."""
    return _matrix(n).to(device or "cpu")


@cache
def _matrix(n: int) -> Tensor:
    if n & (n - 1) == 0:
        h = torch.ones(1, 1)
        while len(h) < n:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        return h
    q = _paley_prime(n)
    assert q is not None, f"no Hadamard matrix of order {n}"
    return _paley(q, twice=q != n - 1)


def _paley(q: int, twice: bool) -> Tensor:
    """Paley's matrix from the quadratic residues of a prime q: order q + 1, or 2 (q + 1) where `twice`."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
    residues = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]  # [q, q], i - j mod q
    s = torch.zeros(q + 1, q + 1)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1 if twice else -1, residues
    if not twice:
        return s + torch.eye(q + 1)
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(s, plus) + torch.kron(torch.eye(q + 1), minus)


@cache
def signs_of(size: int, seed: int, device: torch.device | None = None) -> Tensor:
    """+1 or -1 for each column, float32 [size], from `seed`."""
    return _signs(size, seed).to(device or "cpu")


@cache
def _signs(size: int, seed: int) -> Tensor:
    mask, state, words = 2**64 - 1, seed, []
    for _ in range(-(-size // 64)):
        state = (state + 0x9E3779B97F4A7C15) & mask
        word = state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        words.append(word ^ (word >> 31))
    return torch.tensor([1.0 - 2.0 * (words[i // 64] >> (i % 64) & 1) for i in range(size)])
