"""The public names. Oracle: this list; a name that is added, renamed or taken away changes it in the same commit."""

import inspect
import subprocess
import sys

import lowbit

NAMES = {
    "functions": [
        *("add_lora", "compare", "convert", "evaluate", "finetune", "load", "load_lora", "merge_lora", "quantize"),
        "recipe_at",
    ],
    "what they take": [
        *("Calibration", "Conditions", "Evaluation", "Finetuning", "Gates", "LowbitConfig", "QuantScheme"),
        *("Recipe", "Rule", "Tasks"),
    ],
    "what they give": ["Finetuned", "QuantLinear", "QuantizedCache", "Report", "Scores"],
    "rooms": ["optim", "qat"],
    "errors": [
        "CheckpointError",
        "GateError",
        "InputError",
        "LowbitError",
        "MethodError",
        "SchemeError",
        "TrainingError",
    ],
}


def test_the_public_names_are_these_and_no_others() -> None:
    assert lowbit.__all__ == sorted(name for names in NAMES.values() for name in names)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in lowbit.__all__:
        thing = getattr(lowbit, name)
        home = thing.__name__ if inspect.ismodule(thing) else thing.__module__
        assert home.startswith("lowbit."), name
        assert inspect.getdoc(thing), name


def test_functions_tell_the_types_of_what_they_take_and_give() -> None:
    for name in NAMES["functions"]:
        signature = inspect.signature(getattr(lowbit, name))
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, f"{name}({parameter.name})"


def test_every_error_is_a_value_error_and_bad_input_is_told_from_a_failed_limit() -> None:
    for name in NAMES["errors"]:
        assert issubclass(getattr(lowbit, name), lowbit.LowbitError)
    assert issubclass(lowbit.LowbitError, ValueError)
    assert issubclass(lowbit.SchemeError, lowbit.InputError)
    assert issubclass(lowbit.CheckpointError, lowbit.InputError)
    assert not issubclass(lowbit.GateError, lowbit.InputError)


def test_importing_it_needs_no_extra_and_says_nothing() -> None:
    """In a process of its own: no optional package is imported, nothing is printed, and torch's dtype stays."""
    optional = ["gguf", "datasets", "lm_eval", "compressed_tensors", "bitsandbytes", "triton", "cuda", "matplotlib"]
    code = (
        "import sys, torch\n"
        f"for name in {optional}: sys.modules[name] = None\n"  # importing one of them raises now
        "import lowbit, lowbit.cli.main\n"
        "assert torch.get_default_dtype() == torch.float32\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
