"""The oracle is gguf-py 0.19: values of every block type, bytes of its quantizers, its reader of our files; and
transformers' own reader of a whole file. llama.cpp itself: tests/interop/make_llama_cpp.py and its fixture."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from architectures import tiny
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lowbit
from lowbit.doctor import examine, fix
from lowbit.errors import CheckpointError, InputError
from lowbit.io.conversion import Options
from lowbit.io.convert import convert
from lowbit.io.gguf_blocks import BLOCKS, BY_NAME
from lowbit.io.gguf_encode import block_of, encode_codes, encode_floats
from lowbit.io.gguf_file import GgufFile, write_gguf
from lowbit.io.gguf_names import FACTORS, config_of, rows_from_gguf, rows_to_gguf, to_gguf, to_transformers
from lowbit.io.stored import Stored
from lowbit.io.targets import TARGETS
from lowbit.nn.linear import QuantLinear
from lowbit.numerics import affine
from lowbit.numerics.scheme import QuantScheme
from lowbit.tensors import PackedWeight

TOKENS = torch.arange(24).view(2, 12) * 7 % 100 + 1
QUANTIZED = [block for block in BLOCKS.values() if block.grid is not None]
each_block = pytest.mark.parametrize("block", QUANTIZED, ids=lambda block: block.name)


def random_rows(block, rows: int = 6) -> np.ndarray:
    """Random bytes whose float16 numbers are finite: exponents below the top."""
    octets = np.random.default_rng(0).integers(0, 256, (rows, 2 * block.bytes), dtype=np.uint8)
    octets[:, 1::2] &= 0xBB
    return octets


@each_block
def test_blocks_decode_as_gguf_py_decodes_them(block) -> None:
    rows = random_rows(block)
    with np.errstate(all="ignore"):
        ours, theirs = block.decode(rows), dequantize(rows, gguf.GGMLQuantizationType[block.name])
    assert block.size, block.bytes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block.name]]
    assert np.array_equal(ours, theirs, equal_nan=True)


def weights(columns: int = 512) -> np.ndarray:
    generator = np.random.default_rng(1)
    w = generator.standard_normal((8, columns)).astype(np.float32) * generator.random((8, 1), np.float32)
    w[0], w[1, :64] = 0, 0.5
    return w


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_floats_become_gguf_py_s_bytes(name: str) -> None:
    theirs = quantize(weights(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode_floats(weights(), BY_NAME[name]), theirs)


@pytest.mark.parametrize(("name", "bound"), [("Q4_K", 0.076), ("Q6_K", 0.019)])
def test_k_blocks_lose_what_a_search_should_lose(name: str, bound: float) -> None:
    """Relative error; Q4_1 loses 0.085 of the same weights, Q8_0 0.0055 (llama.cpp's own bytes: test_llama_cpp.py)."""
    w = weights()
    decoded = BY_NAME[name].decode(encode_floats(w, BY_NAME[name]))
    assert np.array_equal(decoded, dequantize(encode_floats(w, BY_NAME[name]), gguf.GGMLQuantizationType[name]))
    assert np.linalg.norm(decoded - w) / np.linalg.norm(w) < bound
    assert not decoded[0].any()


@pytest.mark.parametrize("text", ["w4a16-g32", "w4a16-g64", "w4a16", "w4a16-tensor", "w8a16-g32", "w8a16"])
def test_symmetric_codes_are_carried_over_exactly(text: str) -> None:
    packed = PackedWeight.from_float(torch.from_numpy(weights()), QuantScheme.parse(text), torch.float16)
    block = block_of(packed)
    assert not isinstance(block, str)
    assert block.name == ("Q8_0" if text.startswith("w8") else "Q4_0")
    theirs = dequantize(encode_codes(packed, block), gguf.GGMLQuantizationType[block.name])
    assert np.array_equal(theirs, packed.dequantize().numpy())


def rounded(w: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype) -> PackedWeight:
    """w by rounding; zero-points have scales of seven bits, so that -zero scale fits in float16's eleven."""
    if scheme.weights.symmetric:
        return PackedWeight.from_float(w, scheme, dtype)
    scale, zero = affine.choose_scale(*affine.value_range(w.float(), scheme.weights), scheme.weights, torch.bfloat16)
    scale = (scale.view(torch.int16) & ~1).view(torch.bfloat16)
    return PackedWeight.from_codes(affine.encode(w.float(), scale, zero, scheme.weights), scale, zero, scheme)


def test_zero_points_are_carried_over_where_their_minima_are_float16_numbers() -> None:
    w = torch.from_numpy(weights())
    packed = rounded(w, QuantScheme.parse("w4a16-g32-asym"), torch.bfloat16)
    block = block_of(packed)
    assert not isinstance(block, str)
    assert block.name == "Q4_1"
    assert np.array_equal(dequantize(encode_codes(packed, block), gguf.GGMLQuantizationType.Q4_1), packed.dequantize())
    refused = block_of(PackedWeight.from_float(w, QuantScheme.parse("w4a16-g32-asym"), torch.float16))
    assert refused == "its minima, -zero-point times scale, are no float16 numbers"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w3a16-g32", "hold 4 bits, or 8 bits"),
        ("w8a16-g32-asym", "8 bits without zero-points"),
        ("w4a16-g16", "groups of 16"),
        ("w8a8", "beside 16-bit activations"),
        ("fp8", "integer weights"),
        ("nf4-b64", "integer weights"),
    ],
)
def test_what_has_no_block_is_refused(text: str, words: str) -> None:
    packed = PackedWeight.from_float(torch.from_numpy(weights()), QuantScheme.parse(text), torch.float16)
    assert words in str(block_of(packed))


def test_rows_of_heads_go_there_and_back() -> None:
    rows = torch.arange(48)
    assert torch.equal(rows[rows_to_gguf(48, 3)][rows_from_gguf(48, 3)], rows)
    assert rows_to_gguf(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # convert_hf_to_gguf's permute of one head of 8


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.11.self_attn.q_proj.bias", "lm_head.weight"]
)
def test_names_go_there_and_back(name: str) -> None:
    assert to_transformers(to_gguf(name)) == name
    assert to_transformers("blk.0.ffn_gate_exps.weight") is None
    with pytest.raises(InputError, match="has no name in GGUF"):
        to_gguf("model.layers.0.mlp.experts.3.up_proj.weight")


def checkpoint(
    folder: Path, model_type: str, text: str | None, dtype: torch.dtype = torch.float16, vocabulary: int = 128
) -> Path:
    """A tiny model with a byte-level tokenizer, quantized by rounding where a scheme is given."""
    model = tiny(model_type).to(dtype)
    if vocabulary != 128:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.config.sliding_window = None  # which llama.cpp's architectures don't have
    tensors, schemes = dict(model.state_dict()), {}
    if text is not None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                weight = rounded(tensors.pop(f"{name}.weight"), QuantScheme.parse(text), dtype)
                tensors |= TARGETS["compressed-tensors"].tensors(name, Stored(weight), dtype)
                schemes[name] = weight.scheme
    folder.mkdir()
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    if schemes:
        config["quantization_config"] = TARGETS["compressed-tensors"].config(schemes, ["lm_head"], dtype)
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("text", ["w4a16-g32", "w8a16-g32", "w4a16-g32-asym"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_written_as_gguf_has_the_same_logits_and_packed_weights(
    model_type: str, text: str, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if "asym" in text else torch.float16
    start = checkpoint(tmp_path / "start", model_type, text, dtype)
    expected = lowbit.load(start, torch.float32)
    result = convert(start, tmp_path / "m.gguf", "gguf")
    assert result.verified == len(result.schemes) == 21
    model = lowbit.load(tmp_path / "m.gguf", torch.float32)
    schemes = {str(module.scheme) for module in model.modules() if isinstance(module, QuantLinear)}
    assert schemes == {text}
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in theirs.fields.items()}
    assert fields["general.architecture"] == ("llama" if model_type == "mistral" else model_type)
    assert len(fields["tokenizer.ggml.tokens"]) == 128
    assert fields["tokenizer.ggml.token_type"][127] == 3
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    for tensor in theirs.tensors:
        assert np.array_equal(
            dequantize(tensor.data, tensor.tensor_type).reshape(-1),
            GgufFile.open(tmp_path / "m.gguf").floats(tensor.name).reshape(-1),
        ), tensor.name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k"])
def test_a_float_model_is_rounded_to_blocks(kind: str, tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", "llama", None)
    result = convert(start, tmp_path / "m.gguf", f"gguf-{kind}")
    assert bool(result.warnings) == ("k" in kind)  # rows of 64 and 96 hold no 256
    expected = lowbit.load(start, torch.float32)(TOKENS).logits
    model = lowbit.load(tmp_path / "m.gguf", torch.float32)
    error = (model(TOKENS).logits - expected).norm() / expected.norm()
    assert error < (0.3 if kind in ("q4_0", "q4_1") else 0.02)


def test_what_can_t_be_written_is_said(tmp_path: Path) -> None:
    float_model = checkpoint(tmp_path / "float", "llama", None)
    quantized = checkpoint(tmp_path / "quantized", "llama", "w3a16-g32")
    out = tmp_path / "m.gguf"
    for source, target, words in (
        (float_model, "gguf", "choose how to round it: gguf-q4_0"),
        (quantized, "gguf", r"hold 4 bits, or 8 bits.*--lossy requantize"),
        (quantized, "gguf-q8_0", "ask for that with --lossy requantize"),
        (checkpoint(tmp_path / "gemma", "gemma2", None), "gguf-q8_0", "not for 'gemma2'"),
    ):
        with pytest.raises(InputError, match=words):
            convert(source, out, target)
    with pytest.raises(InputError, match="GGUF is one file"):
        convert(float_model, tmp_path / "m", "gguf-q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "gemma", "quantized"]
    convert(quantized, out, "gguf-q8_0", Options(lossy="requantize"))
    with pytest.raises(InputError, match="exists already"):
        convert(quantized, out, "gguf-q8_0", Options(lossy="requantize"))


def test_a_rule_without_a_name_is_refused(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", "llama", None)
    path = start / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(InputError, match=r"a rule that llama\.cpp has no name for"):
        convert(start, tmp_path / "m.gguf", "gguf-q8_0")
    path.write_text(json.dumps(tokenizer | {"model": {"type": "Unigram"}}))
    with pytest.raises(InputError, match="not for the Unigram"):
        convert(start, tmp_path / "m.gguf", "gguf-q8_0")


def pieces_tokenizer(prepends: bool) -> PreTrainedTokenizerFast:
    """As transformers makes it of a SentencePiece model: bytes for what it lacks, and every way to join a piece."""
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "rat", "ate", "the", "hat", "of", "that", "cat"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    joined = sorted(
        {f"\u2581{word}"[:size] for word in words for size in range(2, 5)} | {"at", "he", "th", "an"}, key=len
    )
    letters = sorted(set("".join(words)) | {"\u2581"})
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *joined, *letters])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("\u2581")] * prepends + [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prepends", [True, False])
def test_pieces_with_bytes_give_their_tokens_through_transformers_gguf_reader(prepends: bool, tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", "mistral", None, vocabulary=320)
    source = pieces_tokenizer(prepends)
    source.save_pretrained(start)
    convert(start, tmp_path / "m.gguf", "gguf-q8_0")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] == prepends
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    if prepends:  # which its reader takes for granted; it also joins spaces that stand together, as llama.cpp does not
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        for text in ("the cat sat on that mat", "an \u00e9t\u00e9", "ratatat hath", "two spaces "):
            ids = source(text, add_special_tokens=False).input_ids
            assert theirs(text, add_special_tokens=False).input_ids == ids, text


@torch.no_grad()
def test_llama_3_s_rotary_factors_go_there_and_back(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", "llama", "w4a16-g32")
    settings = json.loads((start / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    (start / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    expected = lowbit.load(start, torch.float32)
    convert(start, tmp_path / "m.gguf", "gguf")
    model = lowbit.load(tmp_path / "m.gguf", torch.float32)
    assert model.config.rope_parameters == rope
    plain, factors = 500000.0 ** -(torch.arange(0, 16, 2) / 16), GgufFile.open(tmp_path / "m.gguf").floats(FACTORS)
    assert factors[0] == 1
    assert factors[-1] == 8
    torch.testing.assert_close(plain / torch.from_numpy(factors.copy()), expected.model.rotary_emb.inv_freq)
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    qwen = checkpoint(tmp_path / "qwen", "qwen2", "w4a16-g32")
    settings = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    with pytest.raises(InputError, match="type default, not of 'llama3'"):
        convert(qwen, tmp_path / "q.gguf", "gguf")


def test_rotary_embeddings_and_experts_that_have_no_words_here_are_refused() -> None:
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32,
                "llama.attention.head_count": 2, "llama.context_length": 8, "llama.feed_forward_length": 32,
                "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 32}  # fmt: skip
    assert config_of(metadata, True)["rope_parameters"]["rope_type"] == "default"
    for change, words in (
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.expert_count": 8}, "with experts"),
    ):
        with pytest.raises(CheckpointError, match=words):
            config_of(metadata | change, True)
    with pytest.raises(CheckpointError, match="otherwise than Llama 3 does"):
        config_of(metadata, True, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))


@torch.no_grad()
def test_minima_that_are_no_whole_steps_are_dequantized_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = checkpoint(tmp_path / "start", "llama", None)
    convert(start, tmp_path / "m.gguf", "gguf-q4_1")
    model = lowbit.load(tmp_path / "m.gguf", torch.float32)
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == ["lm_head"]  # in Q8_0
    assert "Q4_1 weights are dequantized where a minimum is no whole number of steps" in caplog.text


def test_another_family_is_dequantized_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.gguf"
    rows = encode_floats(weights(), BY_NAME["Q8_0"])
    write_gguf(path, {"general.architecture": "rwkv"}, [("a", (8, 512), BY_NAME["Q8_0"])], iter([rows]))
    with pytest.raises(CheckpointError, match="can't be read as a GGUF model"):  # transformers' reader has its turn
        lowbit.load(path)
    assert "weights of the architecture rwkv are dequantized; packed are those of llama, qwen2, qwen3" in caplog.text


def test_the_doctor_reads_gguf_and_convert_says_that_it_does_not(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", "llama", "w4a16-g32")
    path = tmp_path / "m.gguf"
    convert(start, path, "gguf")
    diagnosis = examine(path)
    assert (diagnosis.method, diagnosis.findings) == ("gguf, llama", [])
    assert diagnosis.verdicts["llama.cpp"] == "reads it"
    with pytest.raises(InputError, match="to GGUF but not from it"):
        convert(path, tmp_path / "out", "awq")
    with pytest.raises(InputError, match="lowbit repairs compressed-tensors, gptq, awq, not gguf, llama"):
        fix(path, tmp_path / "out")
    file = GgufFile.open(path)
    kept = [tensor for name, tensor in file.tensors.items() if name != "blk.1.ffn_up.weight"]
    metadata = {key: value for key, value in file.metadata.items() if key != "tokenizer.ggml.tokens"}
    metadata |= {"llama.vocab_size": 128}
    rows = [file.read(tensor.name) for tensor in kept]
    write_gguf(path, metadata, [(tensor.name, tensor.shape, tensor.block) for tensor in kept], iter(rows))
    words = [finding.words for finding in examine(path).findings]
    assert words == ["1 tensors are missing: blk.1.ffn_up.weight", "there is no tokenizer in it"]


@pytest.mark.parametrize("damage", ["magic", "version", "short", "tensors", "offset", "type"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rows = encode_floats(weights(), BY_NAME["Q8_0"])
    write_gguf(path, {"general.architecture": "llama"}, [("a", (8, 512), BY_NAME["Q8_0"])], iter([rows]))
    assert np.array_equal(GgufFile.open(path).read("a"), rows)
    octets = bytearray(path.read_bytes())
    place = octets.index(b"a", 60) + 1  # of the tensor's dimensions
    if damage == "magic":
        octets[0] = 0
    elif damage == "version":
        octets[4] = 2
    elif damage == "short":
        octets = octets[:-100]
    elif damage == "tensors":
        octets[8:16] = b"\xff" * 8
    elif damage == "offset":
        octets[place + 24 : place + 32] = b"\xff" * 4 + b"\0" * 4
    else:
        octets[place + 20] = 99
    path.write_bytes(octets)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        GgufFile.open(path)
