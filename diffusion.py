"""The Lightning module: wiring only. The objective owns the mathematics, the task owns the report.

Shape suffixes: B batch, L length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import lightning
import torch
from torch import Tensor, nn

from palimpsest.common.metrics import NLLMeter
from palimpsest.common.randomness import KeyedNoise, evaluation_noise, hash_seed, seed_generator_of, training_noise
from palimpsest.common.values import BelowOne, Seed, Share
from palimpsest.denoisers import BlockDenoiser, Denoiser, JointDenoiser
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.class_conditioning import UNCONDITIONAL, start_from_counts
from palimpsest.models.ema import EMA
from palimpsest.models.freezing import refuse_frozen
from palimpsest.models.sharding import shard
from palimpsest.objectives.base import Batch, BoundTo, Objective, TokenLoss, scored_mask
from palimpsest.objectives.mlm import cross_entropy_at
from palimpsest.objectives.reduction import StepLoss, scale_gradients
from palimpsest.process import Absorbing
from palimpsest.training.updates import Updates

log = logging.getLogger(__name__)
MASK_RATES = ("sampling_eps_min", "sampling_eps_max")
_NEAR_ZERO = 0.03  # spread of the matrices that networks of the transformers library begin with: 0.02
ENTRANCES = ("training_step", "validation_step", "cross_entropy_at")  # methods that need whole weights


@dataclass(frozen=True)
class Provenance:
    """Where weights come from. steps: optimizer steps of their training. length: tokens of its rows. None if the file
    does not say."""

    checkpoint: str
    steps: int | None
    averaged: bool
    length: int | None = None


class BatchPlan(Protocol):
    """Map from positions in the training stream to optimizer steps (data/stream.py)."""

    def place(self, position_B: Tensor) -> tuple[Tensor, Tensor]: ...


class Diffusion(lightning.LightningModule):
    """A backbone trained by an objective.

    Args:
        backbone: tokens in, hidden states out, with a `head`.
        objective: the training law.
        optimizer: backbone -> optimizer.
        lr_scheduler: optimizer -> learning-rate scheduler, stepped once per optimizer step.
        ema: decay of the parameter average that evaluation uses; 0 for none.
        seed: of the training and validation noise.
        plan: which positions of the stream each optimizer step takes; None only where nothing is trained.
        identity: what the weights belong to (configuration, tokenizer), saved beside them in every checkpoint.
        label_dropout: share of the training texts whose class a conditional backbone is not told.
    """

    def __init__(
        self,
        backbone: nn.Module,
        objective: Objective,
        optimizer: Callable | None = None,
        lr_scheduler: Callable | None = None,
        ema: BelowOne = 0.0,
        seed: Seed = 1,
        plan: BatchPlan | None = None,
        identity: Mapping[str, object] | None = None,
        label_dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        if objective.causal != backbone.causal:
            raise ValueError(
                f"the objective {type(objective).__name__} and the backbone {type(backbone).__name__} do not fit: "
                "left-to-right likelihoods need a causal backbone and masked diffusion one that sees both sides; use "
                "parameterization=ar backbone=ar (or hf_causal), or neither"
            )
        if issubclass(objective.binds_to, BlockDenoiser) and not backbone.reads_blocks:
            raise ValueError(
                f"parameterization=bd3lm needs a network that reads texts in blocks, and {type(backbone).__name__} "
                "does not; use backbone=dit or hf_dit"
            )
        if issubclass(objective.binds_to, JointDenoiser) and not backbone.reads_latents:
            raise ValueError(
                f"algo=mmldlm needs a network that reads texts and latents, and {type(backbone).__name__} does not; "
                "use backbone=mmdit"
            )
        self.backbone, self.objective = backbone, objective
        self.build_optimizer, self.build_lr_scheduler = optimizer, lr_scheduler
        self.ema = EMA(self.backbone.parameters(), ema) if ema else None
        self.seed, self.plan, self.step_loss = seed, plan, StepLoss()
        self.identity = dict(identity or {})
        self.label_dropout = label_dropout
        self.valid_nll = NLLMeter(over_devices=True)
        self.provenance: Provenance | None = None
        self.updates, self._average_due = Updates(), False

    @property
    def model(self) -> BoundTo:
        """What samplers and estimators are given: the law to measure, whatever training weighs, with this backbone."""
        return self.objective.bound(None).model(self.backbone)

    @property
    def fills_masks(self) -> bool:
        """Return True if the model predicts any masked tokens from all unmasked ones."""
        kind, absorbing = self.objective.binds_to, isinstance(self.objective.process, Absorbing)
        return absorbing and issubclass(kind, Denoiser) and not issubclass(kind, BlockDenoiser)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss, and beside it what training/callbacks/metrics.py keeps account of."""
        # Dropout is the one random thing that no generator reaches: seed it by place, so that a resumed run repeats it.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        seed_generator_of(self.device, hash_seed(self.seed, self.global_step, micro_batch, self.global_rank))
        if micro_batch == 0:
            self.step_loss = StepLoss()
        loss = self.training_loss(batch)
        return {"loss": self.step_loss.add(loss), **_account(loss, batch, self.objective.encodes)}

    def on_after_backward(self) -> None:
        """With the last micro-batch of a step its gradient becomes that of the mean over all scored tokens of the
        global batch, on all devices."""
        if self.step_loss.micro_batches < self.trainer.accumulate_grad_batches:
            return
        rows_per_token = self.step_loss.rows_per_token(partial(self.trainer.strategy.reduce, reduce_op="sum"))
        scale_gradients(self.backbone.parameters(), rows_per_token)

    def training_loss(self, batch: Batch, draw: int = 0) -> TokenLoss:
        """The loss of a training batch, under the noise of this training (draw 0) or under other noise."""
        place_B, size_B = self.plan.place(batch["position"])
        seed = hash_seed(self.seed, draw) if draw else self.seed
        noise = training_noise(seed, batch["position"], size_B, place_B)
        dropped_B = None
        if self.backbone.num_classes:
            dropped_B = KeyedNoise(self.seed, batch["position"], draw=-4).uniform() < self.label_dropout
        told = {**self.told(batch, dropped_B), "step": torch.tensor(self.global_step)}
        return self.objective.loss(self.backbone, told, noise)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        noise = evaluation_noise(self.seed, batch["sample_id"])
        loss = self.objective.bound(None).loss(self.backbone, self.told(batch), noise)
        self.valid_nll.update(loss.nll_BL.sum(-1), loss.mask_BL.sum(-1), batch)
        if self._search and batch_idx < self._search.num_batches:
            noise = evaluation_noise(hash_seed(self.seed, self.global_step), batch["sample_id"])
            self._clip_sums = self._clip_sums + self._search.sums(
                *self.objective.block_losses(self.backbone, self.told(batch), noise)
            )

    def cross_entropy_at(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Of an evaluation batch with each token masked with chance `rate`, always the same ones: the summed
        cross-entropy of the masked tokens [nats], and their number (training/callbacks/masking_rates.py)."""
        noise = KeyedNoise(self.seed, batch["sample_id"], draw=-8)
        return cross_entropy_at(self.model.objective, self.backbone, self.told(batch), rate, noise)

    def told(self, batch: Batch, dropped_B: Tensor | None = None) -> Batch:
        """`batch` with the class of each text, where the backbone takes it and the texts have one."""
        if not self.backbone.num_classes or "label" not in batch:
            return batch
        class_id = batch["label"] if dropped_B is None else batch["label"].masked_fill(dropped_B, UNCONDITIONAL)
        return {**batch, "class_id": class_id}

    def on_validation_epoch_start(self) -> None:
        self.valid_nll.reset()
        self._clip_sums = 0.0
        self._ema_context = self.averaged()
        self._ema_context.__enter__()

    def on_validation_epoch_end(self) -> None:
        self._ema_context.__exit__(None, None, None)
        nll = self.valid_nll.estimate()
        values = {"val/nll": nll.value, "val/nll_se": nll.se, "val/ppl": nll.exp().value}
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
        if self._search:
            self._choose_mask_rates(self.trainer.strategy.reduce(self._clip_sums, reduce_op="sum"))

    @property
    def _search(self) -> object | None:
        """How the objective's mask rates are chosen, where there is something to choose from."""
        search = self.objective.search
        return search if search and search.candidates else None

    def _choose_mask_rates(self, sums_C3: Tensor) -> None:
        """Train on from here with the mask rates at which the loss of a block varies least."""
        now, variances_C = self.objective.sampling_eps, self._search.variances(sums_C3)
        if not self._search.fixed:
            self.objective.clip(*self._search.best(sums_C3))
        low, high = self.objective.sampling_eps
        values = {"val/sampling_eps_min": low, "val/sampling_eps_max": high, "val/block_loss_variance": variances_C[0],
                  "val/block_loss_variance_best": variances_C.min()}  # fmt: skip
        self.log_dict({name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()})
        if self.objective.sampling_eps != now:
            log.info("mask rates from here on: %.3g to %.3g", low, high)

    def start_from(self, checkpoint: Checkpoint, use_ema: bool = True) -> dict[str, nn.Parameter]:
        """Take over the weights of `checkpoint` (the averaged ones where there are any and `use_ema`) as those a new
        training begins with; its own average begins with them too. Returns the parameters that the checkpoint knows
        nothing of, which it may where it is the model of a part of the backbone.

        Raises:
            ValueError: they do not fit the backbone, or a parameter that they do not have is frozen; nothing has been
                changed then.
        """
        part = self.backbone.part_of(checkpoint.state)
        known = {id(p) for p in part.parameters()}
        new = {name: p for name, p in self.backbone.named_parameters() if id(p) not in known}
        refuse_frozen(self.backbone, new)
        checkpoint.load_into(part, use_ema)
        if self.ema:
            self.ema.restart(self.backbone.parameters())
        return new

    def start_from_counts(self, counts_CV: Tensor, before_V: Tensor | None = None) -> None:
        """Begin a new training at token frequencies (models/class_conditioning.py), and its average too.

        Raises:
            ValueError: the network's output layer has no bias or, for new weights (without `before_V`), does not start
                at zero, or as near to it as one that shares its matrix with the embedding, so that its outputs would
                not be those frequencies.
        """
        head = self.backbone.head
        if head.bias is None or (before_V is None and (head.weight.std() > _NEAR_ZERO or head.bias.any())):
            why = "has no bias" if head.bias is None else "has learned something else"
            raise ValueError(
                f"training.start_from_counts=true: the output layer of {type(self.backbone).__name__} {why}, so it can "
                "not begin at token frequencies; leave it out, or use new weights"
            )
        start_from_counts(head, counts_CV, before_V)
        if self.ema:
            self.ema.restart(self.backbone.parameters())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the backbone has its averaged weights, if it keeps an average."""
        self.settle_average()
        with self.ema.swapped(self.backbone.parameters()) if self.ema else nullcontext():
            yield

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        self.settle_average()
        by_value = gradient_clip_algorithm == "value"
        self.updates.prepare(optimizer, None if by_value else gradient_clip_val)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        self._average_due = self.ema is not None

    def settle_average(self) -> None:
        """Take the newest weights into the average, if their update was made. That is asked just before the next
        update, when the device has long answered, or where the average is wanted."""
        if self._average_due and self.updates.made():
            self.ema.update(self.backbone.parameters())
        self._average_due = False

    def configure_model(self) -> None:
        """Share the weights and their average out over devices, where the strategy says so (strategy=fsdp)."""
        if self.device_mesh is None:
            return
        shard(self, self.backbone.blocks, self.device_mesh["data_parallel"], ENTRANCES)
        if self.ema:
            self.ema.shard(self.backbone.parameters())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.build_optimizer(self.backbone)
        scheduler = self.build_lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.ema:
            self.ema.to(self.device)

    def on_train_end(self) -> None:
        self.settle_average()

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.settle_average()
        checkpoint["identity"] = self.identity
        if self.objective.sampling_eps is not None:  # by the names of the reference's buffers
            for name, value in zip(MASK_RATES, self.objective.sampling_eps, strict=True):
                checkpoint["state_dict"][name] = torch.tensor(value, dtype=torch.float64)
        if self.ema:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, object]) -> None:
        found = [checkpoint["state_dict"].pop(name, None) for name in MASK_RATES]
        if self.objective.sampling_eps is not None and None not in found:
            self.objective.clip(*(float(value) for value in found))
        if self.ema and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])


@torch.no_grad()
def _account(loss: TokenLoss, batch: Batch, encodes: int) -> dict[str, Tensor]:
    """What a micro-batch leaves to add up, on its device: `nll` in nats and the `tokens` it is the sum over, how many
    positions were `projected` onto the vocabulary, per row the `scored_B` tokens, and the objective's own `means`. Of
    objectives that mask also, per row and network pass, `num_masked` and `cross_entropy`, (B, P); where rows have parts
    with mask rates of their own, the same by part, with `num_scored` of each."""
    logs = {name: value for name, value in loss.logs.items() if name.startswith(("num_", "cross_entropy"))}
    scored_B, tokens = scored_mask(batch).sum(-1), loss.mask_BL.sum()
    # A second encoding of a pass is that of the clean text, projected everywhere (objectives/d3pm.py).
    projected = logs["num_masked"].sum() + (encodes - 1) * scored_B.sum() if logs else tokens
    return {"nll": loss.total().detach(), "tokens": tokens, "projected": projected,
            "scored_B": scored_B, "means": loss.means, **logs}  # fmt: skip
