"""Rotate a model: its residual stream, the values of its heads, and the inputs of some layers at run time.

    R1   every norm's gain goes into the linears behind it; then the embedding, all linears that write to the residual
         stream and all that read its norms, and the head turn with one matrix. RMS norms without gain turn with it
    R2   in each block the values turn head by head, and the output projection turns them back
    R4   layers turn their own input at run time (nn/rotated.py) and have weights that are turned alike

Nothing is known by name. Norms are found by trying (fold.py), writers to the residual stream by their sums
(aligned.py), values and their projection by trying again. Each block is run before and after on the same tokens, and
must give the turned output; then the whole model is compared. A head that shares the embedding's weight gets its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.rotate import balanced_order, rotate_columns, rotate_rows
from lowbit.errors import InputError
from lowbit.model.aligned import residual_sources
from lowbit.model.fold import TOLERANCE, find_writer
from lowbit.nn.rotated import RotatedLinear
from lowbit.numerics.hadamard import Hadamard
from lowbit.observe.blocks import Block, BlockStream, hidden_states
from lowbit.observe.inputs import input_groups

ONLINE = ("none", "down", "writers", "all")
TOKENS = 64  # that the checks run on


@dataclass(frozen=True)
class Rotation:
    """residual: R1. heads: R2. online: which layers turn their input at run time (R4), of those that are quantized:
    "none"; "down", writers to the residual stream that R2 does not serve; "writers", all of these; or "all".

    block: the largest Hadamard block at run time, None for the whole input. seed: of the signs.
    """

    residual: bool = True
    heads: bool = True
    online: str = "down"
    block: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.online not in ONLINE:
            raise InputError(f"unknown choice of layers {self.online!r}; choose one of {', '.join(ONLINE)}")


@dataclass
class Rotated:
    """What was done: parameters that changed beside the quantized ones, new ones, layers that turn their input."""

    rewritten: set[str] = field(default_factory=set)
    untied: bool = False
    online: dict[str, Hadamard] = field(default_factory=dict)
    heads: int = 0


@torch.no_grad()
def rotate_model(
    model: PreTrainedModel, options: Rotation, chosen: Sequence[str], ids: Tensor | None = None
) -> Rotated:
    """Rotate `model` in place; chosen: the names of linears that will be quantized; ids [b, T]: tokens to check on.

    Raises InputError where a rotation does not apply to this model, with the reason; the model is spoilt then.
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
        weight = cast("nn.Embedding", embedding).weight
        weight.copy_(rotate_columns(weight, turn))
    pairs: dict[str, str] = {}
    with BlockStream(model, [tokens], device, device) as stream:
        name = stream.name
        for block in stream:
            linears = [n for n, part in block.module.named_modules() if isinstance(part, nn.Linear)]
            writers = list(residual_sources(block, linears))
            if turn is not None:
                _turn_block(block, linears, writers, turn, done)
            if options.heads:
                heads = Hadamard.of(_head_size(model), seed=options.seed)
                pairs |= _turn_heads(block, linears, writers, heads, _groups(model), done)
            _turn_inputs(block, linears, writers, set(pairs.values()), options, chosen, done)
    done.heads = len(pairs)
    if turn is not None:
        _turn_head(model, name, turn, done)
    after = model(input_ids=tokens.to(device), use_cache=False).logits
    if not _close(after, before):
        raise InputError(
            f"rotations do not apply to {type(model).__name__}: its logits change by "
            f"{float((after - before).norm() / before.norm()):.2g}; something between embedding and head is not turned "
            "alike. Use a method without rotation, or Rotation(residual=False, heads=False)"
        )
    return done


def _tokens(model: PreTrainedModel, ids: Tensor | None) -> Tensor:
    """[1, TOKENS] token ids: the first of the calibration text, or a fixed walk through the vocabulary."""
    if ids is not None:
        return ids[:1, :TOKENS]
    return (torch.arange(TOKENS) * 7919 % cast("nn.Embedding", model.get_input_embeddings()).weight.shape[0])[None]


def _close(a: Tensor, b: Tensor) -> bool:
    bound = 4 * TOLERANCE if torch.finfo(a.dtype).eps < 1e-4 else 64 * TOLERANCE
    return bool((a.float() - b.float()).norm() <= bound * b.float().norm())


def _check_norms(model: PreTrainedModel, width: int) -> None:
    """Raise InputError for a norm of the residual stream that subtracts the mean: it does not turn."""
    for name, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.shape[0] != width:
            continue
        x = torch.linspace(-1, 2, width, device=weight.device, dtype=weight.dtype)[None]
        norm: Any = part
        if torch.allclose(norm(x), norm(x + 5), atol=1e-3):
            raise InputError(
                f"{name} subtracts the mean of the residual stream, which therefore can't be rotated; use "
                'Rotation(residual=False, heads=False, online="all"), or a method without rotation'
            )


def _untie(model: PreTrainedModel, done: Rotated) -> None:
    """Give a head that shares the embedding's weight a copy of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no head that could be rotated; use Rotation(residual=False)")
    if head.weight is not cast("nn.Embedding", embedding).weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    done.untied = True


def _output(block: Block, rotation: Hadamard | None = None) -> Tensor:
    """The block's output on the tokens; its input is turned back by `rotation` first."""
    args, kwargs = block.arguments(0)
    if rotation is not None:
        args, kwargs = _turned_back(args, kwargs, rotation)
    return hidden_states(block.module(*args, **kwargs))


def _turned_back(args: tuple, kwargs: dict[str, Any], rotation: Hadamard) -> tuple[tuple, dict[str, Any]]:
    """The arguments with the hidden states, the first tensor among them, turned back."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], rotation.undo(value), *args[place + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: rotation.undo(kwargs[name])}


def _weight(block: Block, name: str) -> nn.Parameter:
    return cast("nn.Parameter", block.module.get_submodule(name).weight)


def _parameters(block: Block, name: str) -> list[tuple[str, nn.Parameter]]:
    """The weight of a linear and, if it has one, its bias."""
    return list(block.module.get_submodule(name).named_parameters(recurse=False))


def _turn_block(block: Block, linears: list[str], writers: list[str], turn: Hadamard, done: Rotated) -> None:
    """R1 in one block, whose input is turned already. Raises InputError where its output does not turn."""
    before = _output(block, turn)
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
            w = _weight(block, name)
            w.copy_(rotate_columns(w.double() * gain, turn))
            done.rewritten |= {f"{block.name}.{name}.weight"}
    for name in writers:
        for kind, parameter in _parameters(block, name):
            parameter.copy_(rotate_rows(parameter, turn))
            done.rewritten |= {f"{block.name}.{name}.{kind}"}
    after = _output(block)
    if not _close(after, turn.apply(before)):
        raise InputError(
            f"the residual stream of {block.name} can't be rotated: a norm there has a gain between a linear and the "
            "stream, or something else than linears reads its norms (a router, experts). Use "
            'Rotation(residual=False, heads=False, online="all"), or a method without rotation'
        )


def _head_size(model: PreTrainedModel) -> int:
    config: Any = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _value_rows(
    block: Block, linears: list[str], writers: list[str], width: int, size: int, groups: int
) -> Iterator[tuple[str, int]]:
    """(linear, first row) of what may be the values that a projection of `width` inputs reads, heads of `size`.

    groups: heads of queries to one of values.
    """
    for name in linears:
        rows = _weight(block, name).shape[0]
        if width % size or name in writers:
            continue
        if rows % size == 0 and rows <= width:
            yield name, 0
        if rows == width + 2 * width // groups:  # queries, keys and values, one after the other
            yield name, rows - width // groups


def _turn_heads(
    block: Block, linears: list[str], writers: list[str], turn: Hadamard, groups: int, done: Rotated
) -> dict[str, str]:
    """R2 in one block: {values' linear: output projection} where a pair was found, by trying.

    Values are a linear of their own, or the last rows of one that gives queries and keys too.
    """
    before, size = _output(block), turn.size
    for projection in writers:
        w_out = _weight(block, projection)
        for values, first in _value_rows(block, linears, writers, w_out.shape[1], size, groups):
            parameters = [parameter for _, parameter in _parameters(block, values)]
            kept = [parameter.clone() for parameter in (w_out, *parameters)]
            w_out.copy_(rotate_columns(w_out, turn))
            for parameter in parameters:
                parameter[first:] = rotate_rows(parameter[first:], turn)
            if _close(_output(block), before):
                done.rewritten |= {f"{block.name}.{values}.{kind}" for kind, _ in _parameters(block, values)}
                done.rewritten |= {f"{block.name}.{projection}.weight"}
                return {f"{block.name}.{values}": f"{block.name}.{projection}"}
            for parameter, value in zip((w_out, *parameters), kept, strict=True):
                parameter.copy_(value)
    return {}


def _groups(model: PreTrainedModel) -> int:
    """How many heads of queries share one of keys and values."""
    config: Any = model.config
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _turn_inputs(
    block: Block,
    linears: list[str],
    writers: list[str],
    served: set[str],
    options: Rotation,
    chosen: Sequence[str],
    done: Rotated,
) -> None:
    """R4 in one block."""
    if options.online == "none":
        return
    names = linears if options.online == "all" else writers
    for name in names:
        full = f"{block.name}.{name}"
        if full not in chosen or (options.online == "down" and full in served):
            continue
        layer = cast("nn.Linear", block.module.get_submodule(name))
        turn = Hadamard.of(layer.in_features, options.block, options.seed)
        if turn.block < turn.size and name in writers:
            _balance(block, linears, name, turn.block, done)
        parent, _, attribute = name.rpartition(".")
        setattr(block.module.get_submodule(parent), attribute, RotatedLinear.from_linear(layer, turn))
        done.online[full] = turn


def _balance(block: Block, linears: list[str], name: str, size: int, done: Rotated) -> None:
    """Order a linear's input channels so that blocks of `size` carry alike, if the linears before it allow that."""
    w, seen = _weight(block, name), []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = _output(block)
    hook.remove()
    mass = seen[0].reshape(-1, w.shape[1]).float().square().mean(0)
    order = balanced_order(mass, size).to(w.device)
    sources = [n for n in linears if n != name and _weight(block, n).shape[0] in (w.shape[1], 2 * w.shape[1])]
    changed = {f"{name}.weight": (w, w[:, order])}
    for source in sources:
        for kind, parameter in _parameters(block, source):
            halves = parameter.unflatten(0, (-1, w.shape[1]))  # [K or 2 K, ...] -> [1 or 2, K, ...]
            changed[f"{source}.{kind}"] = (parameter, halves[:, order].flatten(0, 1))
    kept = [parameter.clone() for parameter, _ in changed.values()]
    for parameter, value in changed.values():
        parameter.copy_(value)
    if _close(_output(block), before):
        done.rewritten |= {f"{block.name}.{changed_name}" for changed_name in changed}
        return
    for (parameter, _), value in zip(changed.values(), kept, strict=True):
        parameter.copy_(value)


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
        raise InputError(
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
