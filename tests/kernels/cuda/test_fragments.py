"""The fragment layouts that the .cu files draw, run by hand: ldmatrix and mma as the PTX ISA has them.

Oracle: a product in 64 bits. It shows that the Turing rung's layout is the documented one, on any machine.
"""

import torch
from torch import Tensor

LANES = torch.arange(32)
G, T = LANES // 4, LANES % 4


def _ldmatrix(rows: Tensor) -> Tensor:
    """rows uint8-like [32, 16], the 16 bytes at each lane's address -> registers [4, 32 lanes, 4 bytes]."""
    matrices = rows.view(4, 8, 16)
    return torch.stack([matrix[G].view(32, 4, 4)[LANES, T] for matrix in matrices])  # lane 4g + t: row g, bytes 4t..


def _mma_m8n8k16(x: Tensor, w: Tensor) -> Tensor:
    """x, w [32 lanes, 4 bytes] -> sums [32 lanes, 2]."""
    a, b = torch.zeros(8, 16, dtype=torch.long), torch.zeros(16, 8, dtype=torch.long)
    for byte in range(4):
        a[G, 4 * T + byte] = x[:, byte].long()
        b[4 * T + byte, G] = w[:, byte].long()
    d = a @ b
    return torch.stack([d[G, 2 * T], d[G, 2 * T + 1]], 1)


def _mma_m16n8k32(a: Tensor, b: Tensor) -> Tensor:
    """a [4, 32 lanes, 4 bytes], b [2, 32 lanes, 4 bytes] -> sums [32 lanes, 4]."""
    left, right = torch.zeros(16, 32, dtype=torch.long), torch.zeros(32, 8, dtype=torch.long)
    for byte in range(4):
        for i in range(4):
            left[G + i % 2 * 8, i // 2 * 16 + 4 * T + byte] = a[i, :, byte].long()
        for i in range(2):
            right[i * 16 + 4 * T + byte, G] = b[i, :, byte].long()
    d = left @ right
    return torch.stack([d[G, 2 * T], d[G, 2 * T + 1], d[G + 8, 2 * T], d[G + 8, 2 * T + 1]], 1)


def _codes(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)


def test_a_warp_of_int8_mma_m8n8k16_makes_its_64_by_32_outputs() -> None:
    x, w = _codes(64, 64, 0), _codes(32, 64, 1)
    out = torch.zeros(64, 32, dtype=torch.long)
    for slab in range(4):
        a = [_ldmatrix(x[half * 32 + LANES, slab * 16 : slab * 16 + 16]) for half in range(2)]
        b = _ldmatrix(w[LANES, slab * 16 : slab * 16 + 16])
        for i in range(8):
            for j in range(4):
                sums = _mma_m8n8k16(a[i // 4][i % 4], b[j])
                for c in range(2):
                    out[i * 8 + G, j * 8 + T * 2 + c] += sums[:, c]
    assert torch.equal(out, x.long() @ w.long().T)


def test_a_warp_of_int8_mma_m16n8k32_makes_its_64_by_64_outputs() -> None:
    x, w = _codes(64, 64, 2), _codes(64, 64, 3)
    swizzled = {}
    for name, matrix in (("x", x), ("w", w)):
        stage = torch.zeros(64, 4, 16, dtype=torch.int8)
        for row in range(64):
            for chunk in range(4):
                stage[row, chunk ^ (row // 2 % 4)] = matrix[row, chunk * 16 : chunk * 16 + 16]
        swizzled[name] = stage

    def fetch(name: str, row: Tensor, chunk: Tensor) -> Tensor:
        return _ldmatrix(swizzled[name][row, chunk ^ (row // 2 % 4)])

    out = torch.zeros(64, 64, dtype=torch.long)
    for k in range(2):
        a = [fetch("x", i * 16 + LANES % 16, k * 2 + LANES // 16) for i in range(4)]
        b = [fetch("w", j * 16 + LANES % 8 + LANES // 16 * 8, k * 2 + LANES // 8 % 2) for j in range(4)]
        for i in range(8):
            for j in range(8):
                sums = _mma_m16n8k32(a[i // 2], b[j // 2][j % 2 * 2 : j % 2 * 2 + 2])
                for c in range(2):
                    out[i * 8 + G, j * 8 + T * 2 + c] += sums[:, i % 2 * 2 + c]
    assert torch.equal(out, x.long() @ w.long().T)


def test_rows_that_ldmatrix_reads_together_lie_in_different_banks() -> None:
    for chunk in range(4):
        for first in range(0, 64, 8):
            rows = torch.arange(first, first + 8)
            addresses = rows * 64 + (chunk ^ (rows // 2 % 4)) * 16
            assert len(set((addresses // 16 % 8).tolist())) == 8
