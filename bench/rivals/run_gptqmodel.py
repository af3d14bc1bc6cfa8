"""gptqmodel's GPTQ on given calibration tokens, with its own defaults, on a CPU (the model in float32) or a GPU.

Set here: bits, group size and symmetry of the scheme, and offload_to_disk=False (finished layers stay in memory, so
that their weights can be read). Everything else is the library's default and is read back into the record: in 7.6
blocks of 128 columns, damping 0.05 of the mean diagonal (raised by 0.01 when the factorization fails), group-aware
act-order (act_group_aware), scales from the group's minimum and maximum of the weight as it stands when the group is
reached (no search: mse = 0; symmetric scale = 2 max|w| / (2^bits - 1)), qkv, o, gate and up, down in turn
(true_sequential), lm_head left in float.
The library's packer keeps scales in float16 and leaves zero points one lower, as the GPTQ file format stores them; the
weights written are the float32 products of those scales and (code - zero point), after the library's own correction.

Two things keep the library from running on 2 cores as it comes. Its pool of CPU workers has (cores + 1) // 2 = 1 worker
there, and the loader's share of the pool asks for 2: "Virtual pool 'model_loader:cpu' requests 2 workers but parent
'cpu' only has 1". The library's own setting GPTQMODEL_CPU_WORKERS widens the pool, so this script sets it to 2 where
it is not set, before the pool is built. Version 7.7 wants torch 2.14.1; 7.6 is the newest for torch 2.13.
"""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from rival import Request, parse_request, write_result

GPU_BATCH = 8  # sequences; on a CPU one, the library's default
FEW_CORES = 2
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


def options_used(config: object, log: Mapping[str, Sequence[Mapping[str, str]]], batch: int) -> dict[str, object]:
    """The settings read back from the configuration, and the dampings that the layers ended up with."""
    options = {name: getattr(config, name) for name in OPTIONS}
    rows = [row for rows in log.values() for row in rows]
    options["blocksize"] = 128
    options["dampings"] = sorted({row["damp"] for row in rows if "damp" in row})
    options["round_to_nearest_instead"] = sum("fallback" in row.get("loss", "") for row in rows)
    options["cpu_workers"] = os.environ.get("GPTQMODEL_CPU_WORKERS", "default")
    options["scale_dtype"] = "torch.float16"
    options["batch_size"] = batch
    return options


def quantize(request: Request) -> tuple[torch.nn.Module, dict[str, object], float]:
    """The model quantized, the options used, and the seconds of the quantization call."""
    from gptqmodel import GPTQConfig, GPTQModel  # noqa: PLC0415 - its import prints on standard output

    config = GPTQConfig(bits=request.bits, group_size=request.group_size, sym=request.symmetric, offload_to_disk=False)
    model = GPTQModel.load(str(request.model), config, device=str(request.device), dtype=request.dtype)
    if request.dtype != "auto" and model.model.dtype != request.dtype:
        raise SystemExit(f"the library loaded the model as {model.model.dtype}, not as {request.dtype}")
    request.out.mkdir(parents=True, exist_ok=True)
    batch = 1 if request.device.type == "cpu" else GPU_BATCH
    begin = time.perf_counter()
    with contextlib.chdir(request.out):  # the library writes a folder "logs" where it runs
        log = model.quantize(calibration_rows(request.tokens), batch_size=batch)
    seconds = time.perf_counter() - begin
    return model.model, options_used(model.quantize_config, log, batch), seconds


@torch.inference_mode()
def dequantized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The float32 weight [N, K] of every packed linear, by module name; its scales become float32 in place."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # noqa: PLC0415 - as above
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module  # noqa: PLC0415

    linears = {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}
    weights = {}
    for name, linear in linears.items():
        if linear.qzero_format() == 1:
            convert_gptq_v1_to_v2_format_module(linear, linear.bits, linear.pack_dtype)
        linear.scales = linear.scales.to(torch.float32)
        weights[f"{name}.weight"] = linear.dequantize_weight().to(torch.float32).T.contiguous()  # [K, N] -> [N, K]
    return weights


def main() -> None:
    request = parse_request(__doc__, ("gptq",))
    if (os.cpu_count() or 1) <= FEW_CORES:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    model, options, seconds = quantize(request)
    write_result(request, dequantized_weights(model), ("gptqmodel", version("gptqmodel")), options, seconds)


if __name__ == "__main__":
    main()
