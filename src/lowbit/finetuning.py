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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit import memory
from lowbit.errors import InputError
from lowbit.io.checkpoint import write_checkpoint
from lowbit.io.folder import atomic_folder, check_destination
from lowbit.io.load import load_source
from lowbit.io.names import disk_layout
from lowbit.io.source import Source, load_float, load_tokenizer, model_config, open_source
from lowbit.model.quantize import Job, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import Rule, select
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens
from lowbit.optional import require
from lowbit.train import qat
from lowbit.train.compiled import compile_blocks, plain_blocks
from lowbit.train.distill import Objective, Teacher, frozen, next_token_loss
from lowbit.train.graph import Capturable
from lowbit.train.loop import LoopOptions, Run, train
from lowbit.train.optim import AdamW8bit
from lowbit.train.qlora import LoraOptions, add_lora, merge_lora
from lowbit.train.text import training_windows
from lowbit.verbs import _device as resolve_device

METHODS = {"qlora": ("nf4-b64-dq", 2e-4), "qat": ("w4a16-g64", 2e-5)}
"""Method -> the scheme and the learning rate that it has by default (QLoRA's appendix B; ParetoQ, LLM-QAT)."""
SCALE_RATE = 0.1  # of the weights' rate: a scale of 0.03 that moves by 1e-4 a step undid GPTQ (docs/log-training.md)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finetuning:
    """What to train: method, scheme and lr (None: the method's own), windows of seq_len tokens.

    distill: qat learns from the original instead of from the text's next tokens. merge: qlora writes a checkpoint with
    the adapter in it instead of the adapter; merge_16bit: one that is not quantized. rules: other schemes for some
    layers, as in a recipe. eager: on a CUDA device, neither replay qat's steps as a CUDA graph nor compile the blocks
    of qlora's model.
    """

    method: str = "qlora"
    scheme: str | None = None
    lr: float | None = None
    seq_len: int = 512
    distill: bool = True
    merge: bool = False
    merge_16bit: bool = False
    rules: tuple[Rule, ...] = ()
    lora: LoraOptions = field(default_factory=LoraOptions)
    loop: LoopOptions = field(default_factory=lambda: LoopOptions(steps=200))
    eager: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if (self.merge or self.merge_16bit) and self.method != "qlora":
            raise InputError("only qlora has adapters to merge; leave out --merge")
        if self.merge and self.merge_16bit:
            raise InputError("a checkpoint is quantized or in 16 bits: choose --merge or --merge-16bit")


@dataclass(frozen=True)
class Finetuned:
    """What a run did: its settings, data, losses, time and memory, and what merging lost."""

    model: str
    method: str
    scheme: str
    data: str
    data_hash: str
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    peak_memory_bytes: int
    trained_parameters: int
    settings: dict[str, Any]
    versions: dict[str, str]
    merge_error: float | None = None
    merge_kld: float | None = None

    def __str__(self) -> str:
        first, last = _mean(self.losses[:10]), _mean(self.losses[-10:])
        text = f"{self.method} of {self.model} as {self.scheme}: {len(self.losses)} steps, {self.tokens} tokens, "
        text += (
            f"loss {first:.4g} -> {last:.4g}, {self.trained_parameters:,} parameters trained in {self.seconds:.0f} s"
        )
        return text if self.merge_kld is None else f"{text}; merging cost KL {self.merge_kld:.3g} nats a token"


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
        work = _Work(source, windows, options, target, progress, out.parent / f".{out.name}.training")
        memory.reset_peak(target)
        run = _qlora if options.method == "qlora" else _qat
        with atomic_folder(out, overwrite) as folder:
            done = run(work, folder)
            peak = memory.peak_bytes(target)
            done = replace(done, seconds=time.perf_counter() - started, peak_memory_bytes=peak)
            (folder / "finetuning.json").write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work.checkpoints, ignore_errors=True)
    return done


@dataclass(frozen=True)
class _Work:
    """Everything that both methods need."""

    source: Source
    windows: Tokens
    options: Finetuning
    device: torch.device
    progress: Progress
    checkpoints: Path

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme.parse(self.options.scheme or METHODS[self.options.method][0])

    @property
    def lr(self) -> float:
        return METHODS[self.options.method][1] if self.options.lr is None else self.options.lr

    @property
    def stored_dtype(self) -> torch.dtype:
        return model_config(self.source).dtype or torch.float32

    @property
    def working_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.stored_dtype

    @property
    def fast(self) -> bool:
        """Whether steps run as a graph, or compiled."""
        return self.device.type == "cuda" and not self.options.eager

    def train(
        self, model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, autocast: bool, graphed: bool
    ) -> Run:
        options = replace(self.options.loop, autocast=autocast and self.device.type == "cuda", graphed=graphed)
        return train(model, self.windows.ids, objective, optimizer, options, self.checkpoints, self.progress)

    def done(self, run: Run, model: nn.Module) -> Finetuned:
        return Finetuned(
            model=self.source.name,
            method=self.options.method,
            scheme=str(self.scheme),
            data=self.windows.source,
            data_hash=self.windows.hash,
            tokens=len(run.losses) * self.options.loop.batch * self.options.seq_len,
            losses=tuple(run.losses),
            seconds=0.0,
            peak_memory_bytes=0,
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            settings=asdict(self.options) | {"lr": self.lr, "rules": [str(rule) for rule in self.options.rules]},
            versions={name: version(name) for name in ("lowbit", "torch", "transformers")},
        )


def _qlora(work: _Work, folder: Path) -> Finetuned:
    if work.source.quantization is None:
        base = load_float(work.source, work.working_dtype)
        layout = disk_layout(base)
        selection = select(base, find_blocks(base)[0], work.scheme, work.options.rules)
        recipe = Recipe(work.scheme, "rtn")
        quantize_blocks(base, Job(recipe, selection, [], work.stored_dtype, progress=work.progress))
    else:
        if work.options.scheme is not None:
            raise InputError(f"{work.source.name} is quantized already; leave out --scheme")
        if work.options.merge:
            raise InputError(
                f"{work.source.name} is quantized already; merge with lowbit.merge_lora, or give the original"
            )
        base, layout = load_source(work.source, work.working_dtype), {}
    adapted = add_lora(base.to(work.device), work.options.lora, work.options.loop.seed)  # type: ignore[arg-type]
    base.enable_input_require_grads()
    if work.device.type == "cuda":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if work.fast:
        compile_blocks(base)
    optimizer = AdamW8bit([p for p in adapted.parameters() if p.requires_grad], lr=work.lr, weight_decay=0.0)
    run = work.train(adapted, next_token_loss, optimizer, autocast=True, graphed=False)
    done = work.done(run, adapted)
    adapted.eval()
    if work.fast:
        plain_blocks(base)
    if not (work.options.merge or work.options.merge_16bit):
        adapted.save_pretrained(str(folder))
        return done
    merged, report = merge_lora(adapted, work.options.merge_16bit, [work.windows.ids[:1]])
    if work.options.merge:
        write_checkpoint(work.source, folder, merged.cpu(), layout, work.stored_dtype)
    else:
        merged.config.__dict__.pop("quantization_config", None)
        merged.cpu().to(dtype=work.stored_dtype).save_pretrained(folder)  # type: ignore[call-arg]
        load_tokenizer(work.source).save_pretrained(folder)
    return replace(done, merge_error=max(layer.relative_error for layer in report.layers), merge_kld=report.kld)


def _qat(work: _Work, folder: Path) -> Finetuned:
    if work.source.quantization is not None:
        raise InputError(f"{work.source.name} is quantized already; qat trains the original")
    dtype = torch.bfloat16 if work.working_dtype == torch.bfloat16 else torch.float32  # float16 wants loss scaling
    student: PreTrainedModel = load_float(work.source, dtype).to(work.device)  # type: ignore[arg-type]
    layout, objective, called = disk_layout(student), next_token_loss, Capturable if work.fast else _as_it_is
    if work.options.distill:
        teacher = load_float(work.source, work.working_dtype).to(work.device)  # type: ignore[arg-type]
        frozen([teacher])
        objective = Teacher(called(teacher))  # type: ignore[assignment]
    student.requires_grad_(False)  # the checkpoint takes everything but the linears from the original's files
    options = qat.QatOptions(FakeOptions(scale_dtype=work.stored_dtype, masters=True))
    qat.prepare(student, work.scheme, work.options.rules, options)
    scales = qat.scale_parameters(student)
    weights = [module.weight.requires_grad_() for module in student.modules() if isinstance(module, FakeQuantLinear)]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": scales, "lr": SCALE_RATE * work.lr}]
    optimizer = AdamW8bit(groups, lr=work.lr, weight_decay=0.0)
    run = work.train(called(student), objective, optimizer, autocast=dtype == torch.float32, graphed=work.fast)
    done = work.done(run, student)
    write_checkpoint(work.source, folder, qat.convert(student).cpu(), layout, work.stored_dtype)
    return done


def _as_it_is(model: PreTrainedModel) -> nn.Module:
    return model


def _mean(losses: tuple[float, ...]) -> float:
    return sum(losses) / max(1, len(losses))
