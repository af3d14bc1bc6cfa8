"""The compiler's cache, and that every .cu file compiles for every architecture that can have it; NVRTC is the oracle.

tests/kernels/cuda needs no GPU. What runs on one stands in tests/gpu.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowbit.kernels.cuda import compiler
from lowbit.kernels.cuda.variants import VARIANTS, Variant

ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
SOURCE = 'extern "C" __global__ void fill(int* out, int n) { if (threadIdx.x < n) out[threadIdx.x] = VALUE; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fill.cu").write_text('#include "fill.cuh"\n' + SOURCE, encoding="utf-8")
    (tmp_path / "fill.cuh").write_text("#define TWO 2\n", encoding="utf-8")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    return tmp_path


def test_every_variant_compiles_for_every_architecture_that_can_have_it() -> None:
    def build(job: tuple[Variant, str]) -> str | None:
        variant, architecture = job
        try:
            cubin = compiler.compile_source(variant.file, architecture, dict(variant.defines))
        except RuntimeError as error:
            return f"{variant}: {error}"
        return None if variant.function.encode() in cubin else f"{variant}: no such function"

    jobs = [(v, architecture) for v in VARIANTS for architecture in ARCHITECTURES if v.refusal(architecture) is None]
    with ThreadPoolExecutor(2) as pool:
        failures = [failure for failure in pool.map(build, jobs) if failure]
    assert not failures, "\n".join(failures)


def test_every_source_file_has_a_variant_and_every_refusal_is_a_sentence() -> None:
    assert {variant.file for variant in VARIANTS} == {path.name for path in compiler.SOURCES.glob("*.cu")}
    for variant in VARIANTS:
        reasons = [variant.refusal(architecture) for architecture in ARCHITECTURES]
        assert any(reason is None for reason in reasons), variant
        assert all(reason is None or len(reason.split()) > 3 for reason in reasons)


def test_a_second_process_finds_the_cubin_and_an_edit_compiles_again(folder: Path) -> None:
    kept = folder / "cache"
    first = compiler.cached_cubin("fill.cu", "sm_80", {"VALUE": 1}, kept)
    assert first[:4] == b"\x7fELF"
    (path,) = kept.glob("*.cubin")
    path.write_bytes(b"from the disk")
    assert compiler.cached_cubin("fill.cu", "sm_80", {"VALUE": 1}, kept) == b"from the disk"
    assert compiler.cached_cubin("fill.cu", "sm_80", {"VALUE": 2}, kept)[:4] == b"\x7fELF"
    assert compiler.cached_cubin("fill.cu", "sm_90a", {"VALUE": 1}, kept)[:4] == b"\x7fELF"
    (folder / "fill.cuh").write_text("#define TWO 3\n", encoding="utf-8")
    assert compiler.cached_cubin("fill.cu", "sm_80", {"VALUE": 1}, kept)[:4] == b"\x7fELF"
    assert len(list(kept.glob("*.cubin"))) == 4
    assert not list(kept.glob("*.unfinished"))


def test_a_cache_that_cannot_be_written_is_told_and_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = folder / "file"
    blocked.write_text("", encoding="utf-8")
    assert compiler.cached_cubin("fill.cu", "sm_80", {"VALUE": 1}, blocked)[:4] == b"\x7fELF"
    assert "every process compiles again" in caplog.text


def test_an_error_in_the_source_shows_the_compilers_log(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fill.cu does not compile for sm_80:\n.*VALUE"):
        compiler.compile_source("fill.cu", "sm_80", {})
