"""Tokenizers: loading or building them, what a model needs to know of one, and decoding ids.

Networks, objectives and samplers only see `Vocabulary`. `encode` reads the names of special tokens in a text ("[MASK]",
"<|endoftext|>") as ordinary characters, because a mask in clean text would corrupt every loss.
"""

import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from palimpsest.common.files import check_regular
from palimpsest.common.messages import excerpt
from palimpsest.data.built_tokenizers import BUILDERS, SPECIALS, text8
from palimpsest.data.cache import cached_folder, texts_fingerprint
from palimpsest.data.hub import local_folder, not_found_message, quick_when_offline

MASK_SYMBOL = "▢"
ILLEGAL_SYMBOL = "\N{REPLACEMENT CHARACTER}"

_KEY = "data.tokenizer_name_or_path"
_CODE_VERSION = 1  # raise it whenever a build below gives another tokenizer for the same texts
_FOLDERS = {"gpt2": "gpt2_tokenizer", "bert-base-uncased": "bert_tokenizer", "roberta-base": "roberta_tokenizer"}
_FILES = "tokenizer.json (or vocab.txt, or vocab.json with merges.txt) and tokenizer_config.json"
_LFS = b"version https://git-lfs"  # the beginning of a file that was cloned without its content
_ALL = 2**31
_MOST_GROWTH = 100  # factor by which replacements may lengthen a text
_MOST_GAPS = 1024  # ids without a token that every vocabulary may have
# Processor time that texts may take. The slowest tokenizers take 1e-5 seconds a character on a loaded machine.
_SECONDS, _SECONDS_PER_CHARACTER = 60.0, 1e-3
_HAVE_PATTERNS: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()
_BEFORE = ":"  # a sign that tokenizers separate from the following word


@dataclass(frozen=True)
class Vocabulary:
    """The ids and the fingerprint of a tokenizer that models use.

    Attributes:
        size: number of ids that a network scores, including the mask; every id of the data is below it.
        mask_id, pad_id: always present, never equal.
        bos_id, eos_id: None if the tokenizer has no such token.
        special_ids: begin, end, classifier, separator and padding tokens; an unknown token counts as text.
        fingerprint: hex SHA-256 of the serialised tokenizer; equal fingerprints give equal ids for every text.
        mask_added: the mask is the last id, not a token of the tokenizer.
    """

    size: int
    mask_id: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    special_ids: frozenset[int] = frozenset()
    mask_added: bool = False

    @property
    def own_size(self) -> int:
        """Return the number of ids of the tokenizer itself, for networks without a mask."""
        return self.size - self.mask_added


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the vocabulary by the rule of the reference projects: a tokenizer without a mask gets one more id.

    Ids above `tokenizer.vocab_size` (tokens added later) enlarge the vocabulary, so the added mask never collides with
    one. The pad is never the mask: without a pad token (gpt2) rows are padded with the end token. Raises ValueError if
    no token can serve as the pad.
    """
    _check_ids(tokenizer)
    top = max([tokenizer.vocab_size - 1, *tokenizer.get_vocab().values()])
    mask_id = tokenizer.mask_token_id
    size = top + 1
    if mask_id is None:
        mask_id, size = size, size + 1
    bos_id = _first_id(tokenizer.bos_token_id, tokenizer.cls_token_id, unlike=mask_id)
    eos_id = _first_id(tokenizer.eos_token_id, tokenizer.sep_token_id, unlike=mask_id)
    pad_id = _first_id(tokenizer.pad_token_id, eos_id, bos_id, unlike=mask_id)
    if pad_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"{_KEY}={name} has no padding token, nor an end, separator or begin token to pad with; set pad_token in "
            "its tokenizer_config.json, or choose another tokenizer"
        )
    framing = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, pad_id)
    special_ids = frozenset(framing) - {None, mask_id}
    return Vocabulary(
        size, mask_id, pad_id, bos_id, eos_id, _fingerprint(tokenizer), special_ids, tokenizer.mask_token_id is None
    )


def _check_growth(described: Mapping[str, object], name: str) -> None:
    """Raise ValueError if consecutive replacements in a tokenizer.json make texts far longer."""
    growth, waiting = 1.0, [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and isinstance(node.get("content"), str) and "pattern" in node:
            pattern = node["pattern"]
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(node["content"]) / max(1, len(replaced or "")))
        waiting += list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    if growth > _MOST_GROWTH:
        raise ValueError(
            f"{_KEY}={name}: the replacements in its tokenizer.json make a text up to {growth:,.0f} times as long; "
            "correct them, or choose another tokenizer"
        )


def _check_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if ids far exceed the number of tokens, because the library allocates up to the largest id."""
    ids = tokenizer.get_vocab().values()
    top = max(ids, default=0)
    if top >= 2 * len(ids) + _MOST_GAPS:
        raise ValueError(
            f"{_KEY}={tokenizer.name_or_path} has {len(ids):,} tokens, and one of them has the id {top:,}: a network "
            "would need a row for every id below it; correct the vocabulary in tokenizer.json"
        )


def _first_id(*ids: int | None, unlike: int) -> int | None:
    return next((i for i in ids if i is not None and i != unlike), None)


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the tokenizer without truncation and padding, which are settings of its last call."""
    roles = ("bos", "eos", "cls", "sep", "pad", "mask", "unk")
    specials = [getattr(tokenizer, f"{role}_token_id") for role in roles]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    serialised = json.dumps([content, specials], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(serialised.encode()).hexdigest()


# -------------------------------------------------------------------------------- loading


def load_tokenizer(
    name_or_path: str,
    *,
    folder: str | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
    content: Callable[[], str] | None = None,
    vocab_size: int | None = None,
    cache_dir: str | Path = ".cache",
    mask_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer named on the command line.

    Args:
        name_or_path: `char`, `word` and `bpe` are built from `texts()`, `byte` from nothing; they are kept under
            `cache_dir`. `text8` is that data set's alphabet. Any other name is looked for as `$DATA_DIR/<folder>`, as a
            path, and on the Hub.
        texts: returns the train split.
        content: returns the fingerprint of these texts; None reads them for it.
        vocab_size: number of all ids, special ones included; required for `bpe`, optional for `word` (None: every
            word).
        mask_token: the token that is the mask, if the tokenizer does not declare one (None: add one).

    Raises:
        ValueError: a setting does not apply.
        FileNotFoundError: nothing is found.
    """
    if not name_or_path or not isinstance(name_or_path, str):
        raise ValueError(f"{_KEY}={name_or_path!r}: give {', '.join(BUILDERS)}, text8, a folder, or a name on the Hub")
    if vocab_size is not None and name_or_path not in ("word", "bpe"):
        raise ValueError(
            f"data.vocab_size={vocab_size} applies to {_KEY}=word and bpe; with {name_or_path} leave it null"
        )
    if folder is not None and name_or_path in (*BUILDERS, "text8"):
        raise ValueError(
            f"data.tokenizer_folder={folder} is for tokenizers that are files; leave it out with {_KEY}={name_or_path}"
        )
    if name_or_path in BUILDERS:
        tokenizer = _load_built(name_or_path, texts, content, vocab_size, cache_dir)
    elif name_or_path == "text8":
        tokenizer = text8()
    else:
        tokenizer = _load_pretrained(name_or_path, folder or _FOLDERS.get(name_or_path))
    if mask_token is not None:
        _set_mask(tokenizer, mask_token, name_or_path)
    tokenizer.model_max_length = _ALL  # the limit is model.length; the tokenizer's own one only causes warnings
    return tokenizer


def _load_pretrained(name: str, folder: str | None) -> PreTrainedTokenizerBase:
    path = _located(name, folder)
    if path is not None:
        _refuse_sentencepiece(name, path)
    try:
        if path is not None:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        else:
            with quick_when_offline():
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        encode(tokenizer, ["a"])  # some invalid vocabularies only fail here
    except Exception as error:  # transformers raises many types, none of them for users
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise ValueError(
                f"{_KEY}={name}: the tokenizer is code of its own (auto_map in tokenizer_config.json), which is not "
                "run here. If a tokenizer.json beside it holds the same tokenizer, copy the folder, remove auto_map "
                'from its tokenizer_config.json and set "tokenizer_class": "PreTrainedTokenizerFast" there'
            ) from error
        if path is not None:
            reason = f"cannot be read ({type(error).__name__}: {excerpt(error)})"
            raise ValueError(f"{_KEY}={name}: the tokenizer in {path} {reason}; {_expected(path)}") from error
        raise FileNotFoundError(
            f"{not_found_message(_KEY, name, folder)} ({type(error).__name__}: {excerpt(error)})"
        ) from error
    check_not_empty(tokenizer, f"{_KEY}={name}", path)
    return tokenizer


def _located(name: str, folder: str | None) -> Path | None:
    """Return the local folder, or None for a name on the Hub. Raises FileNotFoundError, or ValueError for a file."""
    path = local_folder(folder)
    if path is None and Path(name).expanduser().exists():
        path = Path(name).expanduser()
        path = path.parent if path.name == "tokenizer.json" else path
    if path is None and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"{_KEY}={name}: there is no such folder; correct the path")
    if path is not None and not path.is_dir():
        raise ValueError(f"{_KEY}={name} is a file; give the folder that it lies in: {_KEY}={path.parent}")
    if path is not None:
        check_regular(path)
    return path


def check_not_empty(tokenizer: PreTrainedTokenizerBase, setting: str, path: Path | None) -> None:
    """Refuse a tokenizer without words, which transformers makes, without a warning, of a model's folder that has no
    vocabulary file.

    Args:
        setting: what was typed.
        path: the folder, None on the Hub.

    Raises:
        ValueError: fewer than two of its tokens are ordinary ones.
    """
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise ValueError(
            f"{setting}: its tokenizer is empty, so that every text would be unknown tokens or none; {_expected(path)}"
        )


def _refuse_sentencepiece(name: str, path: Path) -> None:
    models = sorted(file.name for file in path.glob("*.model"))
    if models and not (path / "tokenizer.json").exists() and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{_KEY}={name}: {path} has only the SentencePiece model {models[0]}, and the package that reads it is not "
            "installed: pip install sentencepiece, or name a folder with a tokenizer.json"
        )


def _expected(path: Path | None) -> str:
    """Say which files a folder needs, and which it has."""
    if path is None:
        return f"its place on the Hub needs {_FILES}"
    names = sorted(file.name for file in path.iterdir())
    for file in filter(Path.is_file, (path / name for name in names)):
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                return f"{file.name} is only a pointer of Git LFS: fetch the file itself (git lfs pull)"
    there = f"{', '.join(names[:8])}{' and others' if len(names) > 8 else ''}" if names else "nothing"
    return f"a folder needs {_FILES}; {path} has {there}"


def _load_built(
    kind: str,
    texts: Callable[[], Iterable[str]] | None,
    content: Callable[[], str] | None,
    vocab_size: int | None,
    cache_dir: str | Path,
) -> PreTrainedTokenizerBase:
    smallest = {"bpe": 256, "word": 1}.get(kind, 0) + len(SPECIALS)
    if kind == "bpe" and vocab_size is None:
        raise ValueError(f"data.vocab_size=null: {_KEY}=bpe needs a size, such as data.vocab_size=8192")
    if vocab_size is not None and vocab_size < smallest:
        raise ValueError(f"data.vocab_size={vocab_size} is too small for {_KEY}={kind}; give {smallest} or more")
    if texts is None and kind != "byte":
        raise ValueError(f"{_KEY}={kind} is built from the train split, and there is none here")
    read = None if kind == "byte" else content() if content else texts_fingerprint(texts())

    def build(folder: Path) -> None:
        tokenizer = BUILDERS[kind]([] if kind == "byte" else texts(), vocab_size or _ALL)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIALS
        ).save_pretrained(folder)

    settings = {"kind": kind, "vocab_size": vocab_size, "texts": read, "code": _CODE_VERSION}
    folder, _ = cached_folder(cache_dir, f"tokenizer-{kind}", settings, build)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _set_mask(tokenizer: PreTrainedTokenizerBase, token: str, name: str) -> None:
    """Make `token` the mask. Raises ValueError if it is not in the vocabulary, has another role, or is a word."""
    setting, known = f"data.mask_token={token}", tokenizer.get_vocab()
    if tokenizer.mask_token not in (None, token):
        raise ValueError(f"{setting}: the mask of {_KEY}={name} is {tokenizer.mask_token}; leave data.mask_token null")
    if token not in known:
        close = difflib.get_close_matches(token, [word for word in known if not word.isalnum()], n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{setting} is not in the vocabulary of {_KEY}={name}{guess} (null: a mask is added to the vocabulary)"
        )
    roles = {role: value for role, value in tokenizer.special_tokens_map.items() if role != "mask_token"}
    taken = next((role for role, value in roles.items() if str(value) == token), None)
    if taken is not None:
        raise ValueError(f"{setting} is already the {taken} of {_KEY}={name}; name another token, or null")
    tokenizer.add_special_tokens({"mask_token": token})
    text = tokenizer.decode([known[token]])
    if any(known[token] in ids for ids in encode(tokenizer, [token, text, f"a {text} b", f"a{text}b"])):
        raise ValueError(f"{setting} is a word that texts may hold; name a special token, or null")


# -------------------------------------------------------------------------------- encoding and decoding


def published_frame(tokenizer: PreTrainedTokenizerBase, known: Vocabulary) -> Vocabulary:
    """Return `known` with the begin and end token that the reference projects put into wrapped text.

    They are the first id of each token's own encoding, so a tokenizer that frames every text (bert) ends texts with
    [CLS].
    """
    names = (tokenizer.bos_token or tokenizer.cls_token, tokenizer.eos_token or tokenizer.sep_token)
    if None in names:
        raise ValueError(
            f"data.protocol=reference: {_KEY}={tokenizer.name_or_path} lacks a begin or an end token; choose another "
            "tokenizer, or leave out data.protocol"
        )
    bos_id, eos_id = (tokenizer.encode(name)[0] for name in names)
    return replace(known, bos_id=bos_id, eos_id=eos_id)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_from_text: bool = False
) -> list[list[int]]:
    """Return the token ids of each text, without begin or end token.

    The names of special tokens in a text are ordinary characters, unless `special_from_text`.
    """
    if not texts:
        return []
    settings = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenized(tokenizer, list(texts), split_special_tokens=not special_from_text, **settings)["input_ids"]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str], **settings: object) -> BatchEncoding:
    """Return tokenizer(texts, **settings), with a time limit if its tokenizer.json has regular expressions. Raises
    ValueError if an expression gave up, or the texts took more processor time than the limit."""
    if tokenizer not in _HAVE_PATTERNS:
        _check_ids(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        described = backend.to_str() if isinstance(backend, Tokenizer) else ""
        if described:
            _check_growth(json.loads(described), tokenizer.name_or_path)
        _HAVE_PATTERNS[tokenizer] = '"Regex"' in described
    if not _HAVE_PATTERNS[tokenizer]:
        return tokenizer(texts, **settings)
    outcome: list[BatchEncoding | BaseException] = []

    def work() -> None:
        try:
            outcome.append(tokenizer(texts, **settings))
        except BaseException as error:  # a panic of the library is not an Exception
            outcome.append(error)

    limit = time.process_time() + _SECONDS + _SECONDS_PER_CHARACTER * sum(map(len, texts))
    thread = threading.Thread(target=work, daemon=True)  # it cannot be stopped, and the program does not wait for it
    thread.start()
    while thread.is_alive() and time.process_time() < limit:
        thread.join(1.0)
    if outcome and not isinstance(outcome[0], BaseException):
        return outcome[0]
    if outcome and type(outcome[0]).__name__ != "PanicException":
        raise outcome[0]
    raise ValueError(
        f"{_KEY}={tokenizer.name_or_path}: a regular expression in its tokenizer.json takes too long on these texts "
        f"({outcome[0] if outcome else 'the time is up'}); choose another tokenizer"
    )


def encode_after(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that continue another text.

    Some tokenizers (word, sentencepiece) prepend a space to a text's first word, which is left out here. No token spans
    the boundary, so the preceding text has the same ids as on its own.
    """
    before = encode(tokenizer, [_BEFORE])[0]
    alone, continued = encode(tokenizer, texts), encode(tokenizer, [_BEFORE + text for text in texts])
    return [
        whole[len(before) :] if whole[: len(before)] == before else ids
        for ids, whole in zip(alone, continued, strict=True)
    ]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], *, skip_special: bool = False) -> str:
    """Return the text of ids; a mask shows as MASK_SYMBOL, an id outside the vocabulary as the replacement character.

    Other special tokens (begin, end, padding) show by name, or are left out with `skip_special`.
    """
    return "".join(whole for _, whole in _runs(tokenizer, ids, skip_special))


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """Return one string per id, which together form `decode` of the ids (except for bert's clean-up of "' s").

    A character made of several tokens is at the last one; the others are empty.
    """
    return [piece for pieces, _ in _runs(tokenizer, ids, skip_special=False) for piece in pieces]


def hidden_special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens that do not stand for text: all but the unknown word."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return frozenset(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - set(ends))


@dataclass(frozen=True)
class _Display:
    """Settings of a tokenizer for showing ids as text.

    Attributes:
        known, special: ids; `special` includes the mask.
        anchor: an ordinary token to decode a run after, because decoders treat the start of a text differently.
        gap: what separates words, a space or nothing.
    """

    known: frozenset[int]
    special: frozenset[int]
    mask_id: int
    anchor: list[int]
    gap: str


@lru_cache(maxsize=8)
def _display(tokenizer: PreTrainedTokenizerBase) -> _Display:
    known = frozenset(tokenizer.get_vocab().values())
    mask_id = max(known) + 1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id
    special = frozenset(tokenizer.all_special_ids) | {mask_id}
    common = [ids[-1] for ids in encode(tokenizer, [" a", " the", " e"]) if ids]
    words = (i for i in (*common, *sorted(known)) if i not in special and tokenizer.decode([i]).strip().isalpha())
    anchor = list(itertools.islice(words, 1))
    once = tokenizer.decode(anchor).strip()
    twice = tokenizer.decode(anchor * 2).strip()
    return _Display(known, special, mask_id, anchor, " " if twice == f"{once} {once}" else "")


def _runs(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], skip_special: bool
) -> Iterable[tuple[list[str], str]]:
    """Yield maximal runs of ordinary ids, and single special ids between them, as (strings of the ids, whole text)."""
    display = _display(tokenizer)
    run: list[int] = []
    before: list[int] = []  # empty at the start of the text
    for i in [*map(int, ids), None]:
        if i is not None and i in display.known and i not in display.special:
            run.append(i)
            continue
        if run:
            yield _pieces(tokenizer, run, before), _continued(tokenizer, before, run)
            run, before = [], display.anchor
        if i is None:
            return
        text, is_content = _symbol(tokenizer, display, i)
        text = (display.gap if before else "") + text if is_content else "" if skip_special else text
        yield [text], text
        before = display.anchor if is_content else before


def _symbol(tokenizer: PreTrainedTokenizerBase, display: _Display, i: int) -> tuple[str, bool]:
    """Return how a special id is shown, and whether it stands for text."""
    if i == display.mask_id:
        return MASK_SYMBOL, True
    if i not in display.known:
        return ILLEGAL_SYMBOL, True
    is_unknown = i == tokenizer.unk_token_id and i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer.convert_ids_to_tokens(i), is_unknown


def _continued(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """Return the text that `ids` add after `before`."""
    return tokenizer.decode(before + ids).removeprefix(tokenizer.decode(before) if before else "")


def _pieces(tokenizer: PreTrainedTokenizerBase, run: list[int], anchor: list[int]) -> list[str]:
    """Return the text of each id of a run. A few ids before each one suffice as its context."""
    pieces: list[str] = []
    context, waiting = anchor, []
    for i in run:
        text = _continued(tokenizer, context, [*waiting, i])
        if text.endswith(ILLEGAL_SYMBOL) and len(waiting) < 8:  # the first bytes of a character
            waiting.append(i)
            pieces.append("")
            continue
        pieces.append(text)
        context, waiting = [*waiting, i], []
    if waiting:
        pieces[-1] = _continued(tokenizer, context, waiting)
    return pieces


def tokenizer_from_record(record: Mapping[str, object], fingerprint: str | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a checkpoint (training/record.py).

    None if the checkpoint only has the tokens, or if what it has makes a tokenizer of another `fingerprint`.
    """
    content = record.get("tokenizer.json")
    if not isinstance(content, str):
        return None
    special = {str(role): str(token) for role, token in dict(record.get("special") or {}).items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content), name_or_path=str(record.get("name_or_path")), **special
    )
    return tokenizer if vocabulary(tokenizer).fingerprint == fingerprint else None
