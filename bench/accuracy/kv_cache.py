"""What a cache in few bits costs: KL to the same model with its cache in float, teacher-forced on held-out text.

Tokens come in pieces of one group, so that every token sees exactly what it would see if it came alone
(cache/layer.py), and all positions of a window count, also the first ones, whose past is all in float; `kld_late` is
the mean over the second half of each window. Bytes are those of the cache after a window,
whose float tokens are in float32 here.

usage:  python bench/accuracy/kv_cache.py MODEL TEXT OUT.json [--windows 4] [--caches 8,4,2,2:0:0]
        a cache is BITS[:WINDOW[:SINKS[:KEYS]]], KEYS of "t" (grouped along a token's channels) and "r" (turned, R3)
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowbit import QuantizedCache
from lowbit.judge import Head, hidden_states
from lowbit.numerics.metrics import kl_divergence
from lowbit.observe.tokens import load_tokens

GROUP = 32
ROWS = 256  # tokens whose logits exist at one time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--caches", default="8,4,2,8:0:0,4:0:0,2:0:0,2:128:0,2:32:4")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def pieces(length: int, sinks: int) -> list[tuple[int, int]]:
    """Cuts of a window after the sinks and then after every group."""
    cuts = [0, *range(sinks or GROUP, length, GROUP), length]
    return list(itertools.pairwise(cuts))


def with_cache(model: PreTrainedModel, ids: Tensor, cache: QuantizedCache) -> Tensor:
    """Last hidden states [T, K] of one window ids [T]."""
    base = model.base_model
    parts = [
        base(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True).last_hidden_state[0]
        for start, stop in pieces(len(ids), cache.scheme.sinks)
    ]
    return torch.cat(parts)


def divergence(head: Head, original: Tensor, hidden: Tensor) -> Tensor:
    """KL [T] of each position, in nats."""
    spans = zip(original.split(ROWS), hidden.split(ROWS), strict=True)
    return torch.cat([kl_divergence(head(wanted), head(found)) for wanted, found in spans])


def row_of(model: PreTrainedModel, ids: Tensor, original: list[Tensor], text: str) -> dict:
    head, windows, late, seconds = Head(model), [], [], 0.0
    bits, window, sinks, keys = parsed(text)
    for one, wanted in zip(ids, original, strict=True):
        turned = {"token_keys": "t" in keys, "rotate_keys": "r" in keys}
        cache = QuantizedCache(model.config, bits, GROUP, window, sinks, **turned)
        started = time.perf_counter()
        hidden = with_cache(model, one, cache)
        seconds += time.perf_counter() - started
        kld = divergence(head, wanted, hidden)
        windows.append(kld.mean().item())
        late.append(kld[len(kld) // 2 :].mean().item())
    means = torch.tensor(windows, dtype=torch.float64)
    return {
        "bits": bits, "group": GROUP, "window": window, "sinks": sinks, "keys": keys, "kld": means.mean().item(),
        "kld_stderr": (means.std() / math.sqrt(len(means))).item(), "kld_late": sum(late) / len(late),
        "bytes": cache.nbytes, "float_bytes": cache.float_nbytes, "tokens": ids.shape[1],
        "seconds_a_window": round(seconds / len(ids), 1), "windows": [round(value, 7) for value in windows],
    }  # fmt: skip


def parsed(text: str) -> tuple[int, int, int, str]:
    """(bits, window, sinks, keys) of BITS[:WINDOW[:SINKS[:KEYS]]]."""
    bits, window, sinks, keys = [*text.split(":"), *("", "128", "4", "")[text.count(":") + 1 :]]
    return int(bits), int(window), int(sinks), keys


@torch.no_grad()
def main() -> None:
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(options.device)
    tokens = load_tokens(options.text, tokenizer, options.windows, options.seq_len, 0)
    ids = tokens.ids.to(model.device)
    original = list(hidden_states(model, ids))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU ({platform.machine()})"
    rows = []
    for text in options.caches.split(","):
        row = row_of(model, ids, original, text)
        print(f"{text:12s} KL {row['kld']:.5f} +- {row['kld_stderr']:.5f}, second half {row['kld_late']:.5f}, "
              f"{row['bytes'] / row['float_bytes']:.3f} of float32's bytes", flush=True)  # fmt: skip
        rows.append(row | {
            "model": Path(options.model).name, "evaluation": tokens.hash, "device": where, "dtype": "float32",
            "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit.strip(),
        })  # fmt: skip
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
