"""How parameters are cut on disk. Oracle: what transformers itself writes for the same model, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from architectures import TINY, tiny
from checkpoints import stored_tensors
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.io.names import Piece, disk_layout

SPLIT_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
WHOLE_EXPERTS = ["granitemoe", "gpt_oss", "llama4_text"]


def on_disk(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What transformers saves of a model, without the tensors that are no parameters of it."""
    model.save_pretrained(folder)
    buffers = dict(model.named_buffers())
    return {name: tensor for name, tensor in stored_tensors(folder).items() if name not in buffers}


def cut(model: PreTrainedModel, piece: Piece) -> Tensor:
    """The rows of the parameter that a piece speaks of."""
    parameter = model.get_parameter(piece.parameter)
    matrix = parameter if piece.expert is None else parameter[piece.expert]
    return matrix[piece.start : piece.stop]


@pytest.mark.parametrize("model_type", TINY)
def test_each_disk_tensor_is_the_rows_it_is_said_to_be(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    layout, stored = disk_layout(model), on_disk(model, tmp_path)
    assert layout.keys() == stored.keys()
    for name, piece in layout.items():
        assert torch.equal(cut(model, piece), stored[name]), name


@pytest.mark.parametrize("model_type", [name for name in TINY if name not in WHOLE_EXPERTS])
def test_every_row_of_every_parameter_lies_in_one_disk_tensor(model_type: str) -> None:
    model = tiny(model_type)
    covered = dict.fromkeys(dict(model.named_parameters()), 0)
    for piece in disk_layout(model).values():
        covered[piece.parameter] += cut(model, piece).numel()
    assert covered == {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_mixtrals_experts_are_renamed_and_split() -> None:
    layout, prefix = disk_layout(tiny("mixtral")), "model.layers.0.block_sparse_moe"
    gate_up = "model.layers.0.mlp.experts.gate_up_proj"
    assert layout[f"{prefix}.experts.2.w1.weight"] == Piece(gate_up, 2, 0, 96)
    assert layout[f"{prefix}.experts.2.w3.weight"] == Piece(gate_up, 2, 96, 192)
    assert layout[f"{prefix}.experts.3.w2.weight"] == Piece("model.layers.0.mlp.experts.down_proj", 3, 0, 64)
    assert layout[f"{prefix}.gate.weight"] == Piece("model.layers.0.mlp.gate.weight", None, 0, 4)


@pytest.mark.parametrize("model_type", SPLIT_EXPERTS)
def test_experts_that_the_disk_keeps_apart_are_cut_by_expert(model_type: str) -> None:
    model = tiny(model_type)
    experts = {piece.parameter for piece in disk_layout(model).values() if piece.expert is not None}
    assert experts == {name for name, parameter in model.named_parameters() if parameter.dim() == 3}


@pytest.mark.parametrize("model_type", WHOLE_EXPERTS)
def test_experts_that_are_one_tensor_on_disk_have_no_expert(model_type: str) -> None:
    assert {piece.expert for piece in disk_layout(tiny(model_type)).values()} == {None}


def test_a_tied_head_has_no_name_of_its_own() -> None:
    assert "lm_head.weight" not in disk_layout(tiny("gemma2"))
    assert "lm_head.weight" in disk_layout(tiny("llama"))


def test_the_model_is_left_as_it_was() -> None:
    model, twin = tiny("mixtral"), tiny("mixtral")
    disk_layout(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
