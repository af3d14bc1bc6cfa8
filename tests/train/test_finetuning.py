"""`lowbit finetune` from end to end on a tiny model with a word tokenizer. Oracle: what `lowbit.load` reads back."""

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny
from command import lowbit_command
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lowbit
from lowbit.nn.linear import QuantLinear
from lowbit.train.distill import kl_loss
from lowbit.train.loop import LoopOptions

WORDS = [f"w{index}" for index in range(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [[WORDS[i] for i in torch.randint(0, 120, (40,), generator=generator)] for _ in range(12)]
    path.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows))
    return path


SHORT = ("--steps", 6, "--batch", 4, "--seq-len", 16, "--warmup", 1, "--device", "cpu", "--keep-every", 2)


def test_qlora_writes_an_adapter_that_loads_onto_the_quantized_base(model: Path, data: Path, tmp_path: Path) -> None:
    ended = lowbit_command("finetune", model, "--data", data, "-o", tmp_path / "out", "--lr", "1e-2", *SHORT)
    assert ended.code == 0, ended.err
    assert "nf4-b64-dq" in ended.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "finetuning.json"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert len(record["losses"]) == 6
    assert record["losses"][-1] < record["losses"][0]
    quantized = tmp_path / "base"
    assert lowbit_command("quantize", model, "-o", quantized, "--scheme", "nf4-b64-dq", "--no-eval").code == 0
    adapted = lowbit.load_lora(lowbit.load(quantized), tmp_path / "out")
    assert any(".lora_A" in name for name, _ in adapted.named_modules())


def test_qlora_merges_into_a_checkpoint(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("finetune", model, "--data", data, "-o", tmp_path / "out", "--merge", "--scheme", "w4a16-g32", *SHORT)
    ended = lowbit_command(*arguments)
    assert ended.code == 0, ended.err
    assert "merging cost KL" in ended.out
    loaded = lowbit.load(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 21


def test_qlora_merges_into_16_bits_that_need_no_lowbit(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("finetune", model, "--data", data, "-o", tmp_path / "out", "--merge-16bit", "--lr", "1e-2", *SHORT)
    ended = lowbit_command(*arguments)
    assert ended.code == 0, ended.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(model)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert merged.dtype == original.dtype == torch.bfloat16
    ids = torch.arange(3, 30)[None]
    assert 1e-3 < (merged(ids).logits - original(ids).logits).abs().max() < 5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [4, 5]


def test_qat_writes_a_checkpoint_and_learns_from_the_original(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("finetune", model, "--data", data, "-o", tmp_path / "out", "--method", "qat")
    ended = lowbit_command(*arguments, "--scheme", "w2a16-g32", "--lr", "1e-3", *SHORT, "--batch", 30)
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert record["losses"][-1] < record["losses"][0] < 1
    loaded = lowbit.load(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 21
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_qat_starts_from_a_rotated_model_and_is_loaded_as_it_was_trained(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options = lowbit.Finetuning("qat", "w4a4-g32-dynamic-asym", 1e-3, 16, loop=LoopOptions(6, 4, 1), start="rotate")
    trained = lowbit.finetune(model, data, tmp_path / "out", options, "cpu")
    assert trained.losses[-1] < 1
    loaded = lowbit.load(tmp_path / "out")
    assert any(module.rotation is not None for module in loaded.modules() if isinstance(module, QuantLinear))
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        kl = kl_loss(loaded(ids).logits.float(), teacher(ids).logits)
    assert kl < 1.5 * trained.losses[0] + 0.05


def test_an_interrupted_run_goes_on_where_it_stopped(model: Path, data: Path, tmp_path: Path) -> None:
    options = lowbit.Finetuning("qat", "w4a16-g32", seq_len=16, loop=LoopOptions(6, 4, 1, keep_every=2))
    whole = lowbit.finetune(model, data, tmp_path / "whole", options, "cpu")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.finetune(model, data, tmp_path / "parts", options, "cpu", progress=stop)
    assert not (tmp_path / "parts").exists()
    seen = []
    again = lowbit.finetune(
        model, data, tmp_path / "parts", options, "cpu", progress=lambda stage, done, total: seen.append(done)
    )
    assert again.losses == whole.losses
    assert seen == [5, 6]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lora"), "unknown method 'lora'; choose one of qlora, qat"),
        (("--merge", "--merge-16bit"), "choose --merge or --merge-16bit"),
        (("--method", "qat", "--merge"), "only qlora has adapters to merge"),
        (("--method", "qat", "--seq-len", 16, "--scheme", "nf4-b64"), "training learns integer grids"),
        (("--seq-len", 4000), "give more text or a smaller --seq-len"),
        (("--batch", 4000, "--seq-len", 16), "a batch of 4000 windows was asked for"),
        (("--target", "w1", "--seq-len", 16), "ends in w1"),
        (("--start", "gptq"), "only qat starts from another method's result"),
        (("--method", "qat", "--start", "gptx"), "qat can't start from 'gptx'; choose one of rtn, rtn-clip"),
    ],
    ids=["method", "two merges", "merge", "scheme", "short", "batch", "target", "start", "unknown start"],
)
def test_what_cannot_be_trained_is_told_in_a_sentence(
    model: Path, data: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    ended = lowbit_command("finetune", model, "--data", data, "-o", tmp_path / "out", "--device", "cpu", *arguments)
    assert ended.code == 2
    assert message in " ".join(ended.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_leaves_its_last_good_checkpoint(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("finetune", model, "--data", data, "-o", tmp_path / "out", "--lr", "1e30")
    ended = lowbit_command(*arguments, *SHORT)
    assert ended.code == 2
    assert "training diverged" in " ".join(ended.err.split())
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in ended.err


def test_text_that_is_no_training_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{no json\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for name, message in (("bad.jsonl", "line 1 of"), ("bad.txt", "not UTF-8"), ("none.txt", "there is no file")):
        ended = lowbit_command("finetune", model, "--data", tmp_path / name, "-o", tmp_path / "out")
        assert ended.code == 2
        assert message in " ".join(ended.err.split())
