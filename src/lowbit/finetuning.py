"""`lowbit.finetune`: train a model in low precision on the user's text, and write what came of it.

    qlora    quantize the model (nf4-b64-dq) or take it quantized, train adapters on the text's next tokens, write the
             adapter in PEFT's form; or merge it and write a quantized checkpoint
    qat      fake-quantize the model (w4a16-g64), train its linears to say what the original says (self-distillation)
             on the text, or the text's next tokens; write a quantized checkpoint

The output folder appears whole at the end. Until then checkpoints stand in a hidden folder beside it, from which the
same command resumes after an interruption, bit for bit; it is removed at the end.
"""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

from lowbit import memory
from lowbit.finetuning_methods import Work, qat_run, qlora_run
from lowbit.finetuning_options import METHODS, Finetuned, Finetuning, Progress
from lowbit.io.folder import atomic_folder, check_destination
from lowbit.io.source import load_tokenizer, open_source
from lowbit.optional import require
from lowbit.train.text import training_windows
from lowbit.verbs import _device as resolve_device

__all__ = ["METHODS", "Finetuned", "Finetuning", "finetune"]


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: Finetuning = Finetuning(),
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Finetuned:
    """Train `model` on the text `data` and write the folder `out` with finetuning.json in it.

    Raises InputError, or one of its kinds, for what cannot work, TrainingError when training diverges.
    """
    out, target = Path(out), resolve_device(device)
    if options.method == "qlora":
        require("peft", "train")
    started = time.perf_counter()
    with open_source(model) as source:
        check_destination(out, overwrite, source.bytes, source.folder)
        windows = training_windows(data, load_tokenizer(source), options.seq_len)
        work = Work(source, windows, options, target, progress, out.parent / f".{out.name}.training")
        memory.reset_peak(target)
        run = qlora_run if options.method == "qlora" else qat_run
        with atomic_folder(out, overwrite) as folder:
            done = run(work, folder)
            peak = memory.peak_bytes(target)
            done = replace(done, seconds=time.perf_counter() - started, peak_memory_bytes=peak)
            (folder / "finetuning.json").write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work.checkpoints, ignore_errors=True)
    return done
