"""Tiny models as folders: a model of architectures.py with a tokenizer of single characters, and texts to feed it.

The tokenizer is made here, so nothing is fetched: every printable ASCII character and the line feed is a token.
"""

import random
import string
from pathlib import Path

import torch
from architectures import tiny
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

DEMO_MODEL = Path(__file__).parents[1] / "build" / "smollm2"  # `make model` makes it
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """100 tokens: four special ones, then the characters."""
    characters = sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m)."), "isolated")
    backend.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_tiny(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The tiny model of one architecture, in `dtype`, with its tokenizer, as a Hugging Face folder."""
    tiny(model_type).to(dtype).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, seed: int, characters: int = 6000) -> Path:
    """Seeded words in sentences; texts of two seeds share no line."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(400)]
    text = ""
    while len(text) < characters:
        text += " ".join(generator.choices(words, k=generator.randint(5, 15))).capitalize() + ".\n"
    path.write_text(text[:characters], encoding="utf-8")
    return path


def cut_demo_model(folder: Path, dtype: torch.dtype = torch.bfloat16, blocks: int = 2) -> Path:
    """The demo model's first blocks with its own embedding, head and tokenizer, in `dtype`, as a folder."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=dtype)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder
