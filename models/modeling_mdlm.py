"""Our DiT as a model of transformers. scripts/export_hf.py writes this file, and its imports, next to the weights:

    AutoModelForMaskedLM.from_pretrained(DIRECTORY, trust_remote_code=True)

Weights are float32; use torch.autocast for lower precision. Shape suffixes: B batch, L length, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from palimpsest.models.dit import DiT
from palimpsest.models.layers import SigmaEmbedding, sinusoid_frequencies


class MDLMConfig(PretrainedConfig):
    """Sizes under the names of kuleshov-group/mdlm-owt, with two additions: `mask_padding` hides padding from
    attention, `attn_backend` is sdpa or flash_attn."""

    model_type = "mdlm"

    def __init__(
        self,
        vocab_size: int = 50258,
        model_length: int = 1024,
        hidden_dim: int = 768,
        cond_dim: int = 129,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.1,
        time_conditioning: bool = False,
        mask_padding: bool = True,
        attn_backend: str = "sdpa",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.model_length = vocab_size, model_length
        self.hidden_dim, self.cond_dim = hidden_dim, cond_dim
        self.n_blocks, self.n_heads = n_blocks, n_heads
        self.dropout, self.time_conditioning = dropout, time_conditioning
        self.mask_padding, self.attn_backend = mask_padding, attn_backend


class MDLM(PreTrainedModel):
    """A masked diffusion language model: logits of the clean tokens at every position."""

    config_class = MDLMConfig

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.backbone = DiT(
            config.vocab_size,
            config.hidden_dim,
            config.cond_dim,
            config.n_blocks,
            config.n_heads,
            config.dropout,
            config.time_conditioning,
            config.mask_padding,
            config.attn_backend,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Recompute the buffer that no file has, since from_pretrained builds the network without memory. Parameters
        keep the values of their constructors."""
        if isinstance(module, SigmaEmbedding):
            module.frequencies.copy_(sinusoid_frequencies(len(module.frequencies)))

    def forward(
        self, input_ids: Tensor, timesteps: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> MaskedLMOutput:
        """Return raw logits (B, L, V), including that of the mask, also at visible tokens. Raises ValueError for a
        time-conditioned model without timesteps.

        Args:
            input_ids: (B, L), masks included.
            timesteps: (B,), the total noise sigma = -log P(a token is kept); used by time-conditioned models only.
            attention_mask: (B, L), 0 on padding.
        """
        if timesteps is None:
            if self.config.time_conditioning:
                raise ValueError("timesteps=None: this model is conditioned on the total noise; give sigma, one a row")
            timesteps = torch.zeros(len(input_ids), device=input_ids.device)
        mask = None if attention_mask is None else attention_mask.bool()
        return MaskedLMOutput(logits=self.backbone(input_ids, timesteps, mask))
