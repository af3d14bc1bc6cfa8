"""Calibration tokens: int64 ids [samples, seq_len] from a text, a data set or a file, reproducible to the last id.

A text's first 3,000,000 characters are tokenized in one piece, without special tokens, and cut into non-overlapping
windows of seq_len tokens, the rest dropped; the windows kept are the first `samples` of torch.randperm, its generator
seeded, in that order. One piece, because splitting the text at paragraphs gives other tokens at the seams, and then
two tools that read the same file would calibrate on different ids.

    None                              the text packaged with lowbit
    book.txt, notes.md                UTF-8 text
    chats.jsonl                       an object a line: "text", or "messages" through the tokenizer's chat template
    owner/name[:split[:column]]       a data set of the Hugging Face hub (or a local folder of that name), train:text
    tokens.safetensors, a Tensor      int64 [samples, T] ("input_ids"), used whole whatever samples and seq_len say
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import CheckpointError, InputError
from lowbit.optional import require

CHARACTERS = 3_000_000
_DATA_SET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:-]+?))?(?::(?P<column>\w+))?")
_SUFFIXES = (".txt", ".md", ".jsonl", ".safetensors")
_SOURCES = f"a file ({', '.join(_SUFFIXES)}) or a hub data set (owner/name[:split[:column]])"


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def __call__(self, text: Any, *, add_special_tokens: bool, verbose: bool) -> Any: ...

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any: ...


@dataclass(frozen=True, eq=False)
class Tokens:
    """ids int64 [samples, seq_len] on the CPU, and in words where they come from."""

    ids: Tensor
    source: str

    @property
    def hash(self) -> str:
        """SHA-256 in hex of the ids as little-endian int64, row by row."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8", copy=False).tobytes()).hexdigest()


def check_known(ids: Tensor, model: Any) -> None:
    """Raise InputError for a token that a transformers model has no embedding of."""
    known, largest = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest}, and {type(model).__name__} knows {known}: tokenizer and model do "
            "not belong together; put the model's own tokenizer files into its folder"
        )


def packaged_text(name: Literal["calibration", "evaluation"]) -> str:
    """A text that ships with lowbit, from other works than its sibling; see texts/README.md."""
    return (files("lowbit") / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def load_tokens(
    source: str | Path | Tensor | None, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int
) -> Tokens:
    """The tokens of any source that the module's docstring lists. Raises InputError on what cannot serve."""
    if isinstance(source, Tensor):
        return _checked(source.cpu(), "a tensor", tokenizer)
    if source is None:
        text = packaged_text("calibration")
        return text_windows(text, tokenizer, samples, seq_len, seed, "lowbit's packaged calibration text")
    path = Path(source)
    if path.is_file() or path.suffix in _SUFFIXES:
        if path.suffix == ".safetensors":
            return _checked(_stored_ids(path), str(path), tokenizer)
        text = _joined(jsonl_texts(path, tokenizer)) if path.suffix == ".jsonl" else _read(path)
        return text_windows(text, tokenizer, samples, seq_len, seed, str(path))
    if isinstance(source, str) and (match := _DATA_SET.fullmatch(source)):
        text = _joined(_data_set_texts(match["name"], match["split"] or "train", match["column"], tokenizer))
        return text_windows(text, tokenizer, samples, seq_len, seed, source)
    raise InputError(f"there is no calibration text {str(source)!r}; give {_SOURCES}")


_RUN = 64  # tokens; two texts share a run of that length only where one holds the other's text


def overlap(seen: Tokens, held_out: Tokens) -> float:
    """The share of held_out's runs of 64 tokens, one after the other in each window, that occur anywhere in `seen`."""
    run = min(_RUN, seen.ids.shape[1], held_out.ids.shape[1])
    weights = torch.randint(2**62, (run,), generator=torch.Generator().manual_seed(0))
    hashes = [(row.unfold(0, run, 1) * weights).sum(-1) for row in seen.ids]  # modulo 2^64, by int64's overflow
    asked = (held_out.ids.unfold(1, run, run) * weights).sum(-1)
    return torch.isin(asked, torch.cat(hashes)).float().mean().item()


def text_windows(text: str, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int, source: str) -> Tokens:
    """`samples` windows of seq_len tokens from text, chosen as the module's docstring says.

    Raises InputError when the text holds fewer; the message says how many.
    """
    if samples < 1 or seq_len < 1:
        raise InputError(f"{samples} samples of {seq_len} tokens were asked for; both must be at least 1")
    ids = tokenizer(text[:CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]  # verbose warns of length
    count = len(ids) // seq_len
    if count < samples:
        raise InputError(
            f"{source} holds {count} windows of {seq_len} tokens, {samples} were asked for; "
            "give a longer text, or ask for fewer or shorter samples"
        )
    windows = torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return _checked(windows[order[:samples]], source, tokenizer)


def _checked(ids: Tensor, source: str, tokenizer: Tokenizer) -> Tokens:
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise InputError(
            f"tokens of {source} are {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}; "
            "give int64 ids [samples, seq_len], not empty"
        )
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= len(tokenizer):
        raise InputError(
            f"tokens of {source} go from {low} to {high}, but the tokenizer knows 0 to {len(tokenizer) - 1}; "
            "use tokens that were made with this model's tokenizer"
        )
    return Tokens(ids.contiguous(), source)


def _stored_ids(path: Path) -> Tensor:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as stored:
            if "input_ids" in stored.keys():  # noqa: SIM118  (a handle, not a mapping)
                return stored.get_tensor("input_ids")
            names = ", ".join(stored.keys()) or "nothing"
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    raise CheckpointError(f'{path} holds {names}; calibration tokens are an int64 tensor "input_ids"')


def _read(path: Path) -> str:
    """The file's first CHARACTERS characters, its line ends as they are."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(CHARACTERS)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; give {_SOURCES}") from None


def _joined(texts: Iterable[str]) -> str:
    """The texts with blank lines between them, no more of them than are needed."""
    kept, length = [], 0
    for text in texts:
        kept.append(text)
        length += len(text) + 2
        if length >= CHARACTERS:
            break
    return "\n\n".join(kept)


def jsonl_texts(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise InputError(f"line {number} of {path} is no JSON") from None
            yield _row_text(row, None, tokenizer, f"line {number} of {path}")


def _row_text(row: Any, column: str | None, tokenizer: Tokenizer, where: str) -> str:
    """The text of one row: its column, or "text", or "messages" through the chat template."""
    found = row if isinstance(row, dict) else {}
    if column is None and isinstance(found.get("messages"), list):
        return tokenizer.apply_chat_template(found["messages"], tokenize=False)
    text = found.get(column or "text")
    if isinstance(text, str):
        return text
    wanted = f'no text in column "{column}"' if column else 'neither a "text" nor "messages"'
    raise InputError(f"{where} has {wanted}; it has {', '.join(map(str, found)) or 'no fields'}")


def _data_set_texts(name: str, split: str, column: str | None, tokenizer: Tokenizer) -> Iterator[str]:
    load_dataset = require("datasets", "datasets").load_dataset
    try:
        # streamed: only the rows that are needed are fetched
        for number, row in enumerate(load_dataset(name, split=split, streaming=True)):
            yield _row_text(row, column, tokenizer, f"row {number} of {name}")
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"the data set {name} (split {split}) could not be read: {error}") from error
