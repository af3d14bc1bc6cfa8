"""How a model's parameters are named and cut on disk.

transformers renames parameters while it loads them, and merges the experts of a mixture into 3-D parameters: on disk
"block_sparse_moe.experts.0.w1.weight", in memory rows 0 to I-1 of "mlp.experts.gate_up_proj"[0]. The way back is its
own `revert_weight_conversion`; here it is run on probes, parameters filled with the numbers of their own rows, so that
each disk tensor tells where in memory it came from, whatever the architecture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class Piece:
    """Where a disk tensor lies in memory: rows start to stop of a parameter, or of one expert of a 3-D parameter."""

    parameter: str
    expert: int | None
    start: int
    stop: int


def disk_layout(model: PreTrainedModel) -> dict[str, Piece]:
    """Disk name -> piece, for every parameter that the disk keeps whole, by rows, or by expert and rows.

    A parameter that the disk keeps in another form (three-dimensional, transposed) is whole under its disk name, with
    expert None.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    layout = {}
    for disk_name, value in revert_weight_conversion(model, _probes(parameters)).items():
        owner, row = divmod(int(value.flatten()[0]), _STRIDE)
        shape = parameters[names[owner]].shape
        expert = None
        if len(shape) == 3 and value.dim() == 2:
            expert, row = divmod(row, shape[1])
        layout[disk_name] = Piece(names[owner], expert, row, row + value.shape[0])
    return layout


_STRIDE = 2**40


def _probes(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """For each parameter its number times 2^40 plus its rows' numbers: [N], [N, 1] or [E, N, 1], int64."""
    probes = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        lead = parameter.shape[:2] if parameter.dim() == 3 else parameter.shape[:1]
        rows = torch.arange(lead.numel()) + index * _STRIDE
        probes[name] = rows.view(*lead, *[1] * (parameter.dim() - len(lead)))
    return probes
