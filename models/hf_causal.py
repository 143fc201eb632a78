"""backbone=hf_causal: any causal language model of the transformers library, for parameterization=ar.

Its weights come from safetensors files alone, and no code comes with them. The embedding and the head get the rows that
the data's vocabulary asks for.

Shape suffixes: B batch, L length, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from palimpsest.common.values import FREE, BelowOne, FilePath, Length, PresentPath, Size
from palimpsest.models import hf_published as published
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.hf_published import KEY
from palimpsest.models.kv_cache import Room

_KIND = published.Kind("hf_causal", AutoModelForCausalLM, "causal language model", "backbone.config", added=64)


class TrunkCache(Room):
    """The library's cache of keys and values, with the room that was asked for. For sampling, under `no_grad`."""

    def __init__(self, config: PretrainedConfig, batch_size: int, capacity: int) -> None:
        self.past = DynamicCache(config=config)
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0


class HFCausal(Backbone):
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

    causal = recomputes = True

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
            published.set_dropout(config, dropout)
        self.model: PreTrainedModel = published.build(_KIND, config, attn_backend)
        published.forget_padding(self.model)
        self._check_waist()

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
        """Gradient checkpointing. Raises ValueError where the architecture has none."""
        published.recompute_blocks(self.model)

    @property
    def settings(self) -> dict[str, object]:
        """What the network was built with, keys as on the command line."""
        return {**published.sizes(self.model.config.get_text_config()), _KIND.config_key: self._described}

    def pretrained(self) -> Checkpoint | None:
        """The weights that a new training starts from; None where it starts from random ones. Rows that the published
        model does not have are the mean of those it has; rows beyond the data's ids are left out.

        Raises:
            FileNotFoundError: the model is nowhere.
            ValueError: what is there can not be used.
        """
        if self.name is None:
            return None
        loaded = published.load_weights(_KIND, self.name)
        published.refuse_missing(_KIND, self.name, loaded.missing)
        rows = loaded.model.config.get_text_config().vocab_size
        ours = self.model.state_dict()
        state = {
            f"model.{name}": published.with_rows(tensor, self.vocab_size)
            if name in ours and tensor.shape != ours[name].shape and tensor.shape[:1] == (rows,)
            else tensor
            for name, tensor in loaded.model.state_dict().items()
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
        if not published.close(hidden_BLD[0, 0], hidden_BLD[1, 0]):
            raise ValueError(
                f"backbone=hf_causal: a {kind} model is no causal language model, what it computes for a token depends "
                "on the tokens after it; choose one that reads from left to right, such as gpt2"
            )
        if not (given and published.close(given[0], hidden_BLD) and torch.equal(logits_BLV, answer_BLV)):
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
    attn_backend: Annotated[Literal["sdpa", "flash_attn", "flex"], FREE] = "sdpa",
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
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    named = f"{KEY}={name_or_path}"
    config, said_by = published.kept_config(_KIND, files, {KEY: name_or_path}) or (None, named)
    if config is None and name_or_path is None:
        raise ValueError(
            f"backbone=hf_causal is the network of a published model: name it with {KEY}= (a Hub id, a folder, or a "
            f"folder below $DATA_DIR that holds {published.FILES}), or name a checkpoint that was trained with it"
        )
    config = config or published.load_config(_KIND, name_or_path)
    typed = {"model.hidden_size": hidden_size, "model.n_blocks": n_blocks, "model.n_heads": n_heads}
    inner = config.get_text_config()
    published.refuse_contradictions(_KIND, inner, typed, vocab_size, said_by)
    published.refuse_length(length, getattr(inner, "max_position_embeddings", None), said_by)
    return HFCausal(config, vocab_size, None if from_scratch else name_or_path, dropout, attn_backend)
