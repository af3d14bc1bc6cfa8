"""HF Trainer and accelerate drive our models and optimizers. Oracle: they converge, and stop where they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from architectures import TINY
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import lowbit
from lowbit.nn.linear import QuantLinear
from lowbit.train.distill import Teacher, frozen

IDS = torch.randint(3, 128, (16, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class SelfDistillation(Trainer):
    """A Trainer whose loss is the distance from a teacher."""

    teacher: Teacher

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self.teacher(model, inputs["input_ids"], torch.arange(len(inputs["input_ids"])))


def arguments(folder: Path, steps: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_steps=4,
        logging_steps=1, learning_rate=1e-3, warmup_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def trainer(folder: Path, steps: int) -> SelfDistillation:
    teacher = TINY["llama"]()
    frozen([teacher])
    model = lowbit.qat.prepare(TINY["llama"](), lowbit.QuantScheme.parse("w2a16-g32-asym"))
    optimizer = lowbit.optim.AdamW8bit(lowbit.optim.parameter_groups(model), lr=1e-3)
    made = SelfDistillation(model, arguments(folder, steps), train_dataset=ROWS, optimizers=(optimizer, None))
    made.teacher = Teacher(teacher)
    return made


@pytest.mark.filterwarnings("ignore")
def test_trainer_distills_checkpoints_resumes_and_the_result_is_saved(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", 8)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    again = trainer(tmp_path / "a", 8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    model = lowbit.qat.convert(first.model.eval())
    model.save_pretrained(tmp_path / "out")
    loaded = lowbit.load(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 21
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_trainer_drives_qlora_as_peft_users_write_it(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path / "model")
    lowbit.register()
    nf4 = lowbit.LowbitConfig("nf4-b64-dq")

    def quantized() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=nf4, dtype=torch.float32)

    base = quantized()
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = lowbit.optim.AdamW8bit([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    made = Trainer(adapted, arguments(tmp_path / "a", 8), train_dataset=ROWS, optimizers=(optimizer, None))
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(input_ids=IDS).logits
        again = lowbit.load_lora(quantized(), tmp_path / "adapter")
        assert torch.allclose(again(input_ids=IDS).logits, expected, atol=1e-5)
        merged, report = lowbit.merge_lora(adapted, batches=[IDS])
    assert report.kld is not None
    assert 0 < report.kld < 0.5
    assert isinstance(merged.model.layers[0].mlp.up_proj, QuantLinear)


def test_accelerate_prepares_and_steps() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test has made one
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = lowbit.qat.prepare(TINY["llama"](), lowbit.QuantScheme.parse("w4a8-g32")).train()
    optimizer = lowbit.optim.Lion8bit(model.parameters(), lr=3e-4)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(6):
        with accelerator.accumulate(prepared):
            loss = prepared(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            wrapped.step()
            wrapped.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {state["step"] for state in optimizer.state.values()} == {3}
    AcceleratorState._reset_state(reset_partial_state=True)
