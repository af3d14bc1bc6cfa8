"""What each kernel takes on the GPU at hand: `lowbit bench kernels` prints it, bench/results keeps it.

One row is one kernel on one shape at M tokens: microseconds in a graph over rotated weights (timing.py), microseconds
of a cold single launch, GB/s of the weight's bytes, TFLOPS, the share of the nearer ceiling measured in the same run,
and the relative error against float64 on fresh data with the output's memory poisoned first.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbit.kernels.peers import peers_for
from lowbit.kernels.registry import CANDIDATES, Candidate
from lowbit.kernels.timing import cold_us, copies_of, graph_us
from lowbit.numerics.scheme import QuantScheme
from lowbit.numerics.storage import tensor_shapes
from lowbit.tensors import PackedWeight

# name: (N, K); Llama-3 8B and 70B with q, k, v and gate, up joined
SHAPES = {
    **{"8B.qkv": (6144, 4096), "8B.o": (4096, 4096), "8B.gate_up": (28672, 4096), "8B.down": (4096, 14336)},
    **{"70B.qkv": (10240, 8192), "70B.o": (8192, 8192), "70B.gate_up": (57344, 8192), "70B.down": (8192, 28672)},
}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
SCHEMES = ("w4a16-g128", "nf4-b64", "w8a16")
Dtype = torch.bfloat16
_CHECKED = 256  # tokens, of at most, whose results are compared with float64


@dataclass(frozen=True)
class Row:
    """One measurement; share is of the nearer of the two ceilings; error is None for peers."""

    shape: str
    N: int
    K: int
    scheme: str
    M: int
    kernel: str
    us: float
    cold_us: float | None
    gbps: float
    tflops: float
    share: float
    error: float | None


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: read and copy (bytes read plus written) in TB/s, a bf16 product of 8192^3 in TFLOPS."""

    read_tbps: float
    copy_tbps: float
    bf16_tflops: float


def measure_ceilings() -> Ceilings:
    """The ceilings of the current device."""
    source = torch.empty(1 << 28, device="cuda").normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=Dtype) for _ in range(2))
    return Ceilings(
        source.nbytes / graph_us([lambda: source.sum()]) / 1e6,
        2 * source.nbytes / graph_us([lambda: target.copy_(source)]) / 1e6,
        2 * 8192**3 / graph_us([lambda: a @ b]) / 1e6,
    )


def random_weight(scheme: QuantScheme, shape: tuple[int, int], seed: int) -> PackedWeight:
    """A weight of random codes and scales on the GPU, without the cost of rounding one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    named = {}
    for name, (size, dtype) in tensor_shapes(scheme, shape, Dtype).items():
        if name == "weight_shape":
            continue
        if dtype.is_floating_point:
            named[name] = (torch.rand(size, device="cuda", generator=generator) * 0.01 + 0.001).to(dtype)
        else:
            words = torch.randint(-(2**63), 2**63 - 1, (-(-_count(size) * dtype.itemsize // 8),), device="cuda",
                                  generator=generator)  # fmt: skip
            named[name] = words.view(dtype)[: _count(size)].view(size)
    return PackedWeight.from_tensors(named, scheme, shape)


def _count(size: tuple[int, ...]) -> int:
    count = 1
    for extent in size:
        count *= extent
    return count


def rows_for(
    shape: str, scheme_text: str, tokens: Sequence[int], ceilings: Ceilings, peers: bool, kernels: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows of our candidates (all that don't refuse, or those named) and of cuBLAS or all peers, for one shape."""
    size, scheme = SHAPES[shape], QuantScheme.parse(scheme_text)
    copies = copies_of(size[0] * size[1] * scheme.weights.bits // 8)
    weights = [random_weight(scheme, size, seed) for seed in range(copies)]
    scale = weights[0].bytes

    def row(kernel: str, x: Tensor, calls: Sequence[Callable[[], Tensor]], moved: int, error: float | None) -> Row:
        us, flops = graph_us(calls), 2 * x.shape[0] * size[0] * size[1]
        share = max(moved / us / 1e6 / ceilings.read_tbps, flops / us / 1e6 / ceilings.bf16_tflops)
        cold = cold_us(calls[:5]) if error is not None else None
        return Row(
            *(shape, *size, scheme_text, x.shape[0], kernel, us, cold),
            *(moved / us / 1e3, flops / us / 1e6, share, error),
        )

    w = weights[0].dequantize().double()
    for count in tokens:
        x = torch.randn(count, size[1], device="cuda", dtype=Dtype)
        exact = linear(x[:_CHECKED].double(), w)
        for candidate in CANDIDATES["wna16_linear"]:
            wanted = candidate.name in kernels if kernels else candidate.name != "reference"
            if wanted and candidate.refusal(x, weights[0]) is None and _sensible(candidate, count):
                error = relative_error(candidate, x, weights[0], exact)
                yield row(candidate.name, x, [_call(candidate, x, w) for w in weights], scale, error)
    del weights, w
    for peer in peers_for(scheme_text, peers):
        built = [peer.build(*size) for _ in range(min(copies, 4))]
        for count in tokens:
            if count <= peer.most_tokens:
                x = torch.randn(count, size[1], device="cuda", dtype=Dtype)
                moved = scale if peer.scheme else 2 * size[0] * size[1]
                yield row(peer.name, x, [lambda f=f, x=x: f(x) for f in built], moved, None)  # type: ignore[misc]
        del built


def _sensible(candidate: Candidate, tokens: int) -> bool:
    """Leaves out what nobody would run: tiles of 16 tokens for thousands, a whole dequantized weight for one."""
    least, most = {"cuda_mma": (1, 16), "cuda_dequantize": (256, 1 << 30), "triton_wna16": (1, 64)}.get(
        candidate.name, (1, 1 << 30)
    )
    return least <= tokens <= most


def _call(candidate: Candidate, x: Tensor, weight: PackedWeight) -> Callable[[], Tensor]:
    return lambda: candidate.run(x, weight, None)


def relative_error(candidate: Candidate, x: Tensor, weight: PackedWeight, exact: Tensor) -> float:
    """||y - exact|| / ||exact|| over the first tokens, which exact (float64) has; y's memory held NaN before."""
    poison = torch.full((x.shape[0], weight.shape[0]), torch.nan, device=x.device, dtype=x.dtype)
    del poison
    y = candidate.run(x, weight, None)[: exact.shape[0]].double()
    return float((y - exact).norm() / exact.norm())


def write_results(path: Path, ceilings: Ceilings, rows: Sequence[Row], commit: str) -> None:
    """One JSON file: the GPU, versions, ceilings and rows of a run."""
    described = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit}
    content = {**described, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def roofline_svg(ceilings: Ceilings, rows: Sequence[Row]) -> str:
    """A chart of our rows: TFLOPS over operations per byte of weight, both logarithmic, under the measured roof."""
    width, height, low_x, high_x, low_y, high_y = 720, 420, 0.0, 4.5, -0.5, 3.2  # decades

    def place(intensity: float, tflops: float) -> tuple[float, float]:
        x = (math.log10(intensity) - low_x) / (high_x - low_x) * width
        return round(x, 1), round(height - (math.log10(tflops) - low_y) / (high_y - low_y) * height, 1)

    ridge = ceilings.bf16_tflops / ceilings.read_tbps
    roof = [place(1, ceilings.read_tbps), place(ridge, ceilings.bf16_tflops), place(10**high_x, ceilings.bf16_tflops)]
    colors = dict(zip(SCHEMES, ("#4269d0", "#efb118", "#3ca951"), strict=True))
    best: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = row.shape, row.scheme, row.M
        if row.error is not None and (key not in best or row.us < best[key].us):
            best[key] = row
    marks = []
    for row in best.values():
        x, y = place(row.tflops / row.gbps * 1e3, row.tflops)
        label = f"{row.shape} {row.scheme} M={row.M} {row.kernel}: {row.us:.1f} us"
        marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colors[row.scheme]}"><title>{label}</title></circle>')
    keys = [f'<text x="12" y="{24 + 18 * i}" fill="{c}">{name}</text>' for i, (name, c) in enumerate(colors.items())]
    points = " ".join(f"{x},{y}" for x, y in roof)
    caption = f"roof: {ceilings.read_tbps:.2f} TB/s, {ceilings.bf16_tflops:.0f} TFLOPS; across: operations per byte"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 24}" font-family="sans-serif" '
        'font-size="13">',
        f'<polyline points="{points}" fill="none" stroke="#888" stroke-width="2"/>',
        *marks,
        *keys,
        f'<text x="12" y="{height + 16}" fill="#555">{caption}; up: TFLOPS</text>',
        "</svg>",
    ])  # fmt: skip
