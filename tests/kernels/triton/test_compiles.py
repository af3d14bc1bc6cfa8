"""Every Triton kernel compiles for real GPUs: the interpreter takes what the compiler refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "src/lowbit/kernels/triton"


@pytest.mark.parametrize("architecture", [89, 90])  # 89 is the first with fp8
def test_every_kernel_compiles(architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(architecture)]
    ended = subprocess.run(script, env=environment | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert {name: errors for name, errors in found.items() if errors} == {}
    launched = {f"{path.stem}.{name}" for path in KERNELS.glob("*.py") for name in _launched(path.read_text())}
    assert set(found) == launched


def _launched(source: str) -> set[str]:
    """Names of a module's kernels: the compiled functions that no other function calls, as helpers are."""
    names = {part.split("(")[0].strip() for part in source.split("@triton.jit\ndef ")[1:]}
    return {name for name in names if len(re.findall(rf"\b{name}\(", source)) == 1}
