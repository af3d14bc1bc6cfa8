"""What is wrong with a checkpoint, for whom, and a repaired copy of it.

Every quantized module is read once, so that what its values say can be held against what its config says. Each finding
names the consumers that stumble over it; those that it hurts and the ones that it doesn't are the verdict. `fix` writes
a new folder: modules in their format's present layout and with the convention that the config declares, buffers that
belong to no layer left out, the tokenizer without the truncation and padding that a calibration left in it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.diagnosis import CONSUMERS, READERS, SERVERS, Diagnosis, Finding, some
from lowbit.doctor_gguf import examine_gguf
from lowbit.errors import CheckpointError, InputError
from lowbit.io.conversion import Conversion, Options
from lowbit.io.convert import convert
from lowbit.io.empty import empty_model
from lowbit.io.gguf_names import ARCHITECTURES
from lowbit.io.names import disk_layout
from lowbit.io.reading import reader_of
from lowbit.io.source import Source, model_config, open_source, read_json
from lowbit.io.stored import Reader, Stored
from lowbit.io.tensorfile import Files

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_SAME_FORMAT = {"compressed-tensors": "compressed-tensors", "gptq": "gptq", "awq": "awq"}


def examine(path: str | Path) -> Diagnosis:
    """What is wrong with the checkpoint folder or .gguf file.

    Raises InputError where there is none, or its files are damaged.
    """
    if Path(path).suffix == ".gguf":
        return examine_gguf(Path(path))
    with open_source(path) as source:
        files = Files.open(source.folder / shard for shard in source.shards)
        config = source.quantization or {}
        result = Diagnosis(source.name, str(config.get("quant_method", "not quantized")))
        reader, stored = None, {}
        if config:
            reader = reader_of(config, files)
            stored = _read_all(reader, result)
            result.findings += _conventions(reader, config)
            result.findings += _fused(stored)
            result.findings += _versions(config, reader, stored)
            result.findings += _dtypes(source, stored)
        _keys(source, files, reader, result)
        _left_out(source, files, reader, result)
        result.findings += _tokenizer(source.folder)
        result.findings += _generation(source)
        _judge(source, result)
    return result


def _read_all(reader: Reader, result: Diagnosis) -> dict[str, Stored]:
    """Every module without its codes, so that a big model fits; damaged ones become findings."""
    found = {}
    for module in reader.modules:
        try:
            stored = reader.read(module)
        except CheckpointError as error:
            result.findings.append(Finding(str(error), CONSUMERS[:3]))
            continue
        found[module] = Stored(_light(stored), stored.inputs)
    return found


def _light(stored: Stored) -> Any:
    weight = stored.weight
    return type(weight)(weight.scheme, weight.shape, torch.empty(0), weight.scale, None, weight.global_scale)


def _conventions(reader: Reader, config: dict[str, Any]) -> list[Finding]:
    """What the values say against the config: zero-points, layouts."""
    return [Finding(words, READERS, config.get("quant_method") in _SAME_FORMAT) for words in reader.warnings]


def _fused(stored: dict[str, Stored]) -> list[Finding]:
    """Layers that vLLM and SGLang keep as one matrix must be quantized alike."""
    findings = []
    parents = {module.rpartition(".")[0] for module in stored}
    for parent in sorted(parents):
        for names in _FUSED:
            parts = {name: stored[f"{parent}.{name}"].weight for name in names if f"{parent}.{name}" in stored}
            schemes = {str(weight.scheme) for weight in parts.values()}
            if len(schemes) > 1:
                findings.append(
                    Finding(f"{parent}: {', '.join(parts)} are one layer there, but {some(schemes)}", SERVERS)
                )
            scales = {part.global_scale.item() for part in parts.values() if part.global_scale is not None}
            if len(scales) > 1:
                findings.append(
                    Finding(f"{parent}: {', '.join(parts)} have other global scales, of which one is taken", SERVERS)
                )
    return findings


def _versions(config: dict[str, Any], reader: Reader, stored: dict[str, Stored]) -> list[Finding]:
    """Which versions of compressed-tensors can read this."""
    if config.get("quant_method") != "compressed-tensors":
        return []
    weights = [stored_part.weight.scheme.weights for stored_part in stored.values()]
    old = any("before compressed-tensors 0.17" in words for words in reader.warnings)
    findings = []
    if old:
        findings.append(Finding("compressed-tensors before 0.17 reads its 3, 5, 6 or 7 bits; later ones misread them"))
    elif any(scheme.format.kind == "int" and scheme.bits in (3, 5, 6, 7) for scheme in weights):
        findings.append(
            Finding("compressed-tensors from 0.17 on reads its 3, 5, 6 or 7 bits; earlier ones misread them")
        )
    arguments = [group.get("weights") or {} for group in config.get("config_groups", {}).values()]
    if any(item.get("actorder") in ("group", "dynamic", True) for item in arguments):
        findings.append(Finding("act-order by group: compressed-tensors 0.20 refuses the config", READERS))
    return findings


def _dtypes(source: Source, stored: dict[str, Stored]) -> list[Finding]:
    """Scales that a reader rounds to the model's dtype."""
    declared = str(source.config.get("dtype") or source.config.get("torch_dtype"))
    scales = {str(part.weight.scale.dtype).removeprefix("torch.") for part in stored.values()
              if isinstance(part.weight.scale, torch.Tensor)}  # fmt: skip
    odd = scales & {"float16", "bfloat16"} - {declared}
    if declared in ("float16", "bfloat16") and odd:
        return [Finding(f"scales are {odd.pop()} in a {declared} model; vLLM and SGLang round them to {declared}")]
    return []


def _keys(source: Source, files: Files, reader: Reader | None, result: Diagnosis) -> None:
    """Tensors that the model wants and the files lack, and the other way round."""
    try:
        with torch.device("meta"):
            model = empty_model(model_config(source), source.name, torch.bfloat16, len(files.places), source.bytes)
    except CheckpointError as error:
        result.findings.append(Finding(f"transformers builds no causal language model of this config: {error}"))
        return
    wanted = set(disk_layout(model))
    modules = set(reader.modules) if reader else set()
    experts = set(reader.experts) if reader else set()
    present = set(files.places) | {f"{module}.weight" for module in modules} | experts
    tied = {"lm_head.weight"} if source.config.get("tie_word_embeddings") else set()
    if missing := sorted(wanted - present - tied):
        result.findings.append(Finding(f"{len(missing)} tensors are missing: {some(missing)}", CONSUMERS[:3]))
    known = {name for module in [*modules, *experts] for name in reader.names(module)} if reader else set()
    buffers = {name for name, _ in model.named_buffers()}
    surplus = sorted(set(files.places) - known - wanted - buffers)
    heads = [name for name in surplus if "mtp" in name or "nextn" in name or _beyond(name, source)]
    others = [name for name in surplus if name not in heads]
    if heads:
        result.findings.append(Finding(f"{len(heads)} tensors of extra prediction heads or layers: {some(heads)}"))
    whole = [
        name for name in others if files.entry(name).dtype.itemsize < 2 or not files.entry(name).dtype.is_floating_point
    ]
    if whole:
        words = f"{len(whole)} integer or fp8 tensors belong to no quantized layer: {some(whole)}"
        result.findings.append(Finding(words, SERVERS, True))
        result.surplus = whole
    if rest := [name for name in others if name not in whole]:
        result.findings.append(Finding(f"{len(rest)} tensors have no place in the model: {some(rest)}"))


def _beyond(name: str, source: Source) -> bool:
    """Whether the tensor is of a layer after the last one, where multi-token prediction is kept."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= int(source.config.get("num_hidden_layers") or 10**9)


def _left_out(source: Source, files: Files, reader: Reader | None, result: Diagnosis) -> None:
    """Heads that were lost, experts that stayed in 16 bits."""
    heads = source.config.get("num_nextn_predict_layers") or source.config.get("mtp_num_hidden_layers") or 0
    if heads and not any("mtp" in name or "nextn" in name or _beyond(name, source) for name in files.places):
        words = (
            f"the config promises {heads} multi-token-prediction layers, and the files have none: speculation is lost"
        )
        result.findings.append(Finding(words, SERVERS))
    floats = [name for name in files.places if ".experts." in name and name.endswith(".weight")
              and files.entry(name).dtype.itemsize >= 2 and len(files.entry(name).shape) > 1]  # fmt: skip
    if reader is not None and floats:
        result.findings.append(Finding(f"{len(floats)} expert matrices are still in 16 bits: {some(floats)}"))


def _tokenizer(folder: Path) -> list[Finding]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return []
    tokenizer = read_json(path)
    left = [key for key in ("truncation", "padding") if tokenizer.get(key) is not None]
    if not left:
        return []
    return [
        Finding(
            f"tokenizer.json has {' and '.join(left)} saved in it, from a calibration: long texts are cut",
            READERS,
            True,
        )
    ]


def _generation(source: Source) -> list[Finding]:
    path = source.folder / "generation_config.json"
    if not path.is_file():
        return [Finding("there is no generation_config.json: sampling settings and further end tokens may be lost")]
    ends = read_json(path).get("eos_token_id")
    own = source.config.get("eos_token_id")
    missing = set(_ids(own)) - set(_ids(ends))
    if missing and ends is not None:
        return [
            Finding(f"generation_config.json does not end at token {some(map(str, sorted(missing)))}, config.json does")
        ]
    return []


def _ids(value: Any) -> Sequence[int]:
    return [value] if isinstance(value, int) else [item for item in value or () if isinstance(item, int)]


def _judge(source: Source, result: Diagnosis) -> None:
    """A verdict per consumer."""
    for consumer in CONSUMERS[:3]:
        reasons = [finding.words for finding in result.findings if consumer in finding.hurts]
        result.verdicts[consumer] = "; ".join(reasons) if reasons else "reads it"
    needs = {"gptq": "gptqmodel and optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
             "compressed-tensors": "compressed-tensors", "lowbit": "import lowbit"}.get(result.method)  # fmt: skip
    if needs and result.verdicts["transformers"] == "reads it":
        result.verdicts["transformers"] = f"reads it with {needs}"
    if result.method == "lowbit":
        for server in SERVERS:
            result.verdicts[server] = "does not know the method; lowbit convert --format compressed-tensors"
    family = source.config.get("model_type") in ARCHITECTURES
    way = "lowbit convert --format gguf" if result.method != "not quantized" else "lowbit convert --format gguf-q4_k"
    result.verdicts["llama.cpp"] = f"reads GGUF only: {way}" if family else "reads GGUF only; lowbit has no way there"


def fix(path: str | Path, out: str | Path, overwrite: bool = False) -> Conversion:
    """A repaired copy of the checkpoint in the new folder `out`, checked as convert checks.

    Raises InputError for a method whose modules lowbit does not write.
    """
    diagnosis = examine(path)
    if Path(path).suffix == ".gguf":
        raise InputError(f"lowbit repairs {', '.join(_SAME_FORMAT)}, not {diagnosis.method}")
    with open_source(path) as source:
        config = source.quantization or {}
        target = _SAME_FORMAT.get(str(config.get("quant_method")))
        if target is None:
            raise InputError(f"lowbit repairs {', '.join(_SAME_FORMAT)}, not {diagnosis.method}")
        if target == "gptq" and config.get("checkpoint_format") == "gptq_v2":
            target = "gptq-v2"
        result = convert(path, out, target, Options(overwrite=overwrite, drop=frozenset(diagnosis.surplus)))
    tokenizer = Path(out) / "tokenizer.json"
    if tokenizer.is_file():
        content = read_json(tokenizer)
        if content.get("truncation") is not None or content.get("padding") is not None:
            text = json.dumps(content | {"truncation": None, "padding": None}, indent=2, ensure_ascii=False)
            tokenizer.write_text(text, encoding="utf-8")
    return result
