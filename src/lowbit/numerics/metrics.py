"""Distances, one definition each.

relative error   |a - b| / |a|  (Frobenius)            SQNR   -20 log10(relative error)  in dB
KL(p || q)       sum p (log p - log q)  in nats, rows of logits
"""

import math

import torch
from torch import Tensor


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """|reference - approximation| / |reference| over all elements, in float32; 0 when both are zero."""
    size = reference.float().norm().item()
    distance = (reference.float() - approximation.float()).norm().item()
    return distance / size if size else (0.0 if not distance else math.inf)


def sqnr_db(error: float) -> float:
    """Signal to quantization noise ratio in dB of a relative error; 999 stands for no error at all."""
    return -20 * math.log10(error) if error > 0 else 999.0


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference_logits) || softmax(logits)) per row [..., V] -> [...], float32, nats."""
    log_p = torch.log_softmax(reference_logits.float(), dim=-1)
    log_q = torch.log_softmax(logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def output_error(error: Tensor, weight: Tensor, second_moment: Tensor) -> float:
    """|x error^T| / |x weight^T| over the tokens whose second moment [K, K] is given; error, weight [N, K]."""
    noise, signal = torch.stack(_powers(error, weight, second_moment)).tolist()
    return math.sqrt(max(noise, 0.0) / signal) if signal > 0 else 0.0


def layer_errors(weight: Tensor, error: Tensor, second_moment: Tensor | None) -> tuple[float, float | None]:
    """(|error| / |weight|, `output_error`, None without a moment) of float32 [N, K]; a device is waited for once."""
    sizes = [weight.norm(), error.norm()]
    powers = [] if second_moment is None else _powers(error, weight, second_moment)
    size, distance, *rest = torch.stack([*sizes, *powers]).tolist()
    relative = distance / size if size else (0.0 if not distance else math.inf)
    if second_moment is None:
        return relative, None
    noise, signal = rest
    return relative, math.sqrt(max(noise, 0.0) / signal) if signal > 0 else 0.0


def _powers(error: Tensor, weight: Tensor, second_moment: Tensor) -> list[Tensor]:
    """[E|x error^T|^2, E|x weight^T|^2], 0-d."""
    return [((part @ second_moment) * part).sum() for part in (error, weight)]
