"""docs/formats.md is made here: each cell of the matrix names the test that checked it, and the test must exist.

`python tests/interop/test_matrix.py` rewrites the page; the test fails where the page is not what it would write.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "formats.md"
TESTS = {
    **{"foreign": "tests/interop/test_foreign_readers.py", "packed": "tests/interop/test_gptq_awq.py"},
    **{"bnb": "tests/interop/test_bitsandbytes.py", "micro": "tests/interop/test_microscale.py"},
    **{"convert": "tests/io/formats/test_convert.py", "gguf": "tests/io/formats/test_gguf.py"},
    **{"hf": "tests/io/formats/test_hf.py", "stock": "tests/interop/test_stock_transformers.py"},
    **{"int8": "tests/interop/test_llm_int8.py", "llama": "bench/results/llama_cpp.json"},
    **{"gptqmodel": "bench/results/gptqmodel.json", "llmcompressor": "bench/results/llmcompressor.json"},
}


@dataclass(frozen=True)
class Row:
    """A format; each cell is (oracle, where: KEY or KEY::test) or a sentence why not."""

    name: str
    read: tuple[str, str] | str
    write: tuple[str, str] | str
    converted_from: tuple[str, str] | str
    loaded_by: tuple[str, str] | str


_INTEGERS = "integers of compressed-tensors, GPTQ, AWQ"
_GO = "convert::test_integers_go_from_format_to_format_and_back_bit_for_bit"
_PRESETS = "foreign::test_compressed_by_them_read_by_us_decompressed_by_them"
ROWS = (
    Row(
        "compressed-tensors int, packed (2 to 8 bits)",
        ("compressed-tensors 0.20, bits; layouts before and since 0.17", _PRESETS),
        ("stock transformers, logits to the last bit", "stock::test_the_whole_demo_model_is_equal_to_the_last_bit"),
        ("GPTQ, AWQ: second decoder, back to the owner's bytes", _GO),
        ("transformers", "convert::test_stock_transformers_loads_what_became_compressed_tensors"),
    ),
    Row(
        "compressed-tensors int8 x int8 (static, dynamic)",
        ("compressed-tensors 0.20, bits", _PRESETS),
        ("stock transformers", "stock::test_two_blocks_of_the_demo_model_are_equal_to_the_last_bit"),
        "no other format here holds activations' grids",
        ("transformers", "stock::test_two_blocks_of_the_demo_model_are_equal_to_the_last_bit"),
    ),
    Row(
        "compressed-tensors fp8 (tensor, channel, tile)",
        ("compressed-tensors 0.20, bits", _PRESETS),
        ("stock transformers (channel)", "stock::test_two_blocks_of_the_demo_model_are_equal_to_the_last_bit"),
        ("DeepSeek fp8", "convert::test_deepseek_blocks_become_compressed_tensors"),
        ("transformers (channel)", "stock::test_two_blocks_of_the_demo_model_are_equal_to_the_last_bit"),
    ),
    Row(
        "compressed-tensors nvfp4, mxfp4",
        ("compressed-tensors 0.20, bits", _PRESETS),
        ("its compressor's bytes", "micro::test_nvfp4_weights_are_theirs_bit_for_bit"),
        "no other format here holds these codes",
        ("its decompressor", "micro::test_mxfp4_weights_are_theirs_bit_for_bit"),
    ),
    Row(
        "GPTQ v1, v2 (2, 3, 4, 8 bits, act-order)",
        ("gptqmodel 7.7: weights, logits of four architectures", "packed::test_their_layers_are_read_to_the_last_bit"),
        ("gptqmodel's bytes", "packed::test_what_we_write_is_what_they_wrote"),
        (f"{_INTEGERS}", _GO),
        ("gptqmodel 7.6: its layers' weights, logits of four architectures", "gptqmodel"),
    ),
    Row(
        "AWQ GEMM",
        ("autoawq 0.2.9: weights, logits of four architectures", "packed::test_their_models_give_their_logits"),
        ("autoawq's bytes", "packed::test_what_we_write_is_what_they_wrote"),
        (f"{_INTEGERS} (4 bits)", _GO),
        ("autoawq: the same bytes as its own", "packed::test_what_we_write_is_what_they_wrote"),
    ),
    Row(
        "AWQ GEMV",
        ("autoawq 0.2.9: weights", "packed::test_their_layers_are_read_to_the_last_bit"),
        "written as GEMM",
        "written as GEMM",
        "written as GEMM",
    ),
    Row(
        "bitsandbytes nf4, fp4 (double quantized or not)",
        (
            "bitsandbytes 0.50, every storage dtype",
            "foreign::test_4_bit_models_that_bitsandbytes_wrote_give_its_logits",
        ),
        ("its quant_state's bytes", "bnb::test_entries_are_those_of_their_quant_state"),
        "no other format here holds these codes",
        ("transformers", "bnb::test_stock_transformers_loads_a_folder_with_our_weights"),
    ),
    Row(
        "bitsandbytes LLM.int8()",
        ("bitsandbytes 0.50, layer by layer", "foreign::test_llm_int8_models_that_bitsandbytes_wrote_give_its_logits"),
        ("bitsandbytes' bytes", "int8::test_what_we_write_is_what_bitsandbytes_wrote"),
        "no other format here has outlier columns",
        ("transformers, layer by layer", "int8::test_stock_transformers_runs_what_we_rounded_to_llm_int8"),
    ),
    Row(
        "DeepSeek fp8 blocks, fp8 per tensor",
        ("compressed-tensors' decoder", "foreign::test_deepseek_blocks_are_the_product_with_their_scales"),
        ("back from compressed-tensors, bits", "convert::test_deepseek_blocks_become_compressed_tensors"),
        ("compressed-tensors tiles", "convert::test_deepseek_blocks_become_compressed_tensors"),
        ("transformers, dequantized", "convert::test_transformers_dequantizes_the_fp8_that_we_wrote"),
    ),
    Row(
        "gpt-oss mxfp4",
        ("transformers 5.23", "foreign::test_mxfp4_experts_decode_as_transformers_decodes_them"),
        "becomes float",
        "no other format here holds experts in 3-D",
        "not written",
    ),
    Row(
        "GGUF Q4_0, Q4_1, Q8_0",
        ("gguf-py 0.19, bits", "gguf::test_blocks_decode_as_gguf_py_decodes_them"),
        ("gguf-py's and ggml's bytes", "gguf::test_floats_become_gguf_py_s_bytes"),
        ("integers whose scales are float16 numbers", "gguf::test_symmetric_codes_are_carried_over_exactly"),
        ("llama.cpp (llama-cpp-python 0.3.36), greedy text", "llama"),
    ),
    Row(
        "GGUF Q4_K, Q6_K",
        ("gguf-py 0.19, bits (Q4_K dequantized)", "gguf::test_blocks_decode_as_gguf_py_decodes_them"),
        ("ggml's error within 0.5 %", "llama"),
        "rounded from float",
        ("llama.cpp (llama-cpp-python 0.3.36)", "llama"),
    ),
    Row(
        "GGUF Q5_0, Q5_1, Q2_K, Q3_K, Q5_K",
        ("gguf-py 0.19, bits (Q2_K, Q5_K dequantized)", "gguf::test_blocks_decode_as_gguf_py_decodes_them"),
        "not written",
        "not written",
        "not written",
    ),
    Row(
        "lowbit's own method id in transformers",
        ("transformers 5.23, every scheme", "hf::test_loading_quantizes_and_saving_keeps_every_bit"),
        ("save_pretrained, bits", "hf::test_loading_quantizes_and_saving_keeps_every_bit"),
        ("what lowbit.load has read", "hf::test_a_foreign_checkpoint_that_we_loaded_saves_and_reloads_in_transformers"),
        ("transformers after import lowbit", "hf::test_loading_quantizes_and_saving_keeps_every_bit"),
    ),
)

HEAD = """# Formats: what is read, written, converted, and who checked it

Made by tests/interop/test_matrix.py; edit that. Each cell names its oracle, and the test that holds both against each
other. A dash says why a cell is empty.

"""
TAIL = (Path(__file__).parent / "formats_tail.md").read_text()


def page() -> str:
    lines = ["| format | read | written | converted from | loaded by |", "|---|---|---|---|---|"]
    for row in ROWS:
        cells = [_cell(cell) for cell in (row.read, row.write, row.converted_from, row.loaded_by)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    places = [f"- {key}: {path}" for key, path in TESTS.items()]
    return HEAD + "\n".join(lines) + "\n\nThe tests:\n\n" + "\n".join(places) + "\n" + TAIL


def _cell(cell: tuple[str, str] | str) -> str:
    if isinstance(cell, str):
        return f"- ({cell})"
    oracle, where = cell
    key, _, test = where.partition("::")
    return f"{oracle} [{key}{': ' + test.removeprefix('test_').replace('_', ' ') if test else ''}]"


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_cell_names_a_test_that_exists() -> None:
    for row in ROWS:
        for cell in (row.read, row.write, row.converted_from, row.loaded_by):
            if isinstance(cell, tuple):
                key, _, test = cell[1].partition("::")
                path = ROOT / TESTS[key]
                assert path.is_file(), path
                assert not test or test in functions(path), f"{path} has no {test}"


def test_the_page_is_what_this_file_makes() -> None:
    assert PAGE.read_text() == page(), "run python tests/interop/test_matrix.py"


def test_formats_of_the_command_are_all_on_the_page() -> None:
    source = (ROOT / "src/lowbit/io/targets.py").read_text()
    for name in re.findall(r'^    "([a-z0-9-]+)": ', source, re.MULTILINE):
        assert name in page()


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
