"""Rotations inside a block: the values of its heads (R2), and the inputs of layers at run time (R4); see rotate.py."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.algorithms.rotate import balanced_order, rotate_columns, rotate_rows
from lowbit.algorithms.smooth import SMALLEST
from lowbit.model.fold import find_writer, fold
from lowbit.model.rotation import Rotated, Rotation, close, output_of, parameters_of, weight_of
from lowbit.nn.rotated import RotatedLinear
from lowbit.numerics.hadamard import Hadamard
from lowbit.observe.blocks import Block


def head_size(model: PreTrainedModel) -> int:
    config: Any = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _value_rows(
    block: Block, linears: list[str], writers: list[str], width: int, size: int, groups: int
) -> Iterator[tuple[str, int]]:
    """(linear, first row) of what may be the values that a projection of `width` inputs reads, heads of `size`.

    groups: heads of queries to one of values.
    """
    for name in linears:
        rows = weight_of(block, name).shape[0]
        if width % size or name in writers:
            continue
        if rows % size == 0 and rows <= width:
            yield name, 0
        if rows == width + 2 * width // groups:  # queries, keys and values, one after the other
            yield name, rows - width // groups


def turn_heads(
    block: Block, linears: list[str], writers: list[str], turn: Hadamard, groups: int, done: Rotated
) -> dict[str, str]:
    """R2 in one block: {values' linear: output projection} where a pair was found, by trying.

    Values are a linear of their own, or the last rows of one that gives queries and keys too.
    """
    before, size = output_of(block), turn.size
    for projection in writers:
        w_out = weight_of(block, projection)
        for values, first in _value_rows(block, linears, writers, w_out.shape[1], size, groups):
            parameters = [parameter for _, parameter in parameters_of(block, values)]
            kept = [parameter.clone() for parameter in (w_out, *parameters)]
            w_out.copy_(rotate_columns(w_out, turn))
            for parameter in parameters:
                parameter[first:] = rotate_rows(parameter[first:], turn)
            if close(output_of(block), before):
                done.rewritten |= {f"{block.name}.{values}.{kind}" for kind, _ in parameters_of(block, values)}
                done.rewritten |= {f"{block.name}.{projection}.weight"}
                return {f"{block.name}.{values}": f"{block.name}.{projection}"}
            for parameter, value in zip((w_out, *parameters), kept, strict=True):
                parameter.copy_(value)
    return {}


def queries_per_value(model: PreTrainedModel) -> int:
    """How many heads of queries share one of keys and values."""
    config: Any = model.config
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def turn_inputs(
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
        if options.smoothing is not None and name in writers:
            _smooth(block, linears, name, options.smoothing, done)
        if turn.block < turn.size and name in writers:
            _balance(block, linears, name, turn.block, done)
        parent, _, attribute = name.rpartition(".")
        setattr(block.module.get_submodule(parent), attribute, RotatedLinear.from_linear(layer, turn))
        done.online[full] = turn


def _input_of(block: Block, name: str) -> tuple[Tensor, Tensor]:
    """(what a linear reads [M, K], the block's output) on the tokens."""
    seen: list[Tensor] = []
    hook = block.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    output = output_of(block)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]), output  # [..., K] -> [M, K]


def _smooth(block: Block, linears: list[str], name: str, exponent: float, done: Rotated) -> None:
    """Divide the channels that a linear reads by max|x|^a / |w|^(1-a), if another linear writes them."""
    writer = find_writer(block, [name], linears)
    if writer is None or writer.kind != "rows":
        return
    x, _ = _input_of(block, name)
    size, weight = x.abs().amax(0).float(), weight_of(block, name).float().norm(dim=0)
    scales = (size.clamp(min=SMALLEST) ** exponent / weight.clamp(min=SMALLEST) ** (1 - exponent)).clamp(min=SMALLEST)
    fold(block.module, writer, [name], scales / scales.log().mean().exp())
    done.rewritten |= {f"{block.name}.{name}.weight"}
    done.rewritten |= {f"{block.name}.{writer.name}.{kind}" for kind, _ in parameters_of(block, writer.name)}


def _balance(block: Block, linears: list[str], name: str, size: int, done: Rotated) -> None:
    """Order a linear's input channels so that blocks of `size` carry alike, if the linears before it allow that."""
    w = weight_of(block, name)
    x, before = _input_of(block, name)
    order = balanced_order(x.float().square().mean(0), size).to(w.device)
    sources = [n for n in linears if n != name and weight_of(block, n).shape[0] in (w.shape[1], 2 * w.shape[1])]
    changed = {f"{name}.weight": (w, w[:, order])}
    for source in sources:
        for kind, parameter in parameters_of(block, source):
            halves = parameter.unflatten(0, (-1, w.shape[1]))  # [K or 2 K, ...] -> [1 or 2, K, ...]
            changed[f"{source}.{kind}"] = (parameter, halves[:, order].flatten(0, 1))
    kept = [parameter.clone() for parameter, _ in changed.values()]
    for parameter, value in changed.values():
        parameter.copy_(value)
    if close(output_of(block), before):
        done.rewritten |= {f"{block.name}.{changed_name}" for changed_name in changed}
        return
    for (parameter, _), value in zip(changed.values(), kept, strict=True):
        parameter.copy_(value)
