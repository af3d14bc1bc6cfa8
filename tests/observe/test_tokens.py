"""Calibration tokens. Oracles: hashlib over struct-packed ids, windows cut by hand, a tokenizer whose ids are bytes."""

import hashlib
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowbit import optional
from lowbit.errors import CheckpointError, InputError
from lowbit.observe import tokens
from lowbit.observe.tokens import Tokens, load_tokens, packaged_text, text_windows

TEXT = "".join(f"{number} bottles of beer on the wall.\n" for number in range(99, 0, -1))


class Bytes:
    """A tokenizer with one id per byte of UTF-8; its chat template is "<role>content"."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 256

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)


def _load(source: Any, samples: int = 4, seq_len: int = 16, seed: int = 0) -> Tokens:
    return load_tokens(source, Bytes(), samples, seq_len, seed)


def test_hash_is_sha256_of_the_ids_as_little_endian_int64() -> None:
    ids = torch.tensor([[1, 2, 258], [3, 4, 5]])
    assert Tokens(ids, "here").hash == hashlib.sha256(struct.pack("<6q", 1, 2, 258, 3, 4, 5)).hexdigest()
    assert Tokens(ids.T.contiguous().T, "here").hash == Tokens(ids, "here").hash


def test_windows_are_those_of_randperm_in_its_order() -> None:
    chosen = text_windows(TEXT, Bytes(), 5, 32, 7, "beer")
    count = len(TEXT) // 32
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7))[:5].tolist()
    assert [bytes(row).decode() for row in chosen.ids.tolist()] == [TEXT[32 * i : 32 * i + 32] for i in order]
    assert (chosen.ids.dtype, chosen.source) == (torch.int64, "beer")


def test_only_the_first_three_million_characters_count() -> None:
    longer = text_windows("a" * 3_000_000 + "b" * 100, Bytes(), 3000, 1000, 0, "long")
    assert set(longer.ids.flatten().tolist()) == {ord("a")}
    with pytest.raises(InputError, match="holds 3000 windows"):
        text_windows("a" * 3_000_000 + "b" * 1000, Bytes(), 3001, 1000, 0, "long")


def test_the_seed_alone_decides() -> None:
    assert _load(None, seed=3).hash == _load(None, seed=3).hash
    assert _load(None, seed=3).hash != _load(None, seed=4).hash


def test_a_text_that_is_too_short_says_how_many_windows_it_has() -> None:
    with pytest.raises(InputError, match="beer holds 1 windows of 2000 tokens, 4 were asked for"):
        text_windows(TEXT, Bytes(), 4, 2000, 0, "beer")
    with pytest.raises(InputError, match="at least 1"):
        text_windows(TEXT, Bytes(), 0, 10, 0, "beer")


def test_text_files_keep_their_line_ends(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_bytes(b"one\r\n\xc3\xa9two\n\n")
        assert bytes(_load(tmp_path / name, 1, 10).ids[0].tolist()) == b"one\r\n\xc3\xa9two"
    assert _load(str(tmp_path / "a.txt"), 1, 10).source == str(tmp_path / "a.txt")


def test_jsonl_joins_texts_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}
    path.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps(chat) + "\n")
    assert bytes(_load(path, 1, 20).ids[0].tolist()) == b"abc\n\n<user>hi<bot>yo"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2 of .* is no JSON"),
        ('{"body": "x", "id": 3}', 'line 2 of .* has neither a "text" nor "messages"; it has body, id'),
        ("[1, 2]", "line 2 of .* has neither"),
        ('{"text": 5}', "line 2 of .* has neither"),
    ],
    ids=["no JSON", "other fields", "no object", "no string"],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        _load(path)


def test_stored_tokens_are_used_whole(tmp_path: Path) -> None:
    ids = torch.arange(60).view(6, 10)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    assert torch.equal(_load(tmp_path / "ids.safetensors", 2, 3).ids, ids)
    assert torch.equal(_load(ids, 2, 3).ids, ids)


def test_stored_tokens_that_cannot_serve_say_why(tmp_path: Path) -> None:
    save_file({"ids": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match='holds ids; calibration tokens are an int64 tensor "input_ids"'):
        _load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:20])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        _load(tmp_path / "cut.safetensors")
    save_file({"input_ids": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"int32 \[2, 2\]; give int64 ids"):
        _load(tmp_path / "narrow.safetensors")


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(0, 3).long()])
def test_tensors_of_another_shape_or_dtype_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"give int64 ids \[samples, seq_len\]"):
        _load(ids)


@pytest.mark.parametrize("outside", [256, -1])
def test_ids_beyond_the_vocabulary_are_refused(outside: int) -> None:
    with pytest.raises(InputError, match="the tokenizer knows 0 to 255"):
        _load(torch.tensor([[3, outside, 5]]))


@pytest.mark.parametrize("name", ["no.txt", "no.md", "no.jsonl", "no.safetensors", "owner/no.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"there is no file .*{name}"):
        _load(str(tmp_path / name) if "/" not in name else name)


def test_a_source_that_is_nothing_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no calibration text 'wiki'; give a file \(.txt, .*hub data set"):
        _load("wiki")


def test_a_file_that_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text: invalid start byte at byte 5"):
        _load(tmp_path / "bytes.txt")


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set "owner/rows", which the real `datasets` reads from the working directory."""
    pytest.importorskip("datasets", reason="the extra lowbit[datasets] is not installed")
    folder = tmp_path / "owner" / "rows"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"{split} text {i}", "body": f"{split} body {i}"} for i in range(5)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return "owner/rows"


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("", "train text 0\n\ntrain"), (":test", "test text 0\n\ntest t"), (":test:body", "test body 0\n\ntest b")],
)
def test_a_data_set_is_read_by_split_and_column(data_set: str, suffix: str, start: str) -> None:
    loaded = _load(data_set + suffix, 1, 60).ids[0].tolist()
    assert bytes(loaded).decode().startswith(start)


def test_a_data_set_without_the_column_or_split_says_so(data_set: str) -> None:
    with pytest.raises(InputError, match='row 0 of owner/rows has no text in column "title"; it has text, body'):
        _load(f"{data_set}:train:title")
    with pytest.raises(InputError, match=r"owner/rows \(split dev\) could not be read"):
        _load(f"{data_set}:dev")


def test_only_as_many_rows_are_read_as_the_text_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Rows:
        def load_dataset(self, name: str, split: str, streaming: bool) -> Any:
            assert (name, split, streaming) == ("owner/endless", "train[:50%]", True)
            while True:
                read.append(len(read))
                yield {"text": "x" * 999_998}

    monkeypatch.setattr(tokens, "require", lambda module, extra: Rows())
    _load("owner/endless:train[:50%]", 2, 100)
    assert len(read) == 3


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(InputError, match=r'pip install "lowbit\[cats\]"'):
        optional.require("a_package_that_is_not_there.part", "cats")
    assert optional.require("json", "cats") is json


def test_a_broken_module_raises_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import a_dependency_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency"):
        optional.require("broken_package", "cats")


def test_packaged_texts_are_large_and_share_no_paragraph() -> None:
    calibration, evaluation = packaged_text("calibration"), packaged_text("evaluation")
    assert len(calibration) > 550_000
    assert len(evaluation) > 240_000
    long = [{part for part in text.split("\n\n") if len(part) > 120} for text in (calibration, evaluation)]
    assert len(long[0]) > 1000
    assert not long[0] & long[1]


def test_a_text_longer_than_the_model_takes_raises_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    rust = RustTokenizer(models.WordLevel({"beer": 0, "[UNK]": 1}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, model_max_length=8)
    logger = logging.getLogger("transformers")  # which does not propagate to caplog's root
    logger.addHandler(caplog.handler)
    try:
        loaded = text_windows("beer " * 100, tokenizer, 2, 40, 0, "beer")
    finally:
        logger.removeHandler(caplog.handler)
    assert loaded.ids.tolist() == [[0] * 40] * 2
    assert not caplog.records
