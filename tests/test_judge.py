"""The judge against full logits: the model's own forward over whole windows, and float64 arithmetic on all of them.

lm-eval runs offline on a task that is made here.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from saved import character_tokenizer, save_tiny
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import lowbit
from lowbit import Evaluation, InputError, Tasks, judge
from lowbit.judge import Head, Reference, decoder_name, fidelity, hidden_states, perplexity, task_scores
from lowbit.observe.tokens import Tokens

# gemma2 caps its logits by tanh, granite divides and cohere2 multiplies them, opt projects hidden states to the head,
# gemma3n_text merges four streams, the others have biases, tied heads or plain ones
ARCHITECTURES = ["llama", "gemma2", "granite", "cohere2", "opt", "gpt2", "bloom", "mixtral", "gemma3n_text", "mpt"]


def some_tokens(windows: int = 3, length: int = 300) -> Tokens:
    """By default windows longer than the judge's 256 rows, so that a window is cut."""
    ids = torch.randint(3, 128, (windows, length), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, "ids of a generator")


def disturbed(model_type: str, size: float = 0.02) -> PreTrainedModel:
    """The tiny model with noise on every weight."""
    model = tiny(model_type)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """log softmax of the model's own logits at all positions but the last, float64 [windows, T - 1, V]."""
    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].double(), -1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fidelity_is_that_of_full_logits(model_type: str) -> None:
    # windows of 250 tokens, 100 rows at a time: gpt2, opt and mpt know 256 positions
    tokens, original, other = some_tokens(length=250), tiny(model_type), disturbed(model_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "_ROWS", 100)
        found = fidelity(other, Reference.of(original, tokens))
        alone = perplexity(other, tokens)
    p, q = log_probabilities(original, tokens.ids), log_probabilities(other, tokens.ids)
    kld = (p.exp() * (p - q)).sum(-1)  # [windows, T - 1]
    surprise = [-x.gather(-1, tokens.ids[:, 1:, None]).mean().item() for x in (p, q)]
    assert kld.mean().item() > 1e-4
    assert found.kld == pytest.approx(kld.mean().item(), rel=1e-3, abs=1e-7)  # float32 softmax of float32 logits
    assert found.kld_stderr == pytest.approx(kld.mean(-1).std().item() / math.sqrt(3), rel=1e-2, abs=1e-7)
    assert found.perplexity_reference == pytest.approx(math.exp(surprise[0]), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(surprise[1]), rel=1e-5)
    assert alone == pytest.approx(found.perplexity, rel=1e-12)  # the same logits, summed in another order
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(agreement, abs=2 / (3 * 249))  # two ties may fall otherwise
    assert agreement < 1 or model_type == "bloom"  # its tied head makes a tiny one repeat the token it sees
    assert (found.tokens, found.text, found.text_hash) == (3 * 249, tokens.source, tokens.hash)


def test_windows_longer_than_the_rows_at_a_time_are_judged_whole() -> None:
    tokens, original, other = some_tokens(2, 600), tiny("llama"), disturbed("llama")
    found = fidelity(other, Reference.of(original, tokens))
    p, q = log_probabilities(original, tokens.ids), log_probabilities(other, tokens.ids)
    assert found.tokens == 2 * 599
    assert found.kld == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_a_model_is_at_no_distance_from_itself() -> None:
    found = fidelity(tiny("gemma2"), Reference.of(tiny("gemma2"), some_tokens()))
    assert (found.kld, found.kld_stderr, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.perplexity_reference


def test_one_window_has_no_standard_error() -> None:
    found = fidelity(disturbed("llama"), Reference.of(tiny("llama"), some_tokens(1)))
    assert found.kld > 0
    assert found.kld_stderr == 0


def test_every_window_is_counted() -> None:
    seen: list[int] = []
    fidelity(tiny("llama"), Reference.of(tiny("llama"), some_tokens()), seen.append)
    perplexity(tiny("llama"), some_tokens(), seen.append)
    assert seen == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_head_gives_the_models_own_logits_and_leaves_the_model_as_it_was(model_type: str) -> None:
    model, ids = tiny(model_type), some_tokens(1, 40).ids
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        head = Head(model)
        again = head(next(hidden_states(model, ids)))
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again, before[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.get_submodule(decoder_name(model)) is modules[decoder_name(model)]


def test_the_head_outlives_the_models_blocks() -> None:
    """What the reference keeps must not change when the model's layers are replaced by quantized ones."""
    model, tokens = tiny("llama"), some_tokens(1, 40)
    reference = Reference.of(model, tokens)
    expected = reference.head(reference.hidden[0])
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    assert torch.equal(reference.head(reference.hidden[0]), expected)


class LookingBack(LlamaForCausalLM):
    """Its logits depend on the tokens themselves, which hidden states don't tell."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        output = super().forward(input_ids=input_ids, **others)
        output.logits = output.logits + torch.nn.functional.one_hot(input_ids, output.logits.shape[-1])
        return output


def test_a_model_that_makes_its_logits_of_more_than_hidden_states_is_refused() -> None:
    model = tiny("llama")
    model.__class__ = LookingBack
    with pytest.raises(InputError, match="LookingBack makes its logits of more than hidden states: use --no-eval"):
        Reference.of(model, some_tokens(1, 40))


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = tiny("llama")
    reference = Reference.of(tiny("llama"), some_tokens(1, 40))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    for judged in (lambda: fidelity(model, reference), lambda: perplexity(model, reference.tokens)):
        with pytest.raises(InputError, match="are NaN, infinite or much too large on the held-out text"):
            judged()


def test_the_continuation_is_greedy() -> None:
    model, tokenizer = tiny("llama"), character_tokenizer()
    ids = tokenizer("The river", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
    expected = tokenizer.decode(ids[0, 9:], skip_special_tokens=True)
    assert judge.continuation(model, tokenizer, "The river", 6) == expected


CHOICES = [("The cat sat on the ", [" mat", " moon"], 0), ("One, two, ", [" four", " three"], 1),
           ("Grass is ", [" green", " loud"], 0), ("Snow is ", [" square", " white"], 1)]  # fmt: skip


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An lm-eval task of four questions with two answers each, read from a jsonl file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in CHOICES]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    settings = {
        "task": "lowbit_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "lowbit_choices.yaml").write_text(json.dumps(settings))
    return folder


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_run_offline_and_count_right_answers(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model, tokenizer = tiny("llama"), character_tokenizer()
    right = []
    for question, choices, answer in CHOICES[:3]:
        scores = []
        for choice in choices:
            ids = torch.tensor([tokenizer(question + choice, add_special_tokens=False)["input_ids"]])
            each = log_probabilities(model, ids)[0].gather(-1, ids[0, 1:, None])
            scores.append(each[-len(choice) :].sum().item())
        right.append(scores.index(max(scores)) == answer)
    found = task_scores(model, tokenizer, Tasks(("lowbit_choices",), 3, task_folder))
    assert found["lowbit_choices"]["acc"] == sum(right) / 3


@pytest.mark.filterwarnings("ignore")
def test_evaluate_adds_the_tasks_to_its_scores(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    save_tiny("llama", tmp_path / "model")
    short = Evaluation(windows=1, seq_len=64)
    scores = lowbit.evaluate(tmp_path / "model", None, short, Tasks(("lowbit_choices",), None, task_folder))
    assert set(scores.tasks) == {"lowbit_choices"}
    assert scores.tasks["lowbit_choices"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert json.loads(scores.to_json())["tasks"] == scores.tasks
