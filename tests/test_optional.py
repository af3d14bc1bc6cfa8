"""Optional packages. Oracle: the extras that pyproject.toml declares."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from lowbit.errors import InputError
from lowbit.optional import require

ROOT = Path(__file__).parent.parent
REQUIRED = re.compile(r"require\(\s*\"([\w.]+)\",\s*\"(\w+)\"")
PACKAGES = {
    "lm_eval": "lm-eval",
    "cuda": "cuda-bindings",
    "humming": "humming-kernels",
}  # module -> the name by which pip knows it


def test_a_package_that_is_there_is_given() -> None:
    assert require("json", "gguf") is sys.modules["json"]
    assert require("json.decoder", "gguf") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_package_that_is_missing_is_said_with_the_command_that_installs_it(module: str) -> None:
    with pytest.raises(InputError, match=r'^this needs the package no_such_package: pip install "lowbit\[tasks\]"$'):
        require(module, "tasks")


def test_a_package_that_misses_something_itself_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        require("half_installed", "tasks")


def test_a_part_that_a_package_lacks_is_no_missing_package() -> None:
    """An older version of it, for one: to install it again would not help, but to upgrade it would."""
    with pytest.raises(InputError, match="this needs the package json"):
        require("json.no_such_part", "tasks")


def test_every_extra_that_the_source_names_installs_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used = {
        pair for path in (ROOT / "src").rglob("*.py") for pair in REQUIRED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(used) >= 4
    for module, extra in used:
        top = module.partition(".")[0]
        installed = [re.split(r"[<>=~\[; ]", requirement)[0] for requirement in extras[extra]]
        assert PACKAGES.get(top, top) in installed, f"{module} is not installed by lowbit[{extra}]"
