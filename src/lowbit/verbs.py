"""What lowbit does, one function per verb: quantize, compare, evaluate. (load stands in io/load.py.)

Here, and only here, files, the pipeline and the judge meet: open the source, plan, measure the original, quantize,
measure again, and write the folder with its report in one go.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowbit import judge, memory
from lowbit.budget import Budget, Ground, Search
from lowbit.effort import run
from lowbit.errors import InputError
from lowbit.io.checkpoint import write_checkpoint
from lowbit.io.folder import atomic_folder, check_destination, empty
from lowbit.io.load import load_source
from lowbit.io.names import disk_layout
from lowbit.io.source import Source, load_float, load_tokenizer, model_config, open_source
from lowbit.model.log import LayerLog
from lowbit.model.quantize import Job, Progress, check_tokens, needs_data
from lowbit.model.recipe import Recipe
from lowbit.model.select import Selection, coverage, select
from lowbit.observe.capture import find_blocks
from lowbit.observe.tokens import Tokens, check_known, load_tokens, overlap, packaged_text, text_windows
from lowbit.options import Calibration, Evaluation, Gates, Scores
from lowbit.plots import render_comparison, render_report
from lowbit.report import CalibrationRecord, Coverage, Report, TextSample
from lowbit.tensors import check_finite

MOST_SHARED = 0.01  # of the held-out text may occur in the calibration text: a licence, a table's head
PROMPT = "The most important thing to know about the human heart is that"


def _silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True)
class Conditions:
    """What all recipes of one run share: the data, how results are judged, where the work runs, who watches."""

    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    gates: Gates = Gates()
    device: str = "auto"
    overwrite: bool = False
    progress: Progress = _silent


@dataclass(frozen=True)
class _Original:
    """The model as it was: its files, its tokenizer and tokens, and, where results are judged, its own answers."""

    source: Source
    tokenizer: Any
    tokens: Tokens | None
    reference: judge.Reference | None
    text: str
    device: torch.device


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    conditions: Conditions = Conditions(),
    bits: float | None = None,
    candidates: Sequence[int] = Budget().candidates,
) -> Report:
    """Quantize `model`, write the checkpoint folder `out`, and report what it cost.

    model: a hub id, a folder or a .gguf file. bits: instead of one scheme everywhere, the best spread of the candidate
    widths within so many stored bits a weight (budget.py). Where the result misses the gate on KL, bits are raised
    likewise until it holds. The folder holds the checkpoint, report.json and report.html, and appears whole or not at
    all; a result that misses a gate is written too, and its report says so (`report.passed`). Raises InputError, or one
    of its kinds, for what cannot work.
    """
    out, gates = Path(out), conditions.gates
    search = Search(Budget(bits, tuple(candidates)), recipe, gates.max_kld, gates.min_coverage)
    with open_source(model) as source:
        check_destination(out, conditions.overwrite, source.bytes, source.folder)
        float_model: PreTrainedModel | None = _load(source, conditions)
        assert float_model is not None
        original = _measured(source, float_model, [recipe], conditions, search.begins)
        if search.begins:
            recipe = search.first(_ground(float_model, recipe, original, conditions))
        with atomic_folder(out, conditions.overwrite) as folder:
            report = _quantized(float_model, recipe, original, conditions, folder)
            while search.wants_more(report):
                float_model = None  # its layers are quantized; the next run begins with the files again
                float_model = _load(source, conditions)
                empty(folder)
                recipe = search.next(report, partial(_ground, float_model, recipe, original, conditions))
                report = _quantized(float_model, recipe, original, conditions, folder)
            report = search.finished(report)
            _save(report, folder)
    return report


def compare(
    model: str | Path, recipes: Sequence[Recipe], out: str | Path, conditions: Conditions = Conditions()
) -> list[Report]:
    """Quantize `model` by each recipe, on the same tokens, into out/METHOD-SCHEME, and write one page about all.

    `out` holds report.html and report.json, a list, and appears whole or not at all. Raises as `quantize` does.
    """
    out, reports = Path(out), []
    if not recipes or len({str(recipe) for recipe in recipes}) < len(recipes):
        raise InputError("give one or more different recipes, such as rtn:w8a8,gptq:w4a16-g64")
    with open_source(model) as source:
        check_destination(out, conditions.overwrite, source.bytes * len(recipes), source.folder)
        float_model: PreTrainedModel | None = _load(source, conditions)
        assert float_model is not None
        original = _measured(source, float_model, recipes, conditions)
        with atomic_folder(out, conditions.overwrite) as folder:
            for recipe in recipes:
                place = folder / str(recipe).replace(":", "-")
                place.mkdir()
                labelled = replace(conditions, progress=partial(_labelled, conditions.progress, str(recipe)))
                float_model = float_model or _load(source, conditions)
                reports.append(_quantized(float_model, recipe, original, labelled, place))
                float_model = None  # its layers are quantized by now; the next recipe begins with the files again
            title = f"{source.name} in {len(recipes)} recipes"
            (folder / "report.html").write_text(render_comparison(title, reports), encoding="utf-8")
            entries = ",\n".join(report.to_json() for report in reports)
            (folder / "report.json").write_text(f"[{entries}]\n", encoding="utf-8")
    return reports


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    evaluation: Evaluation = Evaluation(),
    tasks: judge.Tasks | None = None,
    device: str = "auto",
    progress: Progress = _silent,
) -> Scores:
    """The perplexity of `model`, its distance from `reference` where one is given, and its scores in lm-eval's tasks.

    Both models may be quantized or not. Raises InputError for models, texts or tasks that don't fit.
    """
    target, original = _device(device), None
    if reference is not None:
        with open_source(reference) as source:
            progress("measuring the original", 0, 1)
            tokens = _evaluation_tokens(evaluation, load_tokenizer(source))
            original = judge.Reference.of(_to(load_source(source, _working_dtype(source, target)), target), tokens)
    with open_source(model) as source:
        tokenizer = load_tokenizer(source)
        tokens = _evaluation_tokens(evaluation, tokenizer)
        if original is not None and tokens.hash != original.tokens.hash:
            raise InputError(
                f"{model} and {reference} have different tokenizers, so they can't be compared token by token"
            )
        loaded = _to(load_source(source, _working_dtype(source, target)), target)
        watch = partial(_count, progress, "measuring", len(tokens.ids))
        close = judge.fidelity(loaded, original, watch) if original is not None else None
        value = close.perplexity if close else judge.perplexity(loaded, tokens, watch)
        scores = judge.task_scores(loaded, tokenizer, tasks) if tasks else {}
    return Scores(str(model), value, close, scores)


def _count(progress: Progress, stage: str, total: int, done: int) -> None:
    progress(stage, done, total)


def _labelled(progress: Progress, label: str, stage: str, done: int, total: int) -> None:
    progress(f"{label}: {stage}", done, total)


def _device(name: str) -> torch.device:
    """cpu, cuda or cuda:1; auto is cuda where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}); use cpu, cuda or auto"
        ) from None
    return torch.device(name)


def _working_dtype(source: Source, device: torch.device) -> torch.dtype:
    """float32 on a CPU, whose 16-bit products are slow and coarse; the checkpoint's dtype elsewhere."""
    return torch.float32 if device.type == "cpu" else _stored_dtype(source)


def _stored_dtype(source: Source) -> torch.dtype:
    return model_config(source).dtype or torch.float32


def _to(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return model.to(device)  # type: ignore[arg-type]


def _load(source: Source, conditions: Conditions) -> PreTrainedModel:
    """The float model on the CPU, every weight finite; peak memory is counted from here on."""
    device = _device(conditions.device)
    memory.reset_peak(device)
    model = load_float(source, _working_dtype(source, device))
    for name, parameter in model.named_parameters():
        check_finite(parameter, name)
    return model


def _evaluation_tokens(evaluation: Evaluation, tokenizer: Any) -> Tokens:
    if evaluation.text is not None:
        return load_tokens(evaluation.text, tokenizer, evaluation.windows, evaluation.seq_len, seed=0)
    text, source = packaged_text("evaluation"), "lowbit's packaged evaluation text"
    return text_windows(text, tokenizer, evaluation.windows, evaluation.seq_len, 0, source)


def _measured(
    source: Source,
    model: PreTrainedModel,
    recipes: Sequence[Recipe],
    conditions: Conditions,
    needs_tokens: bool = False,
) -> _Original:
    """Everything that is needed of the original, taken before its weights are replaced."""
    calibration, evaluation = conditions.calibration, conditions.evaluation
    conditions.gates.check_possible(evaluation)
    device, tokenizer, tokens = _device(conditions.device), load_tokenizer(source), None
    selections = [_selection(model, recipe) for recipe in recipes]
    if needs_tokens or any(needs_data(*pair) for pair in zip(recipes, selections, strict=True)):
        tokens = _calibration_tokens(calibration, tokenizer)
        check_known(tokens.ids, model)
        for recipe, selection in zip(recipes, selections, strict=True):
            check_tokens(model, recipe, selection, tokens.ids.numel())
    if evaluation is None:
        return _Original(source, tokenizer, tokens, None, "", device)
    held_out = _evaluation_tokens(evaluation, tokenizer)
    _check_apart(tokens, held_out)
    conditions.progress("measuring the original", 0, 1)
    _to(model, device)
    reference = judge.Reference.of(model, held_out)
    text = judge.continuation(model, tokenizer, PROMPT, evaluation.sample_tokens) if evaluation.sample_tokens else ""
    conditions.progress("measuring the original", 1, 1)
    _to(model, torch.device("cpu"))
    return _Original(source, tokenizer, tokens, reference, text, device)


def _calibration_tokens(calibration: Calibration, tokenizer: Any) -> Tokens:
    return load_tokens(calibration.source, tokenizer, calibration.samples, calibration.seq_len, calibration.seed)


def _check_apart(tokens: Tokens | None, held_out: Tokens) -> None:
    """Raise InputError where one text is to serve for calibration and for judging."""
    if tokens is not None and (tokens.source == held_out.source or overlap(tokens, held_out) > MOST_SHARED):
        raise InputError(
            f"{held_out.source} can't be both calibration and evaluation text: the result would flatter itself; "
            "give another text for one of them"
        )


def _ground(model: PreTrainedModel, recipe: Recipe, original: _Original, conditions: Conditions) -> Ground:
    """What sensitivities are measured on; the model is on its device from here on."""
    tokens = original.tokens
    if tokens is None:
        tokens = _calibration_tokens(conditions.calibration, original.tokenizer)
        if original.reference is not None:
            _check_apart(tokens, original.reference.tokens)
    selection, dtype = _selection(model, recipe), _stored_dtype(original.source)
    return Ground(_to(model, original.device), selection, tokens.ids, dtype, conditions.progress)


def _selection(model: PreTrainedModel, recipe: Recipe) -> Selection:
    splittable = {piece.parameter for piece in disk_layout(model).values() if piece.expert is not None}
    return select(model, find_blocks(model)[0], recipe.scheme, recipe.rules, splittable)


def _quantized(
    model: PreTrainedModel, recipe: Recipe, original: _Original, conditions: Conditions, folder: Path
) -> Report:
    """Quantize `model` in place, judge it, and fill `folder` with checkpoint and report."""
    started, source, dtype = time.perf_counter(), original.source, _stored_dtype(original.source)
    layout, selection = disk_layout(_to(model, torch.device("cpu"))), _selection(model, recipe)
    covered = coverage(model, selection)
    ids = original.tokens.ids if original.tokens is not None else None
    outcome = run(model, Job(recipe, selection, [], dtype, original.device, conditions.progress), ids)
    recipe, log = outcome.recipe, outcome.log
    seconds, peak = time.perf_counter() - started, memory.peak_bytes(original.device)
    conditions.progress("writing", 0, 1)
    added = (
        [name for name, part in model.named_modules() if part is model.get_output_embeddings()] if log.untied else []
    )
    added = [f"{name}.weight" for name in added]
    write_checkpoint(source, folder, model, layout, dtype, log.rewritten, added)
    conditions.progress("writing", 1, 1)
    report = _report(recipe, original, conditions, covered, log)
    report = replace(report, bytes_after=replace(source, folder=folder).bytes, seconds=seconds, peak_memory_bytes=peak)
    report = _judged(report, model, original, conditions)
    _save(report, folder)
    return report


def _save(report: Report, folder: Path) -> None:
    report.save(folder / "report.json")
    (folder / "report.html").write_text(render_report(report), encoding="utf-8")


def _judged(report: Report, model: PreTrainedModel, original: _Original, conditions: Conditions) -> Report:
    """The report with fidelity, gates and a text sample."""
    reference, evaluation, fidelity = original.reference, conditions.evaluation, None
    if reference is not None and evaluation is not None:
        _to(model, original.device)
        watch = partial(_count, conditions.progress, "measuring", len(reference.hidden))
        fidelity = judge.fidelity(model, reference, watch)
        if evaluation.sample_tokens:
            after = judge.continuation(model, original.tokenizer, PROMPT, evaluation.sample_tokens)
            report = replace(report, sample=TextSample(PROMPT, original.text, after))
    return report.with_fidelity(fidelity, conditions.gates.check(report.coverage, fidelity))


def _report(recipe: Recipe, original: _Original, conditions: Conditions, covered: Coverage, log: LayerLog) -> Report:
    tokens, seed = original.tokens, conditions.calibration.seed
    record = None
    if tokens is not None and log.observed:
        record = CalibrationRecord(tokens.source, tokens.hash, tokens.ids.shape[0], tokens.ids.shape[1])
    return Report(
        model=original.source.name,
        scheme=str(recipe.scheme),
        method=recipe.method,
        seed=seed,
        versions={name: version(name) for name in ("lowbit", "torch", "transformers")}
        | {"python": platform.python_version()},
        calibration=record,
        coverage=covered,
        bytes_before=original.source.bytes,
        bytes_after=0,
        seconds=0.0,
        peak_memory_bytes=0,
        layers=tuple(log.records),
        warnings=tuple(log.warnings),
        notes=(*log.notes, *_seed_note(recipe, record, seed)),
        histograms=log.histograms,
    )


def _seed_note(recipe: Recipe, calibration: CalibrationRecord | None, seed: int) -> tuple[str, ...]:
    """At 3 bits and below the choice of windows moves the result by more than methods differ: say that it is one."""
    weights = recipe.scheme.weights
    if calibration is None or weights.format.kind != "int" or weights.bits > 3:
        return ()
    others = " and ".join(f"--seed {other}" for other in (seed + 1, seed + 2))
    return (f"this is seed {seed} alone: at 3 bits and below, compare methods over three seeds ({others} too)",)
