"""backbone=hf_causal: any causal language model of the transformers library, for parameterization=ar.

Weights are read from safetensors files only, and no code of a model is run. Embedding and head get the rows that the
vocabulary of the data needs.

Shape suffixes: B batch, L length, V vocabulary, D width.
"""

import copy
import inspect
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from palimpsest.common.values import FREE, BelowOne, FilePath, Length, PresentPath, Size
from palimpsest.models import hf_published as published
from palimpsest.models.hf_published import KEY
from palimpsest.models.kv_cache import CacheCapacity

_KIND = published.Kind("hf_causal", AutoModelForCausalLM, "causal language model", "backbone.config", added=64)


class TrunkCache(CacheCapacity):
    """The library's cache of keys and values with a fixed capacity. For sampling, under `no_grad`."""

    def __init__(self, config: PretrainedConfig, batch_size: int, capacity: int) -> None:
        super().__init__(batch_size, capacity)
        self.past = DynamicCache(config=config)


class HFCausal(published.PublishedBackbone):
    """A published network that predicts the next token: `encode(tokens_BL)`, then `head(hidden)`.

    `encode` ignores the noise level and the padding mask, which every backbone takes: there is no noise, and padding is
    on the right, where causal attention does not look. Positions start at 0. Raises ValueError if there is no such
    architecture, it is not causal, or its logits are not those of a linear head.
    """

    causal = True
    kind = _KIND

    def __init__(
        self,
        config: PretrainedConfig,
        vocab_size: int,
        name: str | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__(config, name)
        config = copy.deepcopy(config)
        config.get_text_config().vocab_size = vocab_size
        if dropout is not None:
            published.set_dropout(config, dropout)
        self.model: PreTrainedModel = published.build(_KIND, config)
        published.clear_padding_id(self.model)
        self._check_contract()

    @property
    def head(self) -> nn.Linear:
        """Return the vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.model.get_output_embeddings()

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the repeated layers, as the library names them; an empty list if it does not."""
        names = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in names]

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules that training.freeze can name. If embedding and head are one matrix, both are frozen with
        either."""
        return {"embeddings": [self.model.get_input_embeddings()], "blocks": self.blocks, "head": [self.head]}

    def new_cache(self, batch_size: int, length: int) -> TrunkCache:
        """Return an empty cache for `length` positions. Raises ValueError if the architecture keeps something other
        than keys and values."""
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
        """Return hidden states (B, L, D), ready for `head`; position i depends on the tokens up to i.

        With `cache`, `tokens_BL` continue the `cache.length` tokens before them and are added to the cache. Raises
        ValueError if the cache is too small for the tokens, or was made for another batch size.
        """
        if cache is None:
            return self.model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        cache.check_capacity(tokens_BL)
        hidden_BLD = self.model.base_model(
            input_ids=tokens_BL, past_key_values=cache.past, use_cache=True
        ).last_hidden_state
        cache.length += tokens_BL.shape[1]
        return hidden_BLD

    @torch.no_grad()
    def _check_contract(self) -> None:
        """Check on two tokens that the model's logits are `head(encode(x))`, and that a prediction does not depend on
        later tokens. An encoder (bert) builds without an error and would see the answers."""
        kind = self.model.config.model_type
        if not isinstance(self.head, nn.Linear) or self.model.base_model is self.model:
            raise ValueError(f"backbone=hf_causal: a {kind} model has no linear head on a trunk; choose another")
        if self.head.weight.is_meta:
            return
        ids_BL = torch.tensor([[0, 0], [0, 1]])
        self.eval()
        hidden_BLD = self.encode(ids_BL)
        input_BLD = published.head_input(self.model, self.head, ids_BL, use_cache=False)
        self.train()
        if not published.close(hidden_BLD[0, 0], hidden_BLD[1, 0]):
            raise ValueError(
                f"backbone=hf_causal: a {kind} model is no causal language model: its output for a token depends on "
                "later tokens; choose one that reads from left to right, such as gpt2"
            )
        if input_BLD is None or not published.close(input_BLD, hidden_BLD):
            raise ValueError(
                f"backbone=hf_causal: the logits of a {kind} model are not its linear head's (they are scaled, capped "
                "or transformed), which the losses here rely on; choose another, such as gpt2 or a llama"
            )


def hf_causal(
    vocab_size: int,
    length: Length,
    name_or_path: PresentPath | None = None,
    from_scratch: bool = False,
    checkpoint_path: FilePath | None = None,
    resumed: Annotated[FilePath, FREE] | None = None,
    from_pretrained: FilePath | None = None,
    hidden_size: Size | None = None,
    n_blocks: Size | None = None,
    n_heads: Size | None = None,
    dropout: BelowOne | None = None,
    attn_backend: Annotated[Literal["auto", "sdpa"], FREE] = "auto",
) -> HFCausal:
    """Build the architecture of a causal language model with random weights; `HFCausal.pretrained` loads the others.

    `name_or_path` is `$DATA_DIR/<name>` if that exists, else a folder, else a name on the Hub. The first of
    `checkpoint_path`, `resumed` and `from_pretrained` that is a checkpoint of such a network defines the architecture
    instead, so that it outlives the folder. Sizes are None unless typed; typed ones must be those of the model.
    `vocab_size` and `length` are those of the data.

    Raises:
        FileNotFoundError: a file or the model is not found.
        ValueError: no model is named, or it contradicts the data or typed settings.
    """
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    named = f"{KEY}={name_or_path}"
    config, source = published.saved_config(_KIND, files, {KEY: name_or_path}) or (None, named)
    if config is None and name_or_path is None:
        raise ValueError(
            f"backbone=hf_causal is the network of a published model: name it with {KEY}= (a Hub id, a folder, or a "
            f"folder below $DATA_DIR that holds {published.FILES}), or name a checkpoint that was trained with it"
        )
    config = config or published.load_config(_KIND, name_or_path)
    typed = {"model.hidden_size": hidden_size, "model.n_blocks": n_blocks, "model.n_heads": n_heads}
    inner = config.get_text_config()
    published.refuse_contradictions(_KIND, inner, typed, vocab_size, source)
    published.refuse_length(length, getattr(inner, "max_position_embeddings", None), source)
    return HFCausal(config, vocab_size, None if from_scratch else name_or_path, dropout)
