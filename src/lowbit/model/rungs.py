"""What each rung of --effort gained in a layer: the errors that the rungs below it leave, on the same statistics.

Rounding to nearest costs one pass over the weights and is always compared; weighted scales cost a search and are where
the rung is 3 or higher. All rungs below are run in full by effort.py, which adds the errors of the others.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.algorithms.rtn import solve_rtn
from lowbit.algorithms.scales import ScaleSearch
from lowbit.numerics import metrics
from lowbit.numerics.scheme import QuantScheme
from lowbit.report import LayerRecord, RungRecord

WEIGHTED_FROM = 3  # rungs from which on rung 1 is compared as well


def errors_below(
    w: Tensor, scheme: QuantScheme, moment: Tensor, scale_dtype: torch.dtype, effort: int, rows: Sequence[slice]
) -> list[tuple[RungRecord, ...]]:
    """For each slice of the rows of w [N, K]: its errors under rungs 0 (and 1), moment [K, K] that of its inputs."""
    tried = [("rtn", solve_rtn(w, scheme.weights, scale_dtype).dequantized)]
    if effort >= WEIGHTED_FROM:
        weighted = solve_rtn(w, scheme.weights, scale_dtype, ScaleSearch(), moment.diagonal())
        tried.append(("rtn-weighted", weighted.dequantized))
    return [
        tuple(
            RungRecord(
                method,
                metrics.relative_error(w[part], rounded[part]),
                metrics.output_error(w[part] - rounded[part], w[part], moment),
            )
            for method, rounded in tried
        )
        for part in rows
    ]


def with_lower_run(records: Sequence[LayerRecord], lower: Sequence[LayerRecord]) -> list[LayerRecord]:
    """The records with the errors that the run of a rung below left in the same layers."""
    by_name = {record.name: record for record in lower}
    found = []
    for record in records:
        known = {rung.method for rung in record.below} | {record.method}
        other = by_name.get(record.name)
        if other is not None and other.method not in known:
            rung = RungRecord(other.method, other.relative_error, other.output_error)
            record = replace(record, below=(*record.below, rung))
        found.append(record)
    return found
