"""backbone=hf_mlm: any masked language model of the transformers library (BERT, RoBERTa, ModernBERT, ...), fine-tuned
from its weights or trained from scratch in its architecture.

Its weights come from safetensors files alone, and no code comes with them. It reads both sides of a token and is told
no time: what is masked shows it how much is masked.

Shape suffixes: B batch, L length, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from palimpsest.common.values import FREE, LATER, BelowOne, FilePath, Length, Name, PresentPath, Size
from palimpsest.models import hf_published as published
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.hf_published import KEY

CONFIG, NEW_HEAD = "backbone.config", "backbone.new_head"
_KIND = published.Kind("hf_mlm", AutoModelForMaskedLM, "masked language model", f"{CONFIG}_json", added=0)
_WIDTHS = ("intermediate_size", "hidden_dim")  # of a block's inner layer, as the library's configurations call it


class HFMaskedLM(Backbone):
    """tokens -> logits of the token at each place, in two steps: `encode(tokens_BL)`, then `head(hidden)` where needed.

    `encode` is the library's whole forward pass with the last linear layer of its head taken out, so that the head's
    transform belongs to it; `head` is that layer, tied to the embedding where the model ties it. The noise level is
    taken because every backbone is called with it, and changes nothing.

    Args:
        config: of the published model, as its config.json has it.
        vocab_size: ids of the data, the mask included; rows of the embedding and of the head.
        name: where the pretrained weights lie, as the user typed it; None for a network that has none to start from.
        new_head: the weights are those of a body alone, and the head begins at random, its matrix the embedding.
        dropout: in place of every rate that `config` says; None leaves them.
        attn_backend: sdpa or flash_attn.

    Raises:
        ValueError: there is no such architecture, it does not read both sides, it does not hide padding, or it computes
            its logits by more than a linear layer at its end.
    """

    recomputes = True

    def __init__(
        self,
        config: PretrainedConfig,
        vocab_size: int,
        name: str | None = None,
        new_head: bool = False,
        dropout: float | None = None,
        attn_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.name, self.new_head, self._described = name, new_head, config.to_json_string(use_diff=False)
        config = copy.deepcopy(config)
        if config.is_encoder_decoder:
            _refuse(config, "it reads with one part and writes with another")
        _set_vocabulary(config, vocab_size)
        if dropout is not None:
            published.set_dropout(config, dropout)
        self.model: PreTrainedModel = published.build(_KIND, config, attn_backend)
        published.forget_padding(self.model)
        self._first_position = first_position(self.model)
        head = self.model.get_output_embeddings()
        taken = set(inspect.signature(self.model.forward).parameters)
        if not isinstance(head, nn.Linear) or "attention_mask" not in taken:
            _refuse(self.model.config, "it has no linear head on an encoder that can hide padding")
        self._gives_positions = self._first_position is not None and "position_ids" in taken
        given_BLD = self._given(head)
        self._head_path = next(path for path, module in self.model.named_modules() if module is head)
        parent, _, attribute = self._head_path.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, nn.Identity())
        self.head = head
        if given_BLD is not None:
            self._check_encode(given_BLD)
        self.train()

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    @property
    def knows_its_mask(self) -> bool:
        """Whether its weights have seen a mask already, so that the data's must be that one."""
        return self.name is not None

    @property
    def longest(self) -> int | None:
        """Tokens of a row, at most; None where the architecture sets no limit."""
        table = getattr(self.model.config, "max_position_embeddings", None)
        return None if not table or table < 0 else table - (self._first_position or 0)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated part of the network: the elements of its largest list of modules."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        largest = max(lists, key=lambda parts: sum(p.numel() for p in parts.parameters()), default=())
        return list(largest)

    def recompute_blocks(self) -> None:
        """Gradient checkpointing. Raises ValueError where the architecture has none."""
        published.recompute_blocks(self.model)

    @property
    def settings(self) -> dict[str, object]:
        """What the network was built with, keys as on the command line."""
        return {**published.sizes(self.model.config), _KIND.config_key: self._described}

    def pretrained(self) -> Checkpoint | None:
        """The weights that a new training starts from; None where it starts from random ones. Rows beyond the data's
        ids are left out. With `new_head` those of the head are the random ones that are here.

        Raises:
            FileNotFoundError: the model is nowhere.
            ValueError: what is there can not be used, lacks a head, or has one although `new_head` says otherwise.
        """
        if self.name is None:
            return None
        loaded = published.load_weights(_KIND, self.name)
        self._check_head(loaded)
        ours, rows = self.state_dict(), loaded.model.config.vocab_size
        state: dict[str, Tensor] = {}
        for theirs, tensor in loaded.model.state_dict().items():
            of_head = theirs.startswith(f"{self._head_path}.")
            name = f"head.{theirs.removeprefix(f'{self._head_path}.')}" if of_head else f"model.{theirs}"
            if name in ours and tensor.shape != ours[name].shape and tensor.shape[:1] == (rows,):
                tensor = published.with_rows(tensor, self.vocab_size)
            state[name] = ours[name].clone() if theirs in loaded.missing else tensor
        return Checkpoint(Path(self.name), state)

    def _check_head(self, loaded: published.Loaded) -> None:
        body = f"{loaded.model.base_model_prefix}."
        published.refuse_missing(_KIND, self.name, tuple(name for name in loaded.missing if name.startswith(body)))
        if loaded.missing and not self.new_head:
            raise ValueError(
                f"{KEY}={self.name}: its file of weights is that of a body without a head for masked tokens (it lacks "
                f"{', '.join(loaded.missing[:3])}; {len(loaded.missing)} in all); with {NEW_HEAD}=true a new head is "
                "trained, whose matrix is the embedding"
            )
        if self.new_head and not loaded.missing:
            raise ValueError(f"{NEW_HEAD}=true: {KEY}={self.name} has a head for masked tokens; leave it out")

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D), ready for `head`. Padding (False in `attention_mask`) is hidden, and stands on the
        right."""
        told: dict[str, Tensor] = {}
        if attention_mask is not None:
            told["attention_mask"] = attention_mask.long()
        if self._gives_positions:  # the library would count the tokens that are not of its padding's id
            place_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) + self._first_position
            told["position_ids"] = place_L.expand(tokens_BL.shape)
        return self.model(input_ids=tokens_BL, **told).logits

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V)."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))

    def _probe(self) -> Tensor:
        """Two rows of three tokens that differ in the last one."""
        first, second = self.model.config.vocab_size - 1, self.model.config.vocab_size - 2
        return torch.tensor([[first, second, first], [first, second, second]])

    @torch.no_grad()
    def _given(self, head: nn.Linear) -> Tensor | None:
        """What the untouched model gives its head for the probe; None where there are no numbers (device meta).

        Raises:
            ValueError: the head's answer is not the model's.
        """
        if head.weight.is_meta:
            return None
        given: list[Tensor] = []
        ids_BL = self._probe()
        answer_BLV = torch.linspace(-100, 100, ids_BL.numel() * head.out_features).view(*ids_BL.shape, -1)
        self.eval()
        hook = head.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]) or answer_BLV)
        try:
            logits_BLV = self.model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            _refuse(self.model.config, f"with these settings it does not run ({published.first_line(error)})")
        hook.remove()
        if len(given) != 1 or not torch.equal(logits_BLV, answer_BLV):
            _refuse(self.model.config, "its logits are not its linear head's (they are scaled, capped or transformed)")
        return given[0]

    @torch.no_grad()
    def _check_encode(self, given_BLD: Tensor) -> None:
        """Hold `encode` against what the untouched model gave its head, and try that tokens on the right are seen
        unless they are padding."""
        ids_BL = self._probe()
        hidden_BLD = self.encode(ids_BL)
        if not published.close(hidden_BLD, given_BLD):
            _refuse(self.model.config, "without its last linear layer it computes something else")
        if torch.equal(hidden_BLD[0, 0], hidden_BLD[1, 0]):
            _refuse(self.model.config, "it does not see what stands on the right (is_decoder)")
        beside_BLD = self.encode(ids_BL, attention_mask=torch.tensor([[True, True, False]]).expand(2, 3))
        if not published.close(beside_BLD[0, :2], beside_BLD[1, :2]):
            _refuse(self.model.config, "it does not hide padding")


def _refuse(config: PretrainedConfig, reason: str) -> NoReturn:
    raise ValueError(
        f"backbone=hf_mlm can not use a {config.model_type} model: {reason}; choose another, such as roberta-base"
    )


def first_position(model: PreTrainedModel) -> int | None:
    """The position of a row's first token in models that count from behind that of the padding (roberta); None where
    they begin at 0 or have no table."""
    tables = (getattr(module, "position_embeddings", None) for module in model.base_model.modules())
    padding = (table.padding_idx for table in tables if isinstance(table, nn.Embedding))
    return next((index + 1 for index in padding if index is not None), None)


def hf_mlm(
    vocab_size: int,
    length: Length,
    name_or_path: PresentPath | None = None,
    config: Name | None = None,
    from_scratch: bool = False,
    new_head: bool = False,
    checkpoint_path: FilePath | None = None,
    resumed: Annotated[FilePath, FREE] | None = None,
    from_pretrained: FilePath | None = None,
    hidden_size: Size | None = None,
    n_blocks: Size | None = None,
    n_heads: Size | None = None,
    dropout: BelowOne | None = None,
    mask_padding: Annotated[bool, LATER] | None = None,
    attn_backend: Annotated[Literal["sdpa", "flash_attn", "flex"], FREE] = "sdpa",
) -> HFMaskedLM:
    """The architecture of a masked language model with random weights; `HFMaskedLM.pretrained` has those to start from.

    `name_or_path` is `$DATA_DIR/<name>` where that exists, else a folder, else a name on the Hub. The first given of
    `checkpoint_path`, `resumed` and `from_pretrained` that is a checkpoint of such a network says the architecture
    instead, so that it outlives the folder. Sizes are None unless typed: with `from_scratch` they replace those of
    `config` (a name of the library's, such as roberta) or of the folder, else they must be the model's. `vocab_size`
    and `length` are those of the data.

    Raises:
        FileNotFoundError: a file or the model is not there.
        ValueError: no model is named, or it contradicts the data or what was typed.
    """
    if mask_padding is False:
        raise ValueError("model.mask_padding=false: backbone=hf_mlm always hides padding; leave it out")
    _check_flags(name_or_path, config, from_scratch, new_head)
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    named = f"{CONFIG}={config}" if config else f"{KEY}={name_or_path}"
    kept = published.kept_config(_KIND, files, {KEY: name_or_path, CONFIG: config})
    if kept is None and name_or_path is None and config is None:
        raise ValueError(
            f"backbone=hf_mlm is the network of a masked language model: name it with {KEY}= (a Hub id such as "
            f"roberta-base, a folder, or a folder below $DATA_DIR that holds {published.FILES}), or an architecture "
            f"with {CONFIG}=roberta backbone.from_scratch=true, or a checkpoint that was trained with it"
        )
    typed = {"model.hidden_size": hidden_size, "model.n_blocks": n_blocks, "model.n_heads": n_heads}
    if kept is None and from_scratch:
        built = _architecture(config) if config else published.load_config(_KIND, name_or_path)
        built = _sized(built, typed, vocab_size, length)
        return HFMaskedLM(built, vocab_size, None, False, dropout, attn_backend)
    found, said_by = kept or (published.load_config(_KIND, name_or_path), named)
    published.refuse_contradictions(_KIND, found, typed, vocab_size, said_by)
    if new_head:
        found.tie_word_embeddings = True
    net = HFMaskedLM(found, vocab_size, None if from_scratch else name_or_path, new_head, dropout, attn_backend)
    published.refuse_length(length, net.longest, said_by)
    return net


def _check_flags(name: str | None, config: str | None, from_scratch: bool, new_head: bool) -> None:
    """Raise ValueError for settings that can not all be meant."""
    if config is not None and (name is not None or not from_scratch):
        other = f"{KEY}={name}" if name is not None else "backbone.from_scratch=false"
        raise ValueError(
            f"{CONFIG}={config} is an architecture without weights, which {other} contradicts; set "
            f"backbone.from_scratch=true alone, or name a model with {KEY}= alone"
        )
    if new_head and from_scratch:
        raise ValueError(f"{NEW_HEAD}=true with backbone.from_scratch=true: there everything is new; leave it out")


def _architecture(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(name)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CONFIG}={name} is no architecture of transformers; give roberta, bert or another by its model_type"
        ) from error


def _sized(config: PretrainedConfig, typed: dict[str, int | None], vocab_size: int, length: int) -> PretrainedConfig:
    """`config` with the sizes that were typed (a block's inner layer keeps its ratio to the width), positions for
    `length` tokens and as many rows as the data have ids."""
    if not hasattr(config, "num_attention_heads"):
        _refuse(config, "it has no attention")
    width, heads = typed["model.hidden_size"] or config.hidden_size, typed["model.n_heads"]
    heads = heads or config.num_attention_heads
    if width % heads:
        raise ValueError(f"model.hidden_size={width} is no multiple of model.n_heads={heads}; give sizes that divide")
    for name in _WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, getattr(config, name) * width // config.hidden_size)
    config.hidden_size, config.num_attention_heads = width, heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = heads
    if typed["model.n_blocks"]:
        try:
            config.num_hidden_layers = typed["model.n_blocks"]
            kinds = getattr(config, "layer_types", None)  # of each block, in a pattern that repeats (ModernBERT)
            if kinds:
                config.layer_types = [kinds[block % len(kinds)] for block in range(typed["model.n_blocks"])]
        except NotImplementedError as error:
            raise ValueError(f"model.n_blocks={typed['model.n_blocks']}: {published.first_line(error)}") from error
    _set_vocabulary(config, vocab_size)
    if getattr(config, "max_position_embeddings", None):
        with torch.device("meta"):
            offset = first_position(published.build(_KIND, config, "sdpa")) or 0
        config.max_position_embeddings = length + offset
    return config


def _set_vocabulary(config: PretrainedConfig, vocab_size: int) -> None:
    """As many rows as the data have ids; what the library would do with ids beyond them is not done here."""
    config.vocab_size = vocab_size
    for name in ("bos", "eos", "cls", "sep", "pad"):
        if (getattr(config, f"{name}_token_id", None) or 0) >= vocab_size:
            setattr(config, f"{name}_token_id", None)
