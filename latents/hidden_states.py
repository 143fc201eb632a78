"""latents=self: the mean hidden state of a text in a model of our own.

Shape suffixes: B rows at once, N rows, L length, W width of the hidden states.
"""

import hashlib
import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from torch import nn

from palimpsest.common.values import FREE, AtLeastOne, FilePath
from palimpsest.data.passages import Passages
from palimpsest.data.tokenizers import Vocabulary
from palimpsest.latents.encoder import Encoder
from palimpsest.models.checkpoints import Checkpoint, read_checkpoint
from palimpsest.models.class_conditioning import num_classes_of
from palimpsest.models.hf_dit import build

KEY = "latents.checkpoint_path"
_CODE_VERSION = 1  # increase it whenever a change below gives other vectors


class HiddenStates(Encoder):
    """Rows -> (N, W): the mean over a row's tokens, without padding, of the hidden states of the clean text (t = 0).

    Args:
        checkpoint_path: a `.ckpt` of our own or a model in the Hub's layout.
        dim: principal components that are kept, fitted on train; None: all.
        tokens: equal parts into which a vector is divided.
        disable_ema: use the last weights instead of their average.
        batch_size: rows at once.
    """

    def __init__(
        self,
        checkpoint_path: FilePath | None,
        dim: AtLeastOne | None = 64,
        tokens: AtLeastOne = 1,
        disable_ema: bool = False,
        batch_size: Annotated[AtLeastOne, FREE] = 64,
    ) -> None:
        if not checkpoint_path:
            raise ValueError(f"latents=self needs a trained model: {KEY}=outputs/.../last.ckpt")
        self.path, self.use_ema = checkpoint_path, not disable_ema
        self.batch_size = batch_size
        self.dim, self.tokens = dim, tokens
        self._vocab_size: int | None = None

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return read_checkpoint(self.path, KEY)

    @cached_property
    def identity(self) -> dict[str, object]:
        """Return everything that the vectors depend on: the weights in use."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {"encoder": "self", "code": _CODE_VERSION, "weights": digest.hexdigest()}

    @property
    def metadata(self) -> dict[str, object]:
        """Return the settings, for reports and files."""
        settings = {"checkpoint_path": self.path, "disable_ema": not self.use_ema}
        return {"encoder": "self", "pooling": "mean", "settings": settings}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Raise ValueError if the model was trained on other tokens, or on shorter rows."""
        known, tokenizer = self._checkpoint.settings, self._checkpoint.identity.get("tokenizer")
        if tokenizer not in (None, vocabulary.fingerprint):
            raise ValueError(
                f"{KEY}={self.path} was trained with another tokenizer than the data have, so that it would read other "
                f"words; use its data.tokenizer_name_or_path={known.get('data.tokenizer_name_or_path', '')}"
            )
        longest = known.get("model.length")
        if longest and length > longest:
            raise ValueError(
                f"{KEY}={self.path} was trained on {longest} tokens, and model.length={length} is more than it can "
                "read; lower model.length, or train an encoder on longer rows"
            )
        self._vocab_size = vocabulary.size

    @cached_property
    def network(self) -> nn.Module:
        """Return the network with its weights, on the GPU if there is one."""
        network = _network(self._checkpoint, self.path, self._vocab_size)
        self._checkpoint.load_into(network, self.use_ema)
        return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, passages: Passages) -> np.ndarray:
        """Return vectors (N, W), float32. Rows of similar length are read together."""
        lengths = np.array([len(ids) for ids in passages.ids])
        order = np.argsort(lengths, kind="stable")
        # A network that attends to padding would see the length of the other rows.
        sees_padding = not self.network.mask_padding and not self.network.causal
        groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if sees_padding else [order]
        batches = [group[start : start + self.batch_size]
                   for group in groups for start in range(0, len(group), self.batch_size)]  # fmt: skip
        return np.concatenate([self._encode([passages.ids[i] for i in batch]) for batch in batches])[np.argsort(order)]

    @torch.inference_mode()
    def _encode(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        device = next(self.network.parameters()).device
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], True)
        mask_BL = torch.arange(padded.shape[1], device=device) < lengths_B[:, None]
        sigma_B = torch.zeros(len(rows), device=device)
        hidden_BLW = self.network.encode(padded.to(device), sigma_B, mask_BL).float()
        return ((hidden_BLW * mask_BL[..., None]).sum(1) / lengths_B[:, None]).cpu().numpy()


def _network(checkpoint: Checkpoint, path: str, vocab_size: int) -> nn.Module:
    """Build the network that a checkpoint describes, with random weights."""
    known, prefix = checkpoint.settings, "backbone."
    settings = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
    module, _, name = str(settings.pop("_target_", "models.dit.")).rpartition(".")
    if not module.startswith("models.") or not module.replace(".", "").replace("_", "").isalnum():
        raise ValueError(f"{KEY}={path} names a network {module}.{name} of another project; use another checkpoint")
    if not name:
        sizes = ("vocab_size", "model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads")
        if missing := [key for key in sizes if key not in known]:
            raise ValueError(f"{KEY}={path} does not say {', '.join(missing)}; use a checkpoint trained here")
        return build({"model.dropout": 0.0, "time_conditioning": False, **known})
    kind = getattr(importlib.import_module(f"palimpsest.{module}"), name, None)
    is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not is_network and name != module.rpartition(".")[2]:  # a file may name anything, so allow nothing else
        raise ValueError(f"{KEY}={path} names {module}.{name}, which is no network; use another checkpoint")
    if not is_network:  # hf_dit, hf_causal: networks that a file describes
        settings = {key: value for key, value in settings.items() if not str(value).startswith("{")}  # its config.json
        settings |= {"checkpoint_path": path, "resumed": None, "from_pretrained": None}
    if number := num_classes_of(checkpoint.state):
        settings["num_classes"] = number
    if latents := checkpoint.identity.get("latents"):
        settings["latent_shape"] = tuple(latents["shape"])
    try:
        return kind(vocab_size=vocab_size, **settings)
    except TypeError as error:
        raise ValueError(f"{KEY}={path} names settings that {name} does not have ({error}); use another") from error
