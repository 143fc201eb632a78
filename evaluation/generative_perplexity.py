"""Generative perplexity: the perplexity of texts under another, causal language model.

The texts are re-tokenised with the scorer's own tokenizer, so tokens here are the scorer's. Repetition lowers the
number, so evaluation/sample_quality.py always reports diversity too.

Shape suffixes: B batch of windows, L length, V the scorer's vocabulary, M texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palimpsest.common.files import check_regular
from palimpsest.common.metrics import Estimate, Units, ratio
from palimpsest.data.hub import local_folder, not_found_message, quick_when_offline
from palimpsest.data.tokenizers import check_not_empty, encode
from palimpsest.training.callbacks.progress import Meter

KEY = "eval.gen_ppl_eval_model_name_or_path"
_ALL = 2**31
_MOST_UNUSED = 1024  # rows of an embedding beyond the tokenizer's ids, which round its size up


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, evaluated together; those from `first` on are scored."""

    start: int
    stop: int
    first: int


def windows(num_tokens: int, context: int | None) -> list[Window]:
    """Return windows of at most `context` tokens (None: no limit), each half a context after the last.

    Every token but the first of the text is scored once, in the first window that holds it. In later windows at least
    half a context precedes it.

    Raises ValueError for a context of fewer than two tokens.
    """
    if context is not None and context < 2:
        raise ValueError(f"a context of {context} tokens leaves nothing to predict from")
    if context is None or num_tokens <= context:
        return [Window(0, num_tokens, 1)]
    found = [Window(0, context, 1)]
    while found[-1].stop < num_tokens:
        start = found[-1].start + context // 2
        found.append(Window(start, min(start + context, num_tokens), found[-1].stop))
    return found


@dataclass(frozen=True)
class GenerativePerplexity:
    """Generative perplexity of a set of texts."""

    nats_per_token: Estimate  # error over texts; nan without scored tokens
    texts: int  # scored texts
    tokens: int  # scored tokens
    left_out: int  # texts without a token to score, such as empty ones
    protocol: dict[str, object]  # must be equal for two such numbers to be comparable

    @property
    def perplexity(self) -> Estimate:
        """exp of the nats per token."""
        return self.nats_per_token.exp()


@dataclass(frozen=True)
class TextScores:
    """nats_M: -log p(text), float64. tokens_M: scored tokens of each text; 0 for an empty text."""

    nats_M: np.ndarray
    tokens_M: np.ndarray

    def summary(self, protocol: dict[str, object], units: Units | None = None) -> GenerativePerplexity:
        """Return nats per token of the texts with scored tokens; errors are over `units` (None: each text)."""
        scored_M = self.tokens_M > 0
        units = Units.each(np.arange(len(scored_M))) if units is None else units
        nats = Estimate(float("nan"), float("nan"))
        if scored_M.any():
            nats = ratio(self.nats_M[scored_M], self.tokens_M[scored_M], units[scored_M])
        texts = int(scored_M.sum())
        return GenerativePerplexity(nats, texts, int(self.tokens_M.sum()), len(scored_M) - texts, protocol)


class CausalScorer:
    """A causal language model with its tokenizer, which scores texts.

    Args:
        model: predicts token i + 1 from the tokens up to i.
        tokenizer: the one the model was trained with.
        name: as the user typed it, for messages and results.
        batch_size: windows scored at once; it changes speed and memory, not the scores.

    Raises ValueError if the tokenizer is not the model's, or the model sees the tokens that it predicts.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int = 8
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        self._bos: int | None = tokenizer.bos_token_id
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        tokenizer.model_max_length = _ALL  # long texts are windowed here; the tokenizer's own limit only warns
        self._check_tokenizer()
        self._check_causal()

    @classmethod
    def load(
        cls,
        name_or_path: str,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load the scorer `$DATA_DIR/<name>` if that exists, else from a folder, else from the Hub.

        Loads weights from safetensors only, and no code.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the model cannot be used, or the class's own checks fail.
        """
        if not name_or_path or not isinstance(name_or_path, str):
            raise ValueError(f"{KEY}={name_or_path!r}: give a folder or a name on the Hub, such as gpt2-large")
        model, tokenizer = _load(name_or_path, _folder(name_or_path), dtype)
        return cls(model.to(device), tokenizer, name_or_path, batch_size)

    def to(self, device: torch.device) -> Self:
        """Move the network; return the scorer."""
        self.model.to(device)
        return self

    @property
    def protocol(self) -> dict[str, object]:
        """Settings that must be equal for two generative perplexities to be comparable."""
        first = "not scored: the scorer has no begin token" if self._bos is None else "scored after the begin token"
        return {
            "scorer": self.name, "revision": getattr(self.model.config, "_commit_hash", None),
            "dtype": str(self.model.dtype).removeprefix("torch."), "first_token": first, "context": self.context,
            "stride": None if self.context is None else self.context // 2,
        }  # fmt: skip

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> TextScores:
        """Return -log p of each text in nats.

        The first token is predicted from the scorer's begin token (BOS); without one, it is not scored. No end token is
        added, and special tokens spelled out in a text are read as characters.

        Raises ValueError if a text has token ids that the network does not know.
        """
        prefix = [] if self._bos is None else [self._bos]
        rows = [prefix + ids for ids in encode(self.tokenizer, texts)]
        self._check_ids(rows)
        todo = [(m, w) for m, ids in enumerate(rows) for w in windows(len(ids), self.context) if w.stop > w.first]
        todo.sort(key=lambda item: item[1].start - item[1].stop)  # equal lengths together, the largest batch first
        nats_M = np.zeros(len(rows))
        meter = Meter("generative perplexity", len(todo))
        for at in range(0, len(todo), self.batch_size):
            batch = todo[at : at + self.batch_size]
            nats = self._nats([(rows[m][w.start : w.stop], w.first - w.start) for m, w in batch])
            np.add.at(nats_M, [m for m, _ in batch], nats)
            meter.update(min(at + self.batch_size, len(todo)))
        meter.close()
        return TextScores(nats_M, np.array([max(len(ids) - 1, 0) for ids in rows], dtype=np.int64))

    def perplexity(self, texts: Sequence[str], units: Units | None = None) -> GenerativePerplexity:
        """Return the generative perplexity of `texts`; errors are over `units` (None: each text)."""
        return self.score(texts).summary(self.protocol, units)

    def _nats(self, batch: Sequence[tuple[list[int], int]]) -> list[float]:
        """Return the nats of each row's tokens from its second entry on; padding on the right has no effect."""
        rows = [torch.tensor(ids, device=self.model.device) for ids, _ in batch]
        ids_BL = pad_sequence(rows, batch_first=True)
        logits_BLV = self._logits(ids_BL, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True))
        wide = torch.promote_types(logits_BLV.dtype, torch.float32)
        sums = []
        for b, (ids, first) in enumerate(batch):  # row by row: a batch of log-softmaxes would double the peak memory
            logits_LV = logits_BLV[b, first - 1 : len(ids) - 1].to(wide)
            nats_L = F.cross_entropy(logits_LV, ids_BL[b, first : len(ids)], reduction="none")
            sums.append(nats_L.double().sum())
        return torch.stack(sums).tolist()

    def _logits(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits

    def _check_tokenizer(self) -> None:
        """Check that tokenizer and network have the same ids, except for unused rows of the embedding."""
        known = max(self.tokenizer.get_vocab().values()) + 1
        missing = [i for i in (self.tokenizer.vocab_size - 1, self._bos) if i is not None and i >= self._vocab_size]
        unused = self._vocab_size - known
        if missing or unused > max(_MOST_UNUSED, self._vocab_size // 20):
            raise ValueError(
                f"{KEY}={self.name}: its tokenizer has {known} ids and its network {self._vocab_size}, which "
                "do not match; put the tokenizer files of this very model beside its weights"
            )

    def _check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        top = max((i for ids in rows for i in ids), default=0)
        if top >= self._vocab_size:
            raise ValueError(
                f"{KEY}={self.name}: its tokenizer gives the id {top} "
                f"({self.tokenizer.convert_ids_to_tokens(top)!r}), its network has {self._vocab_size} ids; "
                "put the tokenizer files of this very model beside its weights"
            )

    @torch.inference_mode()
    def _check_causal(self) -> None:
        """Check that no prediction depends on later tokens: encoders (bert) load as well, and would see the answers."""
        ids_BL = torch.zeros(2, 4, dtype=torch.int64, device=self.model.device)
        ids_BL[1, -1] = 1
        logits_BLV = self._logits(ids_BL, torch.ones_like(ids_BL))[:, :-1].double()
        if not torch.allclose(logits_BLV[0], logits_BLV[1], rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{KEY}={self.name} is no causal language model: its prediction of a token depends on that token; "
                "choose a causal one, such as gpt2-large"
            )


def _folder(name: str) -> Path | None:
    """Return the local folder of that name; None if it must be the Hub's."""
    path = local_folder(name)
    if path is None and Path(name).expanduser().is_dir():
        path = Path(name).expanduser()
    if path is None and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise FileNotFoundError(f"{KEY}={name}: there is no such folder; correct the path")
    if path is not None:
        check_regular(path)
    return path


def _load(name: str, path: Path | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, local = (name, False) if path is None else (str(path), True)
    safe = {"trust_remote_code": False, "local_files_only": local}
    try:
        with quick_when_offline():
            tokenizer = AutoTokenizer.from_pretrained(source, **safe)
            model, info = AutoModelForCausalLM.from_pretrained(
                source, **safe, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # transformers raises many types, none of them for users
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
        if path is None:
            raise FileNotFoundError(f"{not_found_message(KEY, name, name)} ({reason})") from error
        raise ValueError(
            f"{KEY}={name}: the folder {path} holds no causal language model that can be read ({reason}); "
            "it needs config.json, model.safetensors, tokenizer.json and tokenizer_config.json"
        ) from error
    check_not_empty(tokenizer, f"{KEY}={name}", path)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{KEY}={name}: its file of weights lacks {some} ({len(info['missing_keys'])} in all), which would be "
            "random; give a complete causal language model"
        )
    return model, tokenizer
