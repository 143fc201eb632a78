"""Folders as transformers writes them, and the words to train on what they hold."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from palimpsest.data.tokenizers import BUILDERS

CONTEXT = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SPECIALS = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def save_tokenizer(folder: Path, **specials: str) -> int:
    """A tokenizer of single letters; returns its number of ids."""
    tokenizer = BUILDERS["char"]([LETTERS], 100)
    fast = FastTokenizer(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **specials)
    fast.save_pretrained(folder)
    return len(fast)


def save_scorer(folder: Path, seed: int = 0, vocab_size: int | None = None, **specials: str) -> Path:
    """A random GPT-2 whose predictions differ a lot from token to token, with a tokenizer of letters."""
    size = save_tokenizer(folder, **(specials or SPECIALS))
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=CONTEXT,
        vocab_size=vocab_size or size,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def made_up_words(rows_per_class: int, words_per_text: int) -> list[tuple[int, str]]:
    """Labels and texts of two classes that share no word."""
    words = {0: ["ad", "bk", "cr", "dull"], 1: ["fm", "gt", "ha", "ih", "fine"]}
    return [
        (label, " ".join(random.Random(i).choices(words[label], k=words_per_text)))
        for i in range(rows_per_class) for label in (0, 1)
    ]  # fmt: skip


def write_labelled(path: Path, rows: list[tuple[int, str]]) -> None:
    """A csv with the columns text and label."""
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for label, text in rows))
