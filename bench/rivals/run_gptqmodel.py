"""gptqmodel's GPTQ on given calibration tokens, with its own defaults, the model in float32 on the CPU.

Set here: bits, group size and symmetry of the scheme, and offload_to_disk=False (finished layers stay in memory, so
that their weights can be read). Everything else is the library's default and is read back into the record: in 7.6
blocks of 128 columns, damping 0.05 of the mean diagonal (raised by 0.01 when the factorization fails), group-aware
act-order (act_group_aware), scales from the group's minimum and maximum of the weight as it stands when the group is
reached (no search: mse = 0; symmetric scale = 2 max|w| / (2^bits - 1)), qkv, o, gate and up, down in turn
(true_sequential), lm_head left in float.
The library's packer keeps scales in float16; the weights written are float32 products of those scales and the codes.

Two things keep the library from running on 2 cores as it comes. Its pool of CPU workers has (cores + 1) // 2 = 1 worker
there, and the loader's share of the pool asks for 2: "Virtual pool 'model_loader:cpu' requests 2 workers but parent
'cpu' only has 1". The library's own setting GPTQMODEL_CPU_WORKERS widens the pool, so this script sets it to 2 where
it is not set, before the pool is built. Version 7.7 wants torch 2.14.1; 7.6 is the newest for torch 2.13.
"""

import os
import time
from dataclasses import fields
from importlib.metadata import version

import torch
from gptqmodel import GPTQConfig, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from rival import Request, parse_request, write_result

OPTIONS = (
    "damp_percent",
    "damp_auto_increment",
    "desc_act",
    "act_group_aware",
    "static_groups",
    "mse",
    "true_sequential",
    "lm_head",
    "gptaq",
    "foem",
    "rotation",
    "offload_to_disk",
)


def calibration_rows(tokens: torch.Tensor) -> list[dict[str, list[int]]]:
    """One dictionary a sequence: input_ids and an attention mask of ones."""
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]


def gptq_config(request: Request) -> GPTQConfig:
    """The library's configuration for the scheme asked for, defaults elsewhere."""
    return GPTQConfig(
        bits=request.bits,
        group_size=request.group_size,
        sym=request.symmetric,
        offload_to_disk=False,
    )


def dequantized_weight(linear: BaseQuantLinear) -> torch.Tensor:
    """The float32 weight [N, K] that a packed linear stands for; its scales become float32 in place."""
    linear.scales = linear.scales.to(torch.float32)
    linear.post_init()
    return linear.dequantize_weight().to(torch.float32).T.contiguous()  # [K, N] -> [N, K]


def options_used(config: GPTQConfig, log: dict[str, list[dict[str, str]]]) -> dict[str, object]:
    """The settings read back from the configuration, and the dampings that the layers ended up with."""
    known = {field.name for field in fields(config)}
    options = {name: getattr(config, name) for name in OPTIONS if name in known}
    rows = [row for rows in log.values() for row in rows]
    options["blocksize"] = 128
    options["dampings"] = sorted({row["damp"] for row in rows if "damp" in row})
    options["round_to_nearest_instead"] = sum("fallback" in row.get("loss", "") for row in rows)
    options["cpu_workers"] = int(os.environ["GPTQMODEL_CPU_WORKERS"])
    options["scale_dtype"] = "torch.float16"
    options["batch_size"] = 1
    return options


def main() -> None:
    request = parse_request(__doc__)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    config = gptq_config(request)
    model = GPTQModel.load(str(request.model), config, device="cpu", dtype=torch.float32)
    if model.model.dtype != torch.float32:
        raise SystemExit(f"the library loaded the model as {model.model.dtype}, not as float32")
    begin = time.perf_counter()
    log = model.quantize(calibration_rows(request.tokens))
    seconds = time.perf_counter() - begin
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, BaseQuantLinear)}
    weights = {name: dequantized_weight(linear) for name, linear in linears.items()}
    write_result(request, weights, "gptqmodel", version("gptqmodel"), options_used(config, log), seconds)


if __name__ == "__main__":
    main()
