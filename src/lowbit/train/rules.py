"""What one optimizer step does to a parameter, in float32, as plain torch: the meaning of the CUDA kernel too.

    adam      m <- b1 m + (1 - b1) g       v <- b2 v + (1 - b2) g^2      p <- p - lr/c1 m / (sqrt(v)/c2 + eps)
    lion      u = b1 m + (1 - b1) g        p <- p - lr sign(u)           m <- b2 m + (1 - b2) g
    momentum  m <- b1 m + g (m <- g first)                               p <- p - lr m

with c1 = 1 - b1^t and c2 = sqrt(1 - b2^t). Weight decay is decoupled, p <- (1 - lr decay) p first (AdamW,
arXiv:1711.05101; Lion, arXiv:2302.06675), or coupled, g <- g + decay p (Adam, SGD). The order of operations is that
of bitsandbytes' CPU path, so that states are bitwise equal to its.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowbit.kernels.cuda.optim import Scalars


@dataclass(frozen=True)
class Hyper:
    """The numbers of one step; step counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool

    @property
    def shrink(self) -> float:
        """What decoupled decay multiplies the parameter by."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled else 1.0

    @property
    def l2(self) -> float:
        """What coupled decay adds of the parameter to its gradient."""
        return 0.0 if self.decoupled else self.weight_decay

    def scalars(self, rule: str) -> Scalars:
        """The numbers as the CUDA kernel takes them; adam's denominator is divided by the rate beforehand."""
        rate, eps, correction = -self.lr, self.eps, 1.0
        if rule == ADAM.name:
            rate = min(-self.lr / self.correction1, -1e-30)  # a rate of 0 would divide by 0; this one moves nothing
            eps, correction = eps / rate, 1 / self.correction2 / rate
        betas = (self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2)
        return Scalars(self.shrink, self.l2, *betas, eps, rate, correction, float(self.step == 1))

    @property
    def correction1(self) -> float:
        return 1.0 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        return math.sqrt(1.0 - self.beta2**self.step)


@dataclass(frozen=True)
class Slot:
    """One state of a rule: its name in the state dict, and whether it takes negative values."""

    name: str
    signed: bool


@dataclass(frozen=True)
class Rule:
    """A step rule: its name, its states, and the function that applies it to (p, g, states, hyper) in place."""

    name: str
    slots: tuple[Slot, ...]
    apply: Callable[[Tensor, Tensor, list[Tensor], Hyper], None]


def _decay(p: Tensor, g: Tensor, hyper: Hyper) -> None:
    if hyper.weight_decay == 0:
        return
    if hyper.decoupled:
        p.mul_(hyper.shrink)
    else:
        g.add_(p, alpha=hyper.l2)


def _adam(p: Tensor, g: Tensor, states: list[Tensor], hyper: Hyper) -> None:
    _decay(p, g, hyper)
    m, v = states
    m.mul_(hyper.beta1).add_(g, alpha=1.0 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1.0 - hyper.beta2)
    p.addcdiv_(m, (v.sqrt() / hyper.correction2).add_(hyper.eps), value=-hyper.lr / hyper.correction1)


def _lion(p: Tensor, g: Tensor, states: list[Tensor], hyper: Hyper) -> None:
    _decay(p, g, hyper)
    (m,) = states
    p.add_((m.mul(hyper.beta1) + g.mul(1.0 - hyper.beta1)).sign(), alpha=-hyper.lr)
    m.mul_(hyper.beta2).add_(g, alpha=1.0 - hyper.beta2)


def _momentum(p: Tensor, g: Tensor, states: list[Tensor], hyper: Hyper) -> None:
    _decay(p, g, hyper)
    (m,) = states
    if hyper.step == 1:
        m.copy_(g)
    else:
        m.mul_(hyper.beta1).add_(g)
    p.add_(m, alpha=-hyper.lr)


ADAM = Rule("adam", (Slot("exp_avg", True), Slot("exp_avg_sq", False)), _adam)
LION = Rule("lion", (Slot("exp_avg", True),), _lion)
MOMENTUM = Rule("momentum", (Slot("momentum_buffer", True),), _momentum)
