"""backbone=hf_causal: any causal language model of the transformers library, for parameterization=ar.

Its weights come from safetensors files alone, and no code comes with them. The embedding and the head get the rows that
the data's vocabulary asks for.

Shape suffixes: B batch, L length, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from models.attention import resolve_backend
from models.checkpoints import Checkpoint, read_settings
from models.kv_cache import Room

KEY = "backbone.name_or_path"
CONFIG = "backbone.config"  # in what a checkpoint knows: the config.json it was built from, which outlives the folder
_FILES = "config.json and model.safetensors"
_MOST_ADDED = 64  # ids of the data beyond the network's: the mask and a few special tokens
_MOST_UNUSED = 1024  # rows of the network beyond the data's ids: rounding up to a multiple stays far below
_DROPOUT = re.compile(r"(dropout|pdrop)(_prob)?$")
_NOT_OURS = re.compile(r"classifier|summary")  # rates of other heads
# attn_backend -> the library's name; None: its own choice, sdpa where the model has it.
_ATTENTION = {"sdpa": None, "flash_attn": "flash_attention_2"}


class TrunkCache(Room):
    """The library's cache of keys and values, with the room that was asked for. For sampling, under `no_grad`."""

    def __init__(self, config: PretrainedConfig, batch_size: int, capacity: int) -> None:
        self.past = DynamicCache(config=config)
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0


class HFCausal(nn.Module):
    """tokens -> logits of the token after each, in two steps: `encode(tokens_BL)`, then `head(hidden)` where needed.

    The noise level and the padding mask are taken because every backbone is called with them, and change nothing:
    there is no noise, and causal attention never looks at padding, which stands on the right. Positions start at 0.

    Args:
        config: of the published model, as its config.json has it.
        vocab_size: ids of the data, the mask included; rows of the embedding and of the head.
        name: where the pretrained weights lie, as the user typed it; None for a network that has none to start from.
        dropout: in place of every rate that `config` says; None leaves them.
        attn_backend: sdpa or flash_attn.

    Raises:
        ValueError: there is no such architecture, it is not causal, or it computes its logits by more than a linear
            head.
    """

    causal, encodes_positions, num_classes = True, False, 0

    def __init__(
        self,
        config: PretrainedConfig,
        vocab_size: int,
        name: str | None = None,
        dropout: float | None = None,
        attn_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.name, self._described = name, config.to_json_string(use_diff=False)
        config = copy.deepcopy(config)
        config.get_text_config().vocab_size = vocab_size
        if dropout is not None:
            _set_dropout(config, dropout)
        attention = _ATTENTION[resolve_backend(attn_backend)]
        try:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"backbone=hf_causal can not build a {config.model_type} ({_first_line(error)})"
            ) from error
        self._forget_padding()
        self._check_waist()

    def _forget_padding(self) -> None:
        """Which id pads rows is the data's affair: here it may be that of the end token, which is learned."""
        self.model.config.pad_token_id = None
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    @property
    def head(self) -> nn.Linear:
        """The vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.model.get_output_embeddings()

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated part of the network, as the library names it; empty where it does not say."""
        names = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in names]

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What training.freeze can name; where embedding and head are one matrix, both are frozen with either."""
        return {"embeddings": [self.model.get_input_embeddings()], "blocks": self.blocks, "head": [self.head]}

    def recompute_blocks(self) -> None:
        """Gradient checkpointing (models/recompute.py), by the library's own switch.

        Raises:
            ValueError: the architecture has none.
        """
        if not self.model.supports_gradient_checkpointing:
            raise ValueError(
                f"training.gradient_checkpointing=true: a {self.model.config.model_type} model of transformers can not "
                "compute its blocks again; leave it out"
            )
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    @property
    def settings(self) -> dict[str, object]:
        """What the network was built with, keys as on the command line."""
        return {**_sizes(self.model.config.get_text_config()), CONFIG: self._described}

    def pretrained(self) -> Checkpoint | None:
        """The weights that a new training starts from; None where it starts from random ones. Rows that the published
        model does not have are the mean of those it has; rows beyond the data's ids are left out.

        Raises:
            FileNotFoundError: the model is nowhere.
            ValueError: what is there can not be used.
        """
        if self.name is None:
            return None
        loaded = _load_weights(self.name)
        rows = loaded.config.get_text_config().vocab_size
        ours = self.model.state_dict()
        state = {
            f"model.{name}": _with_rows(tensor, self.vocab_size)
            if name in ours and tensor.shape != ours[name].shape and tensor.shape[:1] == (rows,)
            else tensor
            for name, tensor in loaded.state_dict().items()
        }
        return Checkpoint(Path(self.name), state)

    def new_cache(self, batch_size: int, length: int) -> TrunkCache:
        """An empty cache for `length` positions.

        Raises:
            ValueError: this architecture keeps something other than keys and values.
        """
        if "past_key_values" not in inspect.signature(self.model.base_model.forward).parameters:
            raise ValueError(
                f"a {self.model.config.model_type} model has no cache of keys and values: use sampling.kv_cache=false"
            )
        return TrunkCache(self.model.config, batch_size, length)

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TrunkCache | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D), ready for `head`: position i has seen the tokens up to i.

        With `cache`, `tokens_BL` follow the `cache.length` tokens that went before; they are added to it. The result
        is that of one pass over all tokens, at the new ones.

        Raises:
            ValueError: the cache has no room for the tokens, or was made for another batch size.
        """
        if cache is None:
            return self.model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        cache.check_room(tokens_BL)
        hidden_BLD = self.model.base_model(
            input_ids=tokens_BL, past_key_values=cache.past, use_cache=True
        ).last_hidden_state
        cache.length += tokens_BL.shape[1]
        return hidden_BLD

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V)."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))

    @torch.no_grad()
    def _check_waist(self) -> None:
        """Try on two tokens that `head(encode(x))` is all there is: the model's own forward pass gives its head what
        `encode` gives, does nothing to what the head answers, and a token's prediction does not hang on the next one.
        An encoder (bert) builds without a complaint and would be given the answers."""
        kind = self.model.config.model_type
        if not isinstance(self.head, nn.Linear) or self.model.base_model is self.model:
            raise ValueError(f"backbone=hf_causal: a {kind} model has no linear head on a trunk; choose another")
        if self.head.weight.is_meta:
            return
        given: list[Tensor] = []
        ids_BL = torch.tensor([[0, 0], [0, 1]])
        answer_BLV = torch.linspace(-100, 100, ids_BL.numel() * self.vocab_size).view(2, 2, self.vocab_size)
        self.eval()
        hidden_BLD = self.encode(ids_BL)
        hook = self.head.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]) or answer_BLV)
        logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        hook.remove()
        self.train()
        if not _close(hidden_BLD[0, 0], hidden_BLD[1, 0]):
            raise ValueError(
                f"backbone=hf_causal: a {kind} model is no causal language model, what it computes for a token depends "
                "on the tokens after it; choose one that reads from left to right, such as gpt2"
            )
        if not (given and _close(given[0], hidden_BLD) and torch.equal(logits_BLV, answer_BLV)):
            raise ValueError(
                f"backbone=hf_causal: the logits of a {kind} model are not its linear head's (they are scaled, capped "
                "or transformed), which the losses here rely on; choose another, such as gpt2 or a llama"
            )


def hf_causal(
    vocab_size: int,
    length: int,
    name_or_path: str | None = None,
    from_scratch: bool = False,
    checkpoint_path: str | None = None,
    resumed: str | None = None,
    from_pretrained: str | None = None,
    hidden_size: int | None = None,
    n_blocks: int | None = None,
    n_heads: int | None = None,
    dropout: float | None = None,
    attn_backend: str = "sdpa",
) -> HFCausal:
    """The architecture of a causal language model with random weights; `HFCausal.pretrained` has those to start from.

    `name_or_path` is `$DATA_DIR/<name>` where that exists, else a folder, else a name on the Hub. The first given of
    `checkpoint_path`, `resumed` and `from_pretrained` that is a checkpoint of such a network says the architecture
    instead, so that it outlives the folder. Sizes are None unless typed; typed ones must be the model's. `vocab_size`
    and `length` are those of the data.

    Raises:
        FileNotFoundError: a file or the model is not there.
        ValueError: no model is named, or it contradicts the data or what was typed.
    """
    if name_or_path is not None and not (isinstance(name_or_path, str) and name_or_path):
        raise ValueError(f"{KEY}={name_or_path!r}: give a folder or a name on the Hub, such as gpt2")
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    config, said_by = _kept_config(files, name_or_path) or (None, f"{KEY}={name_or_path}")
    if config is None and name_or_path is None:
        raise ValueError(
            f"backbone=hf_causal is the network of a published model: name it with {KEY}= (a Hub id, a folder, or a "
            f"folder below $DATA_DIR that holds {_FILES}), or name a checkpoint that was trained with it"
        )
    config = config or _load_config(name_or_path)
    typed = {"model.hidden_size": hidden_size, "model.n_blocks": n_blocks, "model.n_heads": n_heads}
    _refuse_contradictions(config.get_text_config(), typed, vocab_size, length, said_by)
    return HFCausal(config, vocab_size, None if from_scratch else name_or_path, dropout, attn_backend)


def _kept_config(files: dict[str, str | None], name: str | None) -> tuple[PretrainedConfig, str] | None:
    """The config that the first of `files` with one was saved with, and what says so."""
    for key, path in files.items():
        known = read_settings(path, key).settings if path else {}
        if CONFIG not in known:
            continue
        theirs = known.get(KEY)
        if name not in (None, theirs):
            raise ValueError(f"{KEY}={name} contradicts {key}={path}, which was trained from {theirs}; leave it out")
        settings = json.loads(known[CONFIG])
        return type(AutoConfig.for_model(settings["model_type"])).from_dict(settings), f"{key}={path}"
    return None


def _refuse_contradictions(
    config: PretrainedConfig, typed: dict[str, int | None], vocab_size: int, length: int, said_by: str
) -> None:
    known = _sizes(config)
    differing = [f"{key}={value}" for key, value in typed.items() if value not in (None, known[key])]
    if differing:
        says = " ".join(f"{key}={value}" for key, value in known.items())
        raise ValueError(f"{' '.join(differing)} contradicts {said_by}, which has {says}; leave it out")
    rows = config.vocab_size
    if vocab_size > rows + _MOST_ADDED or vocab_size < rows - max(_MOST_UNUSED, rows // 20):
        raise ValueError(
            f"the data have {vocab_size} token ids (the mask included), but {said_by} has {rows}, so they do not "
            "belong together: set data.tokenizer_name_or_path to the tokenizer of that model"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and length > longest:
        raise ValueError(
            f"model.length={length} is longer than the {longest} positions of {said_by}; set model.length={longest} "
            "or less"
        )


def _sizes(config: PretrainedConfig) -> dict[str, int | None]:
    names = {"model.hidden_size": "hidden_size", "model.n_blocks": "num_hidden_layers",
             "model.n_heads": "num_attention_heads"}  # fmt: skip
    return {ours: getattr(config, theirs, None) for ours, theirs in names.items()}


def _set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Put `rate` in place of every dropout rate of the config.

    Raises:
        ValueError: it is no rate, or the model has no dropout to set.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"model.dropout={rate} must lie in [0, 1)")
    inner = config.get_text_config()
    names = [
        name
        for name, value in inner.to_dict().items()
        if _DROPOUT.search(name) and not _NOT_OURS.search(name) and isinstance(value, int | float)
    ]
    if rate and not names:
        raise ValueError(f"model.dropout={rate}: a {config.model_type} model has no dropout; leave it out")
    for name in names:
        setattr(inner, name, rate)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows, with the mean of all of them where there are fewer."""
    if rows <= len(tensor):
        return tensor[:rows]
    mean = tensor.mean(0, keepdim=True)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape[1:])])


def _load_config(name: str) -> PretrainedConfig:
    source, local = _source(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(name, source, local, error) from error


def _load_weights(name: str) -> PreTrainedModel:
    source, local = _source(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, local_files_only=local, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(name, source, local, error) from error
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"{KEY}={name}: its file of weights lacks {some} ({len(info['missing_keys'])} in all), which would be "
            "random; give a complete causal language model, or set backbone.from_scratch=true"
        )
    return model


def _source(name: str) -> tuple[str, bool]:
    """What the library is to open, and whether that is a folder here."""
    root = os.environ.get("DATA_DIR")
    folders = ([Path(root) / name] if root else []) + [Path(name).expanduser()]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"{KEY}={name}: there is no such folder; correct the path")
    return (name, False) if found is None else (str(found), True)


def _unusable(name: str, source: str, local: bool, error: Exception) -> ValueError | FileNotFoundError:
    if local:
        return ValueError(
            f"{KEY}={name}: the folder {source} holds no causal language model that can be read "
            f"({_first_line(error)}); it needs {_FILES}"
        )
    return FileNotFoundError(
        f"{KEY}={name} was not found: put {_FILES} into $DATA_DIR/{name} or another folder and name that, or make "
        f"{name!r} reachable on the Hugging Face Hub ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
