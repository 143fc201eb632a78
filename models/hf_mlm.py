"""backbone=hf_mlm: any masked language model of the transformers library (BERT, RoBERTa, ModernBERT, ...), fine-tuned
from its weights or trained from scratch in its architecture.

Weights are read from safetensors files only, and no code of a model is run. The network reads both sides of a token and
is not conditioned on time: the masks show how much is masked.

Shape suffixes: B batch, L length, V vocabulary, D width.
"""

import copy
import inspect
from typing import Annotated, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from palimpsest.common.values import ADDED_LATER, FREE, BelowOne, FilePath, Length, Name, PresentPath, Size
from palimpsest.models import hf_published as published
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.class_conditioning import ClassEmbedding, ClassHead, unconditional, with_class
from palimpsest.models.hf_published import KEY

CONFIG, NEW_HEAD = "backbone.config", "backbone.new_head"
_KIND = published.Kind("hf_mlm", AutoModelForMaskedLM, "masked language model", f"{CONFIG}_json", added=0)
_CLASS_SCALE = 0.02  # standard deviation of a new class embedding, as of new layers of the transformers library
_WIDTHS = ("intermediate_size", "hidden_dim")  # names of the MLP width in the library's configurations


class HFMaskedLM(published.PublishedBackbone):
    """A published network that predicts the token at each position: `encode(tokens_BL)`, then `head(hidden)`.

    `encode` is the forward pass of the library without the last linear layer, so that it contains the transform of the
    library's head. `head` is that layer, tied to the embedding if the model ties it. The noise level, which every
    backbone takes, is ignored.

    Args:
        new_head: the weights have no head; the head starts at random, with the embedding as its matrix.
        num_classes: > 0 for a network that is told the class of each text: an embedding added to those of the tokens,
            and an output bias of each class.

    Raises:
        ValueError: there is no such architecture, it does not read both sides, it does not hide padding, or its logits
            are not those of a linear last layer.
    """

    kind = _KIND
    takes_classes = True

    def __init__(
        self,
        config: PretrainedConfig,
        vocab_size: int,
        name: str | None = None,
        new_head: bool = False,
        dropout: float | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__(config, name)
        self.new_head = new_head
        config = copy.deepcopy(config)
        if config.is_encoder_decoder:
            _refuse(config, "it is an encoder with a decoder")
        _set_vocabulary(config, vocab_size)
        if dropout is not None:
            published.set_dropout(config, dropout)
        self.model: PreTrainedModel = published.build(_KIND, config)
        published.clear_padding_id(self.model)
        self._first_position = first_position(self.model)
        head = self.model.get_output_embeddings()
        parameters = inspect.signature(self.model.forward).parameters
        if not isinstance(head, nn.Linear) or "attention_mask" not in parameters:
            _refuse(self.model.config, "it has no linear head on an encoder that can hide padding")
        self._passes_positions = self._first_position is not None and "position_ids" in parameters
        input_BLD = self._head_input(head)
        self._head_path = next(path for path, module in self.model.named_modules() if module is head)
        parent, _, attribute = self._head_path.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, nn.Identity())
        self.head = head
        if num_classes:
            width = self.model.get_input_embeddings().embedding_dim
            self.class_embed = ClassEmbedding(num_classes, width, scale=_CLASS_SCALE)
            self.head = ClassHead(head, num_classes)
            self.num_classes = num_classes
        if input_BLD is not None:
            self._check_encode(input_BLD)
        self.train()

    @property
    def class_parameters(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the class embedding."""
        return [(self.class_embed.embedding, slice(None))]

    @property
    def knows_its_mask(self) -> bool:
        """Return whether its weights were trained with a mask, which the data must then use."""
        return self.name is not None

    @property
    def longest(self) -> int | None:
        """Return the largest number of tokens in a row; None if the architecture has no limit."""
        table = getattr(self.model.config, "max_position_embeddings", None)
        return None if not table or table < 0 else table - (self._first_position or 0)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the repeated layers: the elements of the largest list of modules."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=lambda parts: sum(p.numel() for p in parts.parameters()), default=()))

    def _name_here(self, name: str) -> str:
        theirs, ours = f"{self._head_path}.", "head.linear." if self.num_classes else "head."
        return f"{ours}{name.removeprefix(theirs)}" if name.startswith(theirs) else f"model.{name}"

    def pretrained(self) -> Checkpoint | None:
        found = super().pretrained()
        if found is not None and self.num_classes:  # the weights know no classes
            found.state.update({name: value.clone() for name, value in self.state_dict().items() if "class_" in name})
        return found

    def _check_missing(self, model: PreTrainedModel, missing: list[str]) -> None:
        body = f"{model.base_model_prefix}."
        published.refuse_missing(_KIND, self.name, [name for name in missing if name.startswith(body)])
        if missing and not self.new_head:
            raise ValueError(
                f"{KEY}={self.name}: its file of weights has no head for masked tokens (it lacks "
                f"{', '.join(missing[:3])}; {len(missing)} in all); {NEW_HEAD}=true trains a new one, "
                "whose matrix is the embedding"
            )
        if self.new_head and not missing:
            raise ValueError(f"{NEW_HEAD}=true: {KEY}={self.name} has a head for masked tokens; leave it out")

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, L, D), ready for `head`. Padding, on the right and False in `attention_mask`, is
        hidden."""
        inputs: dict[str, Tensor] = {"input_ids": tokens_BL}
        if self.num_classes:
            class_id = unconditional(tokens_BL) if class_id is None else class_id
            embedded_BLE = self.model.get_input_embeddings()(tokens_BL) + self.class_embed(class_id)[:, None]
            inputs = {"inputs_embeds": embedded_BLE}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.long()
        if self._passes_positions:  # the library would count the tokens that are not its padding id
            position_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) + self._first_position
            inputs["position_ids"] = position_L.expand(tokens_BL.shape)
        return with_class(self.model(**inputs).logits, class_id, self.num_classes)

    def _probe(self) -> Tensor:
        """Return two rows of three tokens that differ in the last one."""
        first, second = self.model.config.vocab_size - 1, self.model.config.vocab_size - 2
        return torch.tensor([[first, second, first], [first, second, second]])

    def _head_input(self, head: nn.Linear) -> Tensor | None:
        """Return the input of the head of the unchanged model for the probe; None on the meta device. Raises ValueError
        if the logits are not the output of the head."""
        if head.weight.is_meta:
            return None
        ids_BL = self._probe()
        self.eval()
        try:
            input_BLD = published.head_input(self.model, head, ids_BL, attention_mask=torch.ones_like(ids_BL))
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            _refuse(self.model.config, f"with these settings it does not run ({published.first_line(error)})")
        if input_BLD is None:
            _refuse(self.model.config, "its logits are not its linear head's (they are scaled, capped or transformed)")
        return input_BLD

    @torch.no_grad()
    def _check_encode(self, input_BLD: Tensor) -> None:
        """Check that `encode` gives the input of the head, and that tokens on the right are seen unless they are
        padding."""
        ids_BL = self._probe()
        width = input_BLD.shape[-1]  # the columns of the classes follow
        hidden_BLD = self.encode(ids_BL)[..., :width]
        if not published.close(hidden_BLD, input_BLD):
            _refuse(self.model.config, "without its last linear layer it computes something else")
        if torch.equal(hidden_BLD[0, 0], hidden_BLD[1, 0]):
            _refuse(self.model.config, "it does not see what stands on the right (is_decoder)")
        padded_BLD = self.encode(ids_BL, attention_mask=torch.tensor([[True, True, False]]).expand(2, 3))[..., :width]
        if not published.close(padded_BLD[0, :2], padded_BLD[1, :2]):
            _refuse(self.model.config, "it does not hide padding")


def _refuse(config: PretrainedConfig, reason: str) -> NoReturn:
    raise ValueError(
        f"backbone=hf_mlm cannot use a {config.model_type} model: {reason}; choose another, such as roberta-base"
    )


def first_position(model: PreTrainedModel) -> int | None:
    """Return the position of a row's first token in models that start after the position of padding (roberta); else
    None."""
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
    mask_padding: Annotated[bool, ADDED_LATER] | None = None,
    attn_backend: Annotated[Literal["auto", "sdpa"], FREE] = "auto",
    num_classes: int = 0,
) -> HFMaskedLM:
    """Build the architecture of a masked language model with random weights; `HFMaskedLM.pretrained` loads the others.

    `name_or_path` is `$DATA_DIR/<name>` if that exists, else a folder, else a name on the Hub. The first of
    `checkpoint_path`, `resumed` and `from_pretrained` that is a checkpoint of such a network defines the architecture
    instead, so that it outlives the folder. Sizes are None unless typed: with `from_scratch` they replace those of
    `config` (a model type of the library, such as roberta) or of the folder, else they must be those of the model.
    `vocab_size` and `length` are those of the data.

    Raises:
        FileNotFoundError: a file or the model is not found.
        ValueError: no model is named, or it contradicts the data or typed settings.
    """
    if mask_padding is False:
        raise ValueError("model.mask_padding=false: backbone=hf_mlm always hides padding; leave it out")
    _check_flags(name_or_path, config, from_scratch, new_head)
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    named = f"{CONFIG}={config}" if config else f"{KEY}={name_or_path}"
    saved = published.saved_config(_KIND, files, {KEY: name_or_path, CONFIG: config})
    if saved is None and name_or_path is None and config is None:
        raise ValueError(
            f"backbone=hf_mlm is the network of a masked language model: name it with {KEY}= (a Hub id such as "
            f"roberta-base, a folder, or a folder below $DATA_DIR that holds {published.FILES}), or an architecture "
            f"with {CONFIG}=roberta backbone.from_scratch=true, or a checkpoint that was trained with it"
        )
    typed = {"model.hidden_size": hidden_size, "model.n_blocks": n_blocks, "model.n_heads": n_heads}
    if saved is None and from_scratch:
        built = _architecture(config) if config else published.load_config(_KIND, name_or_path)
        built = _sized(built, typed, vocab_size, length)
        return HFMaskedLM(built, vocab_size, None, False, dropout, num_classes)
    found, source = saved or (published.load_config(_KIND, name_or_path), named)
    published.refuse_contradictions(_KIND, found, typed, vocab_size, source)
    if new_head:
        found.tie_word_embeddings = True
    name = None if from_scratch else name_or_path
    net = HFMaskedLM(found, vocab_size, name, new_head, dropout, num_classes)
    published.refuse_length(length, net.longest, source)
    return net


def _check_flags(name: str | None, config: str | None, from_scratch: bool, new_head: bool) -> None:
    """Raise ValueError for settings that exclude each other."""
    if config is not None and (name is not None or not from_scratch):
        other = f"{KEY}={name}" if name is not None else "backbone.from_scratch=false"
        raise ValueError(
            f"{CONFIG}={config} is an architecture without weights, which {other} contradicts; set "
            f"backbone.from_scratch=true alone, or name a model with {KEY}= alone"
        )
    if new_head and from_scratch:
        raise ValueError(f"{NEW_HEAD}=true with backbone.from_scratch=true: everything is new then; leave it out")


def _architecture(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(name)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CONFIG}={name} is no architecture of transformers; give roberta, bert or another by its model_type"
        ) from error


def _sized(config: PretrainedConfig, typed: dict[str, int | None], vocab_size: int, length: int) -> PretrainedConfig:
    """Set the sizes that were typed, positions for `length` tokens and a row for each id of the data. The MLP keeps its
    ratio to the width."""
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
            kinds = getattr(config, "layer_types", None)  # one for each block, in a repeating pattern (ModernBERT)
            if kinds:
                config.layer_types = [kinds[block % len(kinds)] for block in range(typed["model.n_blocks"])]
        except NotImplementedError as error:  # configurations of a fixed depth (Funnel) refuse another one so
            raise ValueError(f"model.n_blocks={typed['model.n_blocks']}: {published.first_line(error)}") from error
    _set_vocabulary(config, vocab_size)
    if getattr(config, "max_position_embeddings", None):
        with torch.device("meta"):
            offset = first_position(published.build(_KIND, config)) or 0
        config.max_position_embeddings = length + offset
    return config


def _set_vocabulary(config: PretrainedConfig, vocab_size: int) -> None:
    """Set the number of rows to the ids of the data, and remove special ids beyond them, which are not used here."""
    config.vocab_size = vocab_size
    for name in ("bos", "eos", "cls", "sep", "pad"):
        if (getattr(config, f"{name}_token_id", None) or 0) >= vocab_size:
            setattr(config, f"{name}_token_id", None)
