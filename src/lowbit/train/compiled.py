"""Decoder blocks compiled one by one: their small operations run as few fused kernels.

One block is compiled, all blocks of a model run its code: seconds of compiling instead of the minutes of a whole model.
Fake quantization and the products with packed weights are ops that the compiler takes as they are.
"""

from transformers import PreTrainedModel

from lowbit.observe.capture import find_blocks


def compile_blocks(model: PreTrainedModel) -> None:
    """Let torch.compile make each decoder block of `model`, in place, at its first use; parameters stay as they are."""
    for block in find_blocks(model)[1]:
        block.compile()


def plain_blocks(model: PreTrainedModel) -> None:
    """Undo `compile_blocks`, in place: a model that is taken apart again would be compiled anew for each part."""
    for block in find_blocks(model)[1]:
        block._compiled_call_impl = None
