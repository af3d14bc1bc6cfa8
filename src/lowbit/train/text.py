"""Training text: windows int64 [n, T] of a file, each document closed by the end-of-text token.

    notes.txt, notes.md    UTF-8 text, one document
    chats.jsonl            an object a line, one document each: "text", or "messages" through the chat template

Unlike calibration (observe/tokens.py) the whole file is used, and the documents' order is kept: the loop shuffles the
windows, not the documents.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import InputError
from lowbit.observe.tokens import Tokens, jsonl_texts

MIN_WINDOWS = 2


def training_windows(path: str | Path, tokenizer: Any, seq_len: int) -> Tokens:
    """The windows of a file, the rest dropped. Raises InputError for a file that can't be read or is too short."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give training text as .txt, .md or .jsonl")
    if path.suffix not in (".txt", ".md", ".jsonl"):
        raise InputError(f"{path} is no training text; give a .txt, .md or .jsonl file")
    texts = jsonl_texts(path, tokenizer) if path.suffix == ".jsonl" else [_read(path)]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    pieces = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end for text in texts)
    ids = list(chain.from_iterable(pieces))
    count = len(ids) // seq_len
    if count < MIN_WINDOWS:
        raise InputError(
            f"{path} holds {len(ids)} tokens, which is less than {MIN_WINDOWS} windows of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return Tokens(torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len), str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
