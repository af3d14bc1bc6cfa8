"""wna16_plans.json holds what the launchers can use: each row a plan that fits an H200."""

import json
from collections.abc import Iterator

import pytest
import torch

from lowbit.kernels.cuda import wna16_mma, wna16_plans, wna16_wgmma
from lowbit.kernels.cuda.device import Gpu
from lowbit.kernels.layout import FastForm

H200 = Gpu((9, 0), 132, 232448)
ROWS = json.loads(wna16_plans.ROWS.read_text(encoding="utf-8"))
INT4, NF4, CUDA = FastForm("int4", 128, False), FastForm("lut", 64, False), torch.device("cuda", 0)
FORMS = {"int4": INT4, "lut": NF4, "int8": FastForm("int8", 128, False)}


class _Kernel:
    def clusters_at_once(self, block: tuple[int, int, int], shared_bytes: int, cluster: int) -> int:
        return 132 // cluster


@pytest.fixture(autouse=True)
def _on_an_h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (wna16_mma, wna16_wgmma):
        monkeypatch.setattr(module, "gpu_of", lambda device: H200)
        monkeypatch.setattr(module, "load_kernel", lambda *arguments: _Kernel())
        module.plan_of.cache_clear()
    yield
    for module in (wna16_mma, wna16_wgmma):
        module.plan_of.cache_clear()


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['kernel']}-{row['codes']}-{row['N']}x{row['K']}-{row['tokens']}"
)
def test_a_measured_plan_is_taken_and_fits(row: dict) -> None:
    shape, module = (row["N"], row["K"]), wna16_wgmma if row["kernel"] == "wgmma" else wna16_mma
    plan = module.plan_of(FORMS[row["codes"]], shape, row["tokens"], torch.bfloat16, CUDA)
    assert plan.shared_bytes <= H200.shared_bytes
    if module is wna16_wgmma:
        assert (plan.tile.warpgroups, plan.tile.blocks) == (row["warpgroups"], row["blocks"])
        assert plan.workers - plan.parts == row["workers"]


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 300, 4096])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336), (192, 576), (333, 1001), (57344, 8192)])
def test_every_shape_has_a_plan_that_fits(shape: tuple[int, int], tokens: int) -> None:
    for form in (INT4, NF4, FastForm("int8", 128, True), FastForm("int2", 16, True)):
        plan = wna16_wgmma.plan_of(form, shape, tokens, torch.bfloat16, CUDA)
        assert plan.shared_bytes <= H200.shared_bytes
        assert plan.tile.stages >= 3
        steps = wna16_wgmma.tiles_in(plan.tile, shape, tokens) * -(-shape[1] // 128)
        assert plan.workers - plan.parts <= steps
