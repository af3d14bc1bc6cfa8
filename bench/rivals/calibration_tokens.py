"""The calibration tokens that every tool of a comparison is given.

The text's first 3,000,000 characters are tokenized by the model's tokenizer without special tokens and cut into
non-overlapping windows of T tokens, the rest dropped; of the windows the first M of torch.randperm (generator seeded
with 0) are kept. Written as int64 "input_ids" [M, T] to a safetensors file, M = 128 and T = 512 unless asked otherwise.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CHARACTERS = 3_000_000


def calibration_windows(text: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int) -> torch.Tensor:
    """Token ids [samples, seq_len] drawn from the text's windows with seed 0."""
    ids = tokenizer(text[:CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // seq_len
    if count < samples:
        raise SystemExit(f"the text holds {count} windows of {seq_len} tokens, not {samples}: give a longer text")
    windows = torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return windows[order[:samples]].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="text file, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    with args.text.open(encoding="utf-8", newline="") as file:
        text = file.read(CHARACTERS)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = calibration_windows(text, tokenizer, args.samples, args.seq_len)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": tokens}, args.out)
    print(f"{args.out}: input_ids {list(tokens.shape)}, sum {int(tokens.sum())}")


if __name__ == "__main__":
    main()
