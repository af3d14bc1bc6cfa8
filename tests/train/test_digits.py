"""The example with the handwritten digits keeps its promise: training under the rounding saves what 2 bits lose."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_training_under_the_rounding_saves_what_rounding_to_2_bits_loses() -> None:
    module = example()
    digits = module.Digits.load()
    model = module.fit(module.network(), digits, lr=5e-3)
    whole = module.accuracy(model, digits)
    table = module.compare(digits, model, (4, 2))
    assert whole > 95
    assert all(accuracy > whole - 1.5 for accuracy in table[4])
    plain, clipped, learned = table[2]
    assert learned > whole - 1.5
    assert learned > max(plain, clipped) + 5
