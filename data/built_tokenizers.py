"""Tokenizers built here: from texts (char, word, bpe), from bytes (byte), from an alphabet (text8)."""

import string
from collections.abc import Callable, Iterable
from functools import partial

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "bos", "eos", "mask")}
_TRAINING = {"special_tokens": list(SPECIALS.values()), "show_progress": False}
# A word or sign includes one space before it, so that spacing survives; other white space is a separate token.
_WORDS = r" ?[\p{L}\p{M}]+(?:['\x{2019}][\p{L}\p{M}]+)*| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]|\s"
_ANY_CHARACTER = r"[\s\S]"


def _word_level(texts: Iterable[str], vocab_size: int, pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIALS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=0, **_TRAINING))
    return tokenizer


def _build_word(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Prepend a space to the text, so that its first word has the same id as elsewhere."""
    tokenizer = _word_level((f" {text}" for text in texts if text), vocab_size, _WORDS)
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _build_byte(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = [*SPECIALS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **_TRAINING)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


BUILDERS: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "char": partial(_word_level, pattern=_ANY_CHARACTER),
    "byte": _build_byte,
    "word": _build_word,
    "bpe": _build_bpe,
}


def text8() -> PreTrainedTokenizerFast:
    """Return the reference project's text8 tokenizer: 8 special tokens (the mask has id 4), a to z, the space.

    Capitals are lower-cased; any other character is unknown.
    """
    special = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
    alphabet = {token: i for i, token in enumerate([*special, *string.ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token=SPECIALS["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY_CHARACTER), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, cls_token="[CLS]", sep_token="[SEP]", **SPECIALS
    )
