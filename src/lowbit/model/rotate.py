"""Rotate a model: its residual stream, the values of its heads, and the inputs of some layers at run time.

    R1   every norm's gain goes into the linears behind it; then the embedding, all linears that write to the residual
         stream and all that read its norms, and the head turn with one matrix. RMS norms without gain turn with it
    R2   in each block the values turn head by head, and the output projection turns them back
    R4   layers turn their own input at run time (nn/rotated.py) and have weights that are turned alike

Nothing is known by name. Norms are found by trying (fold.py), writers to the residual stream by their sums
(aligned.py), values and their projection by trying again. Each block is run before and after on the same tokens, and
must give the turned output; then the whole model is compared. A head that shares the embedding's weight gets its own.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.rotate import rotate_columns, rotate_rows
from lowbit.errors import MethodError
from lowbit.model.aligned import residual_sources
from lowbit.model.fold import find_writer, in_float32
from lowbit.model.rotate_inputs import head_size, queries_per_value, turn_heads, turn_inputs
from lowbit.model.rotation import Rotated, Rotation, close, output_of, parameters_of, weight_of
from lowbit.numerics.hadamard import Hadamard
from lowbit.observe.blocks import Block, BlockStream
from lowbit.observe.inputs import input_groups

TOKENS = 64  # that the checks run on


@torch.no_grad()
def rotate_model(
    model: PreTrainedModel, options: Rotation, chosen: Sequence[str], ids: Tensor | None = None
) -> Rotated:
    """Rotate `model` in place; chosen: the names of linears that will be quantized; ids [b, T]: tokens to check on.

    Raises MethodError where a rotation does not apply to this model, with the reason; the model is spoilt then.
    """
    device = next(model.parameters()).device
    tokens = _tokens(model, ids)
    before = model(input_ids=tokens.to(device), use_cache=False).logits
    done, embedding = Rotated(), model.get_input_embeddings()
    width = cast("nn.Embedding", embedding).weight.shape[1]
    turn = Hadamard.of(width, seed=options.seed) if options.residual else None
    if turn is not None:
        _check_norms(model, width)
        _untie(model, done)
        weight = cast("nn.Embedding", embedding).weight  # a new one: the old head may be somebody's reference
        embedding.weight = nn.Parameter(rotate_columns(weight, turn), requires_grad=weight.requires_grad)
    pairs: dict[str, str] = {}
    with BlockStream(model, [tokens], device, device) as stream:
        name = stream.name
        for block in stream:
            with in_float32(block):
                linears = [n for n, part in block.module.named_modules() if isinstance(part, nn.Linear)]
                writers = list(residual_sources(block, linears))
                if turn is not None:
                    _turn_block(block, linears, writers, turn, done)
                if options.heads:
                    heads = Hadamard.of(head_size(model), seed=options.seed)
                    pairs |= turn_heads(block, linears, writers, heads, queries_per_value(model), done)
                turn_inputs(block, linears, writers, set(pairs.values()), options, chosen, done)
    done.heads = len(pairs)
    if turn is not None:
        _turn_head(model, name, turn, done)
    after = model(input_ids=tokens.to(device), use_cache=False).logits
    if not close(after, before):
        raise MethodError(
            f"rotations do not apply to {type(model).__name__}: its logits change by "
            f"{float((after - before).norm() / before.norm()):.2g}; something between embedding and head is not turned "
            "alike. Use --method aligned, or Rotation(residual=False, heads=False)"
        )
    return done


def _tokens(model: PreTrainedModel, ids: Tensor | None) -> Tensor:
    """[1, TOKENS] token ids: the first of the calibration text, or a fixed walk through the vocabulary."""
    if ids is not None:
        return ids[:1, :TOKENS]
    return (torch.arange(TOKENS) * 7919 % cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0])[None]


def _check_norms(model: PreTrainedModel, width: int) -> None:
    """Raise MethodError for a norm of the residual stream that subtracts the mean: it does not turn."""
    for name, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.shape[0] != width:
            continue
        x = torch.linspace(-1, 2, width, device=weight.device, dtype=weight.dtype)[None]
        norm: Any = part
        if torch.allclose(norm(x), norm(x + 5), atol=1e-3):
            raise MethodError(
                f"{name} subtracts the mean of the residual stream, which therefore can't be rotated; use "
                'Rotation(residual=False, heads=False, online="all"), or --method aligned'
            )


def _untie(model: PreTrainedModel, done: Rotated) -> None:
    """Give the model a new head, and one that shared the embedding's weight a copy of it.

    The old head stays as it is: who keeps the original's answers (judge.py) still reads it.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise MethodError(f"{type(model).__name__} has no head that could be rotated; use Rotation(residual=False)")
    own = copy.copy(head)
    own._parameters = dict(head._parameters)
    own.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.set_output_embeddings(own)
    if head.weight is not cast("nn.Embedding", embedding).weight:
        return
    model.config.tie_word_embeddings = False
    done.untied = True


def _turn_block(block: Block, linears: list[str], writers: list[str], turn: Hadamard, done: Rotated) -> None:
    """R1 in one block, whose input is turned already. Raises MethodError where its output does not turn."""
    before = output_of(block, turn)
    for group in input_groups(block, linears).groups:
        norm = find_writer(block, group, ())
        if norm is None:
            continue
        part = block.module.get_submodule(norm.name)
        weight: Any = part.weight
        gain = weight.double() + (1 if norm.kind == "one plus" else 0)
        weight.fill_(0 if norm.kind == "one plus" else 1)
        done.rewritten |= {f"{block.name}.{norm.name}.weight"}
        for name in group:
            w = weight_of(block, name)
            w.copy_(rotate_columns(w.double() * gain, turn))
            done.rewritten |= {f"{block.name}.{name}.weight"}
    for name in writers:
        for kind, parameter in parameters_of(block, name):
            parameter.copy_(rotate_rows(parameter, turn))
            done.rewritten |= {f"{block.name}.{name}.{kind}"}
    after = output_of(block)
    if not close(after, turn.apply(before)):
        raise MethodError(
            f"the residual stream of {block.name} can't be rotated: a norm there has a gain between a linear and the "
            "stream, or something else than linears reads its norms (a router, experts). Use "
            'Rotation(residual=False, heads=False, online="all"), or --method aligned'
        )


def _turn_head(model: PreTrainedModel, blocks: str, turn: Hadamard, done: Rotated) -> None:
    """The last norm's gain into the head, and the head turned."""
    head = cast("nn.Linear", model.get_output_embeddings())
    outside: list[tuple[str, Any]] = [
        (name, part) for name, part in model.named_modules() if not name.startswith(f"{blocks}.")
    ]
    norms = [
        (name, part)
        for name, part in outside
        if isinstance(getattr(part, "weight", None), Tensor) and part.weight.shape == (turn.size,)
    ]
    if len(norms) != 1:
        raise MethodError(
            f"{type(model).__name__} has {len(norms)} norms outside its blocks, so lowbit can't tell the last one; use "
            "Rotation(residual=False)"
        )
    name, part = norms[0]
    weight = part.weight
    x = torch.ones(1, turn.size, device=weight.device, dtype=weight.dtype)
    old = weight.clone()
    weight.zero_()
    one_plus = bool(part(x).abs().max() > 0.5)
    gain = old.double() + (1 if one_plus else 0)
    weight.fill_(0 if one_plus else 1)
    head.weight.copy_(rotate_columns(head.weight.double() * gain, turn))
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    head_name = next(n for n, m in model.named_modules() if m is head)
    done.rewritten |= {f"{name}.weight", f"{embedding}.weight", f"{head_name}.weight"}
