"""The oracle is compressed-tensors: nvfp4 and mxfp4 codes, scales and weights, and fp8 tiles, bit for bit."""

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.kernels import reference
from lowbit.nn.linear import QuantLinear
from lowbit.numerics import affine, microscale
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

N, K = 24, 96


def make_weight(rows: int = N, columns: int = K) -> Tensor:
    """Rows of very different size, one of zeros, and values that are ties of the 4-bit grid."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * 10 ** (2 * torch.rand(rows, 1, generator=generator) - 1)
    w[0] = 0
    w[1, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    w[1, 8:] = w[1, 8:].clamp(-6, 6)
    return w


def their_scheme(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


def test_ties_fall_as_theirs() -> None:
    levels = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0]
    x = torch.tensor([*levels, *(-level for level in levels), 0.2500001, -0.2, 4.9999, -0.0]).repeat(1, 4)
    args = their_scheme("NVFP4A16").weights
    theirs = fake_quantize(x, torch.ones(1, x.shape[1] // 16), None, args)
    assert torch.equal(microscale.levels_of_codes(microscale.round_to_levels(x)), theirs)


@pytest.mark.parametrize("shape", [(N, K), (7, 32)], ids=str)
def test_nvfp4_weights_are_theirs_bit_for_bit(shape: tuple[int, int]) -> None:
    w, scheme = make_weight(*shape), their_scheme("NVFP4A16")
    packed = PackedWeight.from_float(w, QuantScheme.parse("nvfp4a16"), torch.float32)
    low, high = torch.aminmax(w)
    divisor = generate_gparam(low.reshape(1), high.reshape(1))
    assert packed.global_scale is not None
    assert torch.equal(packed.global_scale, divisor)
    groups = w.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, divisor)
    entries = {"weight": w, "weight_scale": scale, "weight_global_scale": divisor}
    theirs = NVFP4PackedCompressor.compress(entries, scheme)
    assert torch.equal(packed.codes, theirs["weight_packed"])
    assert isinstance(packed.scale, Tensor)
    assert torch.equal(packed.scale.view(torch.uint8), theirs["weight_scale"].view(torch.uint8))
    their_weight = NVFP4PackedCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(packed.dequantize(their_weight.dtype), their_weight)


def test_mxfp4_weights_are_theirs_bit_for_bit() -> None:
    w, scheme = make_weight()[1:], their_scheme("MXFP4A16")
    packed = PackedWeight.from_float(w, QuantScheme.parse("mxfp4a16"), torch.float32)
    groups = w.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    theirs = MXFP4PackedCompressor.compress({"weight": w, "weight_scale": scale}, scheme)
    assert torch.equal(packed.codes, theirs["weight_packed"])
    assert isinstance(packed.scale, Tensor)
    assert torch.equal(packed.scale, theirs["weight_scale"])
    assert torch.equal(packed.dequantize(), MXFP4PackedCompressor.decompress(theirs, scheme)["weight"].float())


def test_a_row_of_zeros_stays_zero_under_mxfp4() -> None:
    packed = PackedWeight.from_float(torch.zeros(2, 64), QuantScheme.parse("mxfp4a16"), torch.float32)
    assert torch.equal(packed.dequantize(), torch.zeros(2, 64))


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4"])
def test_activations_are_rounded_as_theirs(preset: str) -> None:
    """A linear of both libraries; the calibrated divisor of nvfp4 is 20 on both sides."""
    scheme, x = their_scheme(preset), make_weight(5, K).clamp(min=-30, max=30)[1:]
    w = make_weight()
    args, size = scheme.input_activations, {"NVFP4": 16, "MXFP4": 32}[preset]
    divisor = torch.tensor([20.0]) if preset == "NVFP4" else None
    groups = x.unflatten(1, (-1, size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, divisor)
    rounded = fake_quantize(x, scale, None, args, divisor)
    packed = PackedWeight.from_float(w, QuantScheme.parse(preset.lower()), torch.float32)
    ours = QuantLinear.from_packed(packed, None, divisor)(x)
    torch.testing.assert_close(ours, nn.functional.linear(rounded, packed.dequantize()), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(256, 128), (200, 330)], ids=["whole tiles", "cut tiles"])
def test_fp8_tiles_are_theirs_bit_for_bit(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    packed = PackedWeight.from_float(w, QuantScheme.parse("fp8-tile128"), torch.float32)
    assert isinstance(packed.scale, Tensor)
    assert packed.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    codes = quantize(w, packed.scale, None, args, dtype=torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), packed.codes.view(torch.uint8))
    assert torch.equal(dequantize(codes, packed.scale, None, args), packed.dequantize())


def test_activations_beside_tiles_get_a_scale_per_128_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 200, generator=generator), torch.randn(130, 200, generator=generator)
    packed = PackedWeight.from_float(w, QuantScheme.parse("fp8-tile128"), torch.float32)
    parts = []
    for part in (x[:, :128], x[:, 128:]):
        scale = part.abs().amax(-1, keepdim=True) / 448
        parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    expected = torch.cat(parts, 1) @ packed.dequantize().T
    torch.testing.assert_close(reference.wa8_linear(x, packed, None), expected)


def test_rows_that_cut_a_tile_are_refused_and_whole_tiles_stack_again() -> None:
    packed = PackedWeight.from_float(torch.randn(300, 128), QuantScheme.parse("fp8-tile128"), torch.float32)
    with pytest.raises(CheckpointError, match="cut through tiles of 128"):
        packed.rows(0, 100)
    again = PackedWeight.stack([packed.rows(0, 128), packed.rows(128, 300)])
    assert torch.equal(again.dequantize(), packed.dequantize())
    with pytest.raises(CheckpointError, match="end within a tile"):
        PackedWeight.stack([packed.rows(256, 300), packed.rows(0, 128)])


def test_tiles_cut_and_fill_a_matrix() -> None:
    x = torch.arange(1.0, 13.0).view(3, 4)
    assert affine.tiles(x, 2).tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]], [[9, 10, 0, 0], [11, 12, 0, 0]]]
