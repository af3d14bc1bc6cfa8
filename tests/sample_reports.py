"""Reports as a real run writes them, from a seeded generator: 30 blocks x 7 kinds, the shape of SmolLM2-135M."""

import math
import random
from dataclasses import replace

from lowbit.report import (
    BudgetRecord,
    CalibrationRecord,
    Coverage,
    Fidelity,
    Gate,
    GroupRecord,
    Histogram,
    LayerRecord,
    Report,
    RungRecord,
    Skipped,
    TextSample,
    TradeOff,
)

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
BEFORE = "Paris, a city on the Seine with a little over two million inhabitants. It has been the seat of kings and ..."
AFTER = "Paris, a city on the Seine that grew from an island in the river. Its museums draw millions of visitors ..."


def layer_records(blocks: int = 30, scheme: str = "w4a16-g64", method: str = "gptq") -> tuple[LayerRecord, ...]:
    generator = random.Random(0)
    layers = []
    for block in range(blocks):
        for place, kind in enumerate(KINDS):
            error = 0.08 + 0.006 * place + 0.02 * (block in (0, 29)) + 0.01 * generator.random()
            output = error * (0.3 + 0.2 * generator.random()) * (3 if kind == "mlp.down_proj" and block == 1 else 1)
            name = f"model.layers.{block}.{kind}"
            layers.append(LayerRecord(name, scheme, method, error, -20 * math.log10(error), output))
    return tuple(layers)


def histograms(layers: tuple[str, ...]) -> tuple[Histogram, ...]:
    """Bell-shaped counts; activations with a few far outliers."""
    made = []
    for layer in layers:
        for of, width, reach in (("weight", 7.0, 0.62), ("error", 16.0, 0.041), ("activation", 3.0, 38.4)):
            bell = [round(40000 * math.exp(-(((place - 31.5) / width) ** 2) / 2)) for place in range(64)]
            bell[-1] += 3
            made.append(Histogram(layer, of, -reach, reach, tuple(bell)))
    return tuple(made)


def report(**changes: object) -> Report:
    """A finished run of gptq:w4a16-g64 that held its limits."""
    skipped = (
        Skipped("model.embed_tokens.weight", 28311552, 56623104, "an embedding, tied to lm_head; named in --ignore"),
        *(Skipped(f"model.layers.{block}.input_layernorm.weight", 576, 1152, "a norm") for block in range(4)),
    )
    made = Report(
        model="models/SmolLM2-135M-Instruct", scheme="w4a16-g64", method="gptq", seed=0,
        versions={"lowbit": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        calibration=CalibrationRecord("shared/data/text/wiki_train.txt", "9f2c" * 16, 128, 512),
        coverage=Coverage(134515008, 106168320, 106168320 / 134515008, skipped),
        bytes_before=269060552, bytes_after=113246208, seconds=148.3, peak_memory_bytes=812000000,
        layers=layer_records(),
        fidelity=Fidelity(16.48, 18.93, 0.1374, 0.0021, 0.8412, 65408, "wiki_valid.txt", "41aa" * 16),
        gates=(Gate("max-kld", 0.2, 0.1374, True), Gate("min-coverage", 0.7, 0.7893, True)),
        warnings=("model.layers.3.mlp.down_proj: damping was raised to 0.1 before Cholesky succeeded",),
        histograms=histograms(("model.layers.1.mlp.down_proj", "model.layers.29.mlp.down_proj")),
        sample=TextSample("The capital of France is", f" {BEFORE}", f" {AFTER}"),
    )  # fmt: skip
    return replace(made, **changes)


def recipes() -> list[Report]:
    """Four recipes of one model, one of which fails a limit."""

    def fidelity(perplexity: float, kld: float, stderr: float, top1: float) -> Fidelity:
        return Fidelity(16.48, perplexity, kld, stderr, top1, 65408, "wiki_valid.txt", "41aa" * 16)

    failed = (Gate("max-kld", 0.2, 0.3461, False),)
    return [
        report(method="rtn", scheme="w4a16-g64", seconds=11.2, calibration=None, gates=failed,
               layers=layer_records(method="rtn"), fidelity=fidelity(23.41, 0.3461, 0.0042, 0.7503)),
        report(),
        report(method="rtn", scheme="w8a16", seconds=9.8, calibration=None, bytes_after=163500000, warnings=(),
               layers=layer_records(scheme="w8a16", method="rtn"), fidelity=fidelity(16.52, 0.0031, 0.0001, 0.9731)),
        report(method="rtn", scheme="w8a8", seconds=10.1, calibration=None, bytes_after=163400000, warnings=(),
               layers=layer_records(scheme="w8a8", method="rtn"), fidelity=fidelity(17.02, 0.0302, 0.0006, 0.9224)),
    ]  # fmt: skip


def budget() -> BudgetRecord:
    """A budget of 4.25 bits on the groups of two blocks, with one full run."""
    groups = tuple(
        GroupRecord(f"model.layers.{block}.{kind}", 300_000, scheme, bits, (cost, cost / 4))
        for block in range(2)
        for kind, scheme, bits, cost in (
            ("self_attn: q_proj, k_proj, v_proj", "w3a16-g64", 3.25, 0.004),
            ("self_attn.o_proj", "w4a16-g64", 4.25, 0.01),
            ("mlp: gate_proj, up_proj", "w4a16-g64", 4.25, 0.02),
            ("mlp.down_proj", "w6a16-g64", 6.25, 0.03),
        )
    )
    curve = [TradeOff("", 3.25 + step / 10, 0.4 * 0.8**step, None) for step in range(40)]
    curve += [TradeOff("w3a16-g64", 3.25, 0.4, None), TradeOff("w4a16-g64", 4.25, 0.15, None)]
    runs = (TradeOff("run 1", 4.25, 0.09, 0.1374),)
    return BudgetRecord("--bits 4.25", 4.25, 512, 61.0, ("w3a16-g64", "w4a16-g64"), groups, tuple(curve), runs)


def with_rungs() -> tuple[LayerRecord, ...]:
    """Layers of an aligned run, with what rounding leaves in them."""
    return tuple(
        replace(layer, method="aligned", below=(RungRecord("rtn", 0.2, 2 * (layer.output_error or 0)),))
        for layer in layer_records()
    )
