"""The table behind a budget: each group's size and cost under every level, and what can be read from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from lowbit.costs import Probe, costs, fused_groups, group_name, weight_errors
from lowbit.errors import InputError
from lowbit.model.allocation import FLOAT_BITS, Allocation, Group, Option, allocate, curve, stored_bits
from lowbit.model.select import Rule, Selection
from lowbit.numerics.scheme import QuantScheme
from lowbit.report import GroupRecord, TradeOff

CURVE_POINTS = 40  # of the trade-off in a report
WORTH = 0.9  # stories15M, GPTQ at 4 bits: a mix with the expected KL of w3 everywhere measured 1.06 of it


@dataclass(frozen=True)
class Table:
    """groups with their options; measured: (scheme, KL by group) of each level that was measured.

    most_float: how many weights may stay as they are. uniform: expected cost and bits with one level everywhere.
    """

    groups: tuple[Group, ...]
    measured: tuple[tuple[str, tuple[float, ...]], ...]
    most_float: float
    levels: tuple[QuantScheme, ...]
    tokens: int

    def within(self, bits: float) -> Allocation:
        """The least expected cost within `bits` a weight. Raises InputError where nothing fits.

        Where the upper measured level fits everywhere, groups go below it only for an expected gain that is worth it.
        """
        check_reachable(bits, curve(self.groups)[0].bits, self.levels[0])
        mix = allocate(self.groups, bits)
        if len(self.measured) < 2:
            return mix
        shifts = [int(len(group.options) > 1) for group in self.groups]
        upper = [replace(group, options=group.options[s:]) for group, s in zip(self.groups, shifts, strict=True)]
        if curve(upper)[0].bits > bits:
            return mix
        safe = allocate(upper, bits)
        chosen = tuple(place + shift for place, shift in zip(safe.chosen, shifts, strict=True))
        return mix if mix.cost < WORTH * safe.cost else replace(safe, chosen=chosen)

    def uniform(self, scheme: QuantScheme) -> Allocation:
        """`scheme` wherever it is an option; groups that rules decide stay as they are."""
        chosen = []
        for group in self.groups:
            places = [place for place, option in enumerate(group.options) if option.scheme == scheme]
            chosen.append(places[0] if places else 0)
        picked = [group.options[place] for group, place in zip(self.groups, chosen, strict=True)]
        weights = sum(group.weights for group in self.groups)
        bits, cost = sum(option.size for option in picked) / weights, sum(option.cost for option in picked)
        return Allocation(tuple(chosen), bits, cost)

    def curve(self) -> list[Allocation]:
        return curve(self.groups, self.most_float)

    def rules(self, allocation: Allocation) -> tuple[Rule, ...]:
        """A rule per layer for what was allocated, in the model's order; none for layers that rules decided before."""
        chosen = zip(self.groups, allocation.chosen, strict=True)
        return tuple(
            Rule(name, group.options[place].scheme)
            for group, place in chosen
            if len(group.options) > 1
            for name in group.names
        )

    def records(self, allocation: Allocation) -> tuple[GroupRecord, ...]:
        """What was chosen for each group, and what it costs alone."""
        found = []
        for number, (group, place) in enumerate(zip(self.groups, allocation.chosen, strict=True)):
            option = group.options[place]
            scheme = str(option.scheme) if option.scheme else "as it is"
            alone = tuple(klds[number] for _, klds in self.measured) if len(group.options) > 1 else ()
            found.append(
                GroupRecord(group_name(group.names), group.weights, scheme, option.size / group.weights, alone)
            )
        return tuple(found)

    def points(self, scale: float) -> tuple[TradeOff, ...]:
        """The curve thinned out, and every level everywhere; expected KL times `scale`."""
        whole = self.curve()
        step = max(len(whole) // CURVE_POINTS, 1)
        thin = [*whole[::step], *([whole[-1]] if (len(whole) - 1) % step else [])]
        named = [(str(level), self.uniform(level)) for level in self.levels]
        return (
            *(TradeOff("", point.bits, scale * point.cost, None) for point in thin),
            *(TradeOff(name, point.bits, scale * point.cost, None) for name, point in named),
        )


@torch.no_grad()
def measured_table(
    model: PreTrainedModel,
    selection: Selection,
    rules: Sequence[Rule],
    levels: Sequence[QuantScheme],
    probes: Sequence[QuantScheme],
    min_coverage: float | None,
    probe: Probe,
) -> Table:
    """Measure every group at the levels `probes` (neighbours, the lowest first); higher levels are derived.

    min_coverage: the share of the blocks' weights that must be quantized, None where nothing may stay as it is.
    """
    shapes = _shapes(model, selection)
    ruled = [name for name in shapes if any(fnmatchcase(name, rule.glob) for rule in rules)]
    free = [name for name in shapes if name not in ruled]
    fused = fused_groups(model, free, probe.ids[:1])
    scale_bits = torch.finfo(probe.scale_dtype).bits
    klds = costs(model, fused, probes, probe)
    above = [level for level in levels if level.weights.bits > probes[-1].weights.bits]
    errors = weight_errors(model, fused, [probes[-1], *above], probe.scale_dtype)
    groups = []
    for number, names in enumerate(fused):
        weights = sum(_count(shapes[name]) for name in names)
        found = [(scheme, klds[place][number]) for place, scheme in enumerate(probes)]
        base = errors[0][number] or 1.0
        found += [(level, found[-1][1] * errors[1 + place][number] / base) for place, level in enumerate(above)]
        sizes = [sum(stored_bits(scheme, shapes[name], scale_bits) for name in names) for scheme, _ in found]
        options = [Option(scheme, size, cost) for (scheme, cost), size in zip(found, sizes, strict=True)]
        if min_coverage is not None:
            options.append(Option(None, FLOAT_BITS * weights, 0.0))
        groups.append(Group(tuple(names), weights, tuple(options)))
    for name in ruled:
        size = stored_bits(selection.schemes[name], shapes[name], scale_bits)
        groups.append(Group((name,), _count(shapes[name]), (Option(selection.schemes[name], size, 0.0),)))
    measured = tuple((str(scheme), tuple(row)) for scheme, row in zip(probes, klds, strict=True))
    most_float = 0.0
    if min_coverage is not None:
        inside = sum(model.get_parameter(name).numel() for name in selection.eligible)
        total = sum(group.weights for group in groups)
        most_float = max(min(total - min_coverage * inside, total - 1.0), 0.0)  # something must be left to quantize
    return Table(tuple(groups), measured, most_float, (*probes, *above), probe.ids.numel())


def average_bits(model: PreTrainedModel, selection: Selection, scheme: QuantScheme, scale_dtype: torch.dtype) -> float:
    """Stored bits a weight with `scheme` for everything selected."""
    shapes, scale_bits = _shapes(model, selection), torch.finfo(scale_dtype).bits
    size = sum(stored_bits(scheme, shape, scale_bits) for shape in shapes.values())
    return size / sum(_count(shape) for shape in shapes.values())


def check_reachable(bits: float, least: float, smallest: QuantScheme) -> None:
    """Raise InputError for fewer bits a weight than the smallest level takes."""
    if bits < least:
        raise InputError(
            f"{bits:g} bits a weight can't be reached: the least is {least:.3f}, {smallest} with its scales and "
            "zero-points; ask for more bits, larger groups or smaller candidates"
        )


def _shapes(model: PreTrainedModel, selection: Selection) -> dict[str, tuple[int, ...]]:
    """Name in the selection -> shape of the weight."""
    parameters = dict(model.named_parameters())
    names = {name: name if name in parameters else f"{name}.weight" for name in selection.schemes}
    return {name: tuple(parameters[parameter].shape) for name, parameter in names.items()}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
