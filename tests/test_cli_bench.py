"""`lowbit bench kernels` where there is no GPU, and what does not need one: the chart, random weights' shapes."""

import pytest
import torch
from typer.testing import CliRunner

from lowbit.cli.main import app
from lowbit.errors import InputError
from lowbit.kernels import bench
from lowbit.kernels.peers import peers_for

ROW = bench.Row("8B.o", 4096, 4096, "w4a16-g128", 1, "cuda_mma", 6.5, None, 1330.0, 5.2, 0.3, 2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert isinstance(result.exception, InputError)
    assert "torch sees no CUDA device" in str(result.exception)


def test_the_chart_marks_the_fastest_kernel_of_each_point() -> None:
    slower = bench.Row(**{**ROW.__dict__, "kernel": "reference", "us": 90.0})
    peer = bench.Row(**{**ROW.__dict__, "kernel": "cublas bf16", "us": 1.0, "error": None})
    chart = bench.roofline_svg(bench.Ceilings(4.4, 2.75, 780.0), [slower, ROW, peer])
    assert chart.count("<circle") == 1
    assert "M=1 cuda_mma: 6.5 us" in chart


def test_only_cublas_is_a_peer_unless_everyone_is_asked() -> None:
    assert [peer.name for peer in peers_for("w4a16-g128", everyone=False)] == ["cublas bf16"]
    assert "tinygemm" in [peer.name for peer in peers_for("w4a16-g128", everyone=True)]
    assert "tinygemm" not in [peer.name for peer in peers_for("nf4-b64", everyone=True)]
