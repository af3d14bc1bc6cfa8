"""How `lowbit.finetune` trains: qlora and qat, each from an opened source to a filled folder."""

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.finetuning_options import METHODS, SCALE_RATE, Finetuned, Finetuning, Progress
from lowbit.io.checkpoint import write_checkpoint
from lowbit.io.load import load_source
from lowbit.io.names import disk_layout
from lowbit.io.source import Source, load_float, load_tokenizer, model_config
from lowbit.model.capturable import Capturable
from lowbit.model.quantize import Job, batched, quantize_blocks
from lowbit.model.recipe import Recipe
from lowbit.model.select import select
from lowbit.nn.fake import FakeOptions, FakeQuantLinear
from lowbit.numerics.scheme import QuantScheme
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens
from lowbit.train import qat
from lowbit.train.compiled import compile_blocks, plain_blocks
from lowbit.train.distill import Objective, Teacher, frozen, next_token_loss
from lowbit.train.loop import Run, train
from lowbit.train.optim import AdamW8bit
from lowbit.train.qlora import add_lora, merge_lora

START_TOKENS = 65536  # of the training text, for the method that qat starts from


@dataclass(frozen=True)
class Work:
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


def qlora_run(work: Work, folder: Path) -> Finetuned:
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


def qat_run(work: Work, folder: Path) -> Finetuned:
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
    rewritten, added = _fake_quantized(work, student)
    scales = qat.scale_parameters(student)
    weights = [module.weight.requires_grad_() for module in student.modules() if isinstance(module, FakeQuantLinear)]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": scales, "lr": SCALE_RATE * work.lr}]
    optimizer = AdamW8bit(groups, lr=work.lr, weight_decay=0.0)
    run = work.train(called(student), objective, optimizer, autocast=dtype == torch.float32, graphed=work.fast)
    done = work.done(run, student)
    write_checkpoint(work.source, folder, qat.convert(student).cpu(), layout, work.stored_dtype, rewritten, added)
    return done


def _fake_quantized(work: Work, student: PreTrainedModel) -> tuple[set[str], list[str]]:
    """Fake-quantize `student` in place; (float parameters that this changed, those that the original does not have)."""
    options = qat.QatOptions(FakeOptions(scale_dtype=work.stored_dtype, masters=True))
    if work.options.start is None:
        qat.prepare(student, work.scheme, work.options.rules, options)
        return set(), []
    recipe = Recipe(work.scheme, work.options.start, work.options.rules)
    selection = select(student, find_blocks(student)[0], recipe.scheme, recipe.rules)
    ids = work.windows.ids[: max(1, START_TOKENS // work.options.seq_len)]
    job = Job(recipe, selection, list(batched(ids, 8192)), work.stored_dtype, work.device, work.progress)
    log = quantize_blocks(student, job)
    qat.reopen(student, options)
    head = student.get_output_embeddings()
    return log.rewritten, [f"{name}.weight" for name, part in student.named_modules() if log.untied and part is head]


def _as_it_is(model: PreTrainedModel) -> nn.Module:
    return model
