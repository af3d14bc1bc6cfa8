"""The doctor on a GGUF file: whether all tensors of its model and a tokenizer are there, and who takes it."""

from pathlib import Path

import torch
from transformers import AutoConfig

from lowbit.diagnosis import CONSUMERS, READERS, Diagnosis, Finding, some
from lowbit.io.empty import empty_model
from lowbit.io.gguf_file import GgufFile
from lowbit.io.gguf_names import MODEL_TYPES, to_gguf
from lowbit.io.gguf_read import gguf_settings
from lowbit.io.names import disk_layout


def examine_gguf(path: Path) -> Diagnosis:
    """Findings and verdicts. Raises CheckpointError for a damaged file."""
    file = GgufFile.open(path)
    family = file.metadata.get("general.architecture")
    result = Diagnosis(str(path), f"gguf, {family}")
    result.verdicts = dict.fromkeys(READERS, "takes GGUF of some architectures, dequantized or by kernels of its own")
    if family not in MODEL_TYPES:
        result.findings.append(
            Finding(f"lowbit knows no model of the architecture {family!r}; tensors are not checked")
        )
        return result
    settings = gguf_settings(file)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = empty_model(config, str(path), torch.bfloat16, len(file.tensors), path.stat().st_size)
    wanted = set(disk_layout(model)) - ({"lm_head.weight"} if settings["tie_word_embeddings"] else set())
    if missing := sorted(to_gguf(name) for name in wanted if to_gguf(name) not in file.tensors):
        result.findings.append(Finding(f"{len(missing)} tensors are missing: {some(missing)}", CONSUMERS))
    if "tokenizer.ggml.tokens" not in file.metadata:
        result.findings.append(Finding("there is no tokenizer in it", ("llama.cpp",)))
    harmed = [finding.words for finding in result.findings if "llama.cpp" in finding.hurts]
    result.verdicts["llama.cpp"] = "; ".join(harmed) or "reads it"
    return result
