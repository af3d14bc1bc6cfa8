"""What a fine-tuning run is asked for, and what it says it did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import InputError
from lowbit.model.recipe import METHODS as STARTS
from lowbit.model.select import Rule
from lowbit.train.loop import LoopOptions
from lowbit.train.qlora import LoraOptions

METHODS = {"qlora": ("nf4-b64-dq", 2e-4), "qat": ("w4a16-g64", 2e-5)}
"""Method -> the scheme and the learning rate that it has by default (QLoRA's appendix B; ParetoQ, LLM-QAT)."""
SCALE_RATE = 0.1  # of the weights' rate: a scale of 0.03 that moves by 1e-4 a step undid GPTQ (docs/log-training.md)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finetuning:
    """What to train: method, scheme and lr (None: the method's own), windows of seq_len tokens.

    distill: qat learns from the original instead of from the text's next tokens. start: the method (recipe.py) that
    qat's model is quantized by before it is trained, None: rounding with clips searched. merge: qlora writes a
    checkpoint with the adapter in it instead of the adapter; merge_16bit: one that is not quantized. rules: other
    schemes for some layers, as in a recipe. eager: on a CUDA device, neither replay qat's steps as a CUDA graph nor
    compile the blocks of qlora's model.
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
    start: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if (self.merge or self.merge_16bit) and self.method != "qlora":
            raise InputError("only qlora has adapters to merge; leave out --merge")
        if self.start is not None and self.method != "qat":
            raise InputError("only qat starts from another method's result; leave out --start")
        if self.start is not None and self.start not in STARTS:
            raise InputError(f"qat can't start from {self.start!r}; choose one of {', '.join(STARTS)}")
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


def _mean(losses: tuple[float, ...]) -> float:
    return sum(losses) / max(1, len(losses))
