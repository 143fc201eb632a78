"""The Lightning module, which connects backbone, objective, optimizer and parameter average.

Shape suffixes: B batch, L length.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from palimpsest.common.metrics import NLLMeter
from palimpsest.common.randomness import KeyedNoise, evaluation_noise, hash_seed, seed_generator_of, training_noise
from palimpsest.common.values import BelowOne, Needs, NotNegative, Seed
from palimpsest.data.stream import BatchPlan
from palimpsest.denoisers import BlockDenoiser, Denoiser, JointDenoiser
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.class_conditioning import UNCONDITIONAL, check_names, start_from_counts
from palimpsest.models.ema import EMA
from palimpsest.models.freezing import refuse_frozen
from palimpsest.models.sharding import shard
from palimpsest.objectives.base import Batch, BoundModel, Objective, TokenLoss, scored_mask
from palimpsest.objectives.contrast import class_log_joint, class_losses
from palimpsest.objectives.mlm import cross_entropy_at
from palimpsest.objectives.reduction import StepLoss, scale_gradients
from palimpsest.process import Absorbing
from palimpsest.training.optimizers import hyperparameters, set_hyperparameters
from palimpsest.training.updates import Updates

log = logging.getLogger(__name__)
MASK_RATES = ("sampling_eps_min", "sampling_eps_max")
_NEAR_ZERO = 0.03  # above 0.02, the standard deviation of new matrices of the transformers library
_CONTRAST = -1  # sets the random numbers of the compared classes apart; draws are numbered from 0
_FORWARD_METHODS = ("training_step", "validation_step", "cross_entropy_at")  # methods that need unsharded weights


@dataclass(frozen=True)
class Provenance:
    """The origin of weights: checkpoint, optimizer steps of its training, and tokens of its rows (None if unknown)."""

    checkpoint: str
    steps: int | None
    averaged: bool
    length: int | None = None


class Diffusion(lightning.LightningModule):
    """A backbone trained by an objective.

    Args:
        backbone: network from tokens to hidden states, with a `head`.
        objective: the training objective.
        optimizer: backbone -> optimizer.
        lr_scheduler: optimizer -> learning-rate scheduler, stepped once per optimizer step.
        ema: decay of the parameter average that evaluation uses; 0 for none.
        seed: seed of the training and validation noise.
        plan: positions of the stream that each optimizer step takes; None only if nothing is trained.
        identity: what the weights belong to (configuration, tokenizer), saved in every checkpoint.
        label_dropout: share of the training texts whose class is dropped for a conditional backbone.
        discriminative_weight: weight of the classes' cross-entropy, in nats per text, beside the generative loss, in
            nats per token (objectives/contrast.py).
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
        label_dropout: Annotated[BelowOne, Needs("classify.sharing", ("conditional",))] = 0.0,
        discriminative_weight: NotNegative = 0.0,
    ) -> None:
        super().__init__()
        check_reads(objective, type(backbone))
        self.backbone = backbone
        self.objective = objective
        self.build_optimizer = optimizer
        self.build_lr_scheduler = lr_scheduler
        self.ema = EMA(self.backbone.parameters(), ema) if ema else None
        self.seed = seed
        self.plan = plan
        self.step_loss = StepLoss()
        self.identity = dict(identity or {})
        self.label_dropout = label_dropout
        self.discriminative_weight = discriminative_weight
        # Of the training texts; without it no classes are compared.
        self.register_buffer("log_prior_C", None, persistent=False)
        self.valid_nll = NLLMeter(over_devices=True)
        self.provenance: Provenance | None = None
        self.updates = Updates()
        self._average_due = False

    @property
    def model(self) -> BoundModel:
        """The model for samplers and estimators: the unweighted bound of the objective with this backbone."""
        return self.objective.bound(None).model(self.backbone)

    @property
    def fills_masks(self) -> bool:
        """True if the model predicts any masked tokens from all unmasked ones."""
        kind, absorbing = self.objective.model_class, isinstance(self.objective.process, Absorbing)
        return absorbing and issubclass(kind, Denoiser) and not issubclass(kind, BlockDenoiser)

    @property
    def compares_classes(self) -> bool:
        """True in a training with the classes' cross-entropy."""
        return self.discriminative_weight > 0 and self.log_prior_C is not None

    def compare_classes(self, share_C: Tensor) -> None:
        """Compare classes in this training, whose rows have these shares, if `discriminative_weight` is not 0."""
        self.log_prior_C = share_C.double().log()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss and the counts that training/callbacks/metrics.py adds up."""
        # Dropout uses torch's global generator; seed it for every micro-batch, so that a resumed run repeats it.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        dropout_seed = hash_seed(self.seed, self.global_step, micro_batch, self.global_rank)
        seed_generator_of(self.device, dropout_seed)
        if micro_batch == 0:
            self.step_loss = StepLoss()
        loss = self.training_loss(batch)
        found = {"loss": self.step_loss.add(loss), **_counts(loss, batch, self.objective.encodes)}
        if self.compares_classes:
            place_B, size_B = self.plan.place(batch["position"])
            noise = training_noise(hash_seed(self.seed, _CONTRAST), batch["position"], size_B, place_B)
            sums_3 = self.class_sums(batch, noise, hash_seed(dropout_seed, _CONTRAST))
            # Nats per row times the tokens per row: `StepLoss` divides the gradient by the tokens of the step. So with
            # several micro-batches each counts by its tokens.
            rows = len(batch["label"])
            found["loss"] = found["loss"] + self.discriminative_weight * found["tokens"] * sums_3[0] / rows**2
            found["means"] = {**found["means"], **_means(sums_3.detach())}
        return found

    def on_after_backward(self) -> None:
        """Scale the gradient after the last micro-batch of a step to that of the mean over all scored tokens."""
        if self.step_loss.micro_batches < self.trainer.accumulate_grad_batches:
            return
        rows_per_token = self.step_loss.rows_per_token(_sum_over_devices)
        scale_gradients(self.backbone.parameters(), rows_per_token)

    def training_loss(self, batch: Batch, draw: int = 0) -> TokenLoss:
        """Return the loss of a training batch, with the noise of this training (draw 0) or other noise."""
        place_B, size_B = self.plan.place(batch["position"])
        seed = hash_seed(self.seed, draw) if draw else self.seed
        noise = training_noise(seed, batch["position"], size_B, place_B)
        dropped_B = None
        if self.backbone.num_classes:
            dropped_B = KeyedNoise(self.seed, batch["position"], draw=-4).uniform() < self.label_dropout
        batch = {**self.with_conditioning(batch, dropped_B), "step": torch.tensor(self.global_step)}
        return self.objective.loss(self.backbone, batch, noise)

    def class_sums(self, batch: Batch, noise: KeyedNoise, dropout_seed: int) -> Tensor:
        """Return the cross-entropy of the texts' classes, how many are the most probable, and the texts, (3,)."""
        seed_dropout = partial(seed_generator_of, self.device, dropout_seed)
        log_joint_BK = class_log_joint(self.objective, self.backbone, batch, self.log_prior_C, noise, seed_dropout)
        losses_B2 = class_losses(log_joint_BK, len(self.log_prior_C))
        return torch.cat([losses_B2.sum(0), losses_B2.new_full((1,), len(losses_B2))])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        batch = self.with_conditioning(batch)
        noise = evaluation_noise(self.seed, batch["sample_id"])
        loss = self.objective.bound(None).loss(self.backbone, batch, noise)
        self.valid_nll.update(loss.nll_BL.sum(-1), loss.mask_BL.sum(-1), batch)
        if self.compares_classes:
            self._class_sums += self.class_sums(batch, evaluation_noise(self.seed, batch["sample_id"]), self.seed)
        if self._search and batch_idx < self._search.num_batches:
            noise = evaluation_noise(hash_seed(self.seed, self.global_step), batch["sample_id"])
            losses = self.objective.block_losses(self.backbone, batch, noise)
            self._clip_sums = self._clip_sums + self._search.sums(*losses)

    def cross_entropy_at(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy [nats] and the number of masked tokens of an evaluation batch.

        Each token is masked with probability `rate`, always the same ones (training/callbacks/masking_rates.py).
        """
        noise = KeyedNoise(self.seed, batch["sample_id"], draw=-8)
        return cross_entropy_at(self.model.objective, self.backbone, self.with_conditioning(batch), rate, noise)

    def with_conditioning(self, batch: Batch, dropped_B: Tensor | None = None) -> Batch:
        """Return `batch` with the class of each text, if the backbone reads classes and the texts have them."""
        if not self.backbone.num_classes or "label" not in batch:
            return batch
        class_id = batch["label"] if dropped_B is None else batch["label"].masked_fill(dropped_B, UNCONDITIONAL)
        return {**batch, "class_id": class_id}

    def on_validation_epoch_start(self) -> None:
        self.valid_nll.reset()
        self._clip_sums = 0.0
        self._class_sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._ema_context = self.averaged()
        self._ema_context.__enter__()

    def on_validation_epoch_end(self) -> None:
        self._ema_context.__exit__(None, None, None)
        nll = self.valid_nll.estimate()
        values = {"val/nll": nll.value, "val/nll_se": nll.se, "val/ppl": nll.exp().value}
        if self.compares_classes:
            sums_3 = self.trainer.strategy.reduce(self._class_sums, reduce_op="sum")
            values |= {f"val/{name}": float(mean_2[0] / mean_2[1]) for name, mean_2 in _means(sums_3).items()}
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
        if self._search and not self.trainer.sanity_checking:
            self._choose_mask_rates(self.trainer.strategy.reduce(self._clip_sums, reduce_op="sum"))

    @property
    def _search(self) -> object | None:
        """The search for the objective's mask rates, if there are candidates."""
        search = self.objective.search
        return search if search and search.candidates else None

    def _choose_mask_rates(self, sums_C3: Tensor) -> None:
        """Continue training with the mask rates at which the loss of a block varies least."""
        now, variances_C = self.objective.sampling_eps, self._search.variances(sums_C3)
        if not self._search.fixed:
            self.objective.clip(*self._search.best(sums_C3))
        low, high = self.objective.sampling_eps
        values = {
            "val/sampling_eps_min": low,
            "val/sampling_eps_max": high,
            "val/block_loss_variance": variances_C[0],
            "val/block_loss_variance_best": variances_C.min(),
        }
        self.log_dict({name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()})
        if self.objective.sampling_eps != now:
            log.info("mask rates from here on: %.3g to %.3g", low, high)

    def start_from(self, checkpoint: Checkpoint, use_ema: bool = True) -> dict[str, nn.Parameter]:
        """Start a new training, and its average, from the (averaged, if `use_ema`) weights of `checkpoint`.

        Returns the parameters that the checkpoint lacks, which may be the model of a part of the backbone.

        Raises:
            ValueError: the weights do not fit the backbone, or a missing parameter is frozen. Nothing is changed then.
        """
        if bigrams := self.backbone.bigrams:  # fitted later, and not part of a training without classes
            own = {f"bigrams.{name}": tensor for name, tensor in bigrams.state_dict().items()}
            checkpoint = replace(checkpoint, state={**own, **checkpoint.state})
        part = self.backbone.part_of(checkpoint.state)
        known = {id(p) for p in part.parameters()}
        new = {name: p for name, p in self.backbone.named_parameters() if id(p) not in known}
        refuse_frozen(self.backbone, new)
        checkpoint.load_into(part, use_ema)
        if self.ema:
            self.ema.restart(self.backbone.parameters())
        return new

    def start_from_counts(
        self, counts_CV: Tensor, before_V: Tensor | None = None, bias_CV: Tensor | None = None
    ) -> None:
        """Start a new training, and its average, at token frequencies (models/class_conditioning.py).

        Raises:
            ValueError: the output layer has no bias or, without `before_V`, does not start near zero, so that its
                outputs would not be those frequencies.
        """
        head = self.backbone.head
        if head.bias is None or (before_V is None and (head.weight.std() > _NEAR_ZERO or head.bias.any())):
            why = "has no bias" if head.bias is None else "has learned something else"
            raise ValueError(
                f"training.start_from_counts=true: the output layer of {type(self.backbone).__name__} {why}, so it "
                "cannot start at token frequencies; leave it out, or use new weights"
            )
        start_from_counts(head, counts_CV, before_V, bias_CV)
        if self.ema:
            self.ema.restart(self.backbone.parameters())

    @torch.no_grad()
    def forget_classes(self) -> None:
        """Tell the trunk nothing of the class, after a training without classes, which leaves an embedding random."""
        for parameter, columns in self.backbone.class_parameters:
            parameter[:, columns] = 0
        if self.ema:
            self.ema.restart(self.backbone.parameters())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the backbone its averaged weights, if any, within the context."""
        self.update_average()
        with self.ema.swapped(self.backbone.parameters()) if self.ema else nullcontext():
            yield

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.update_average()
        by_value = gradient_clip_algorithm == "value"
        self.updates.prepare(optimizer, None if by_value else gradient_clip_val)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        self._average_due = self.ema is not None

    def update_average(self) -> None:
        """Add the newest weights to the average, if their update was made; called before the next update or use."""
        if self._average_due and self.updates.made():
            self.ema.update(self.backbone.parameters())
        self._average_due = False

    def configure_model(self) -> None:
        """Shard the weights and their average over devices for strategy=fsdp."""
        if self.device_mesh is None:
            return
        shard(self, self.backbone.blocks, self.device_mesh["data_parallel"], _FORWARD_METHODS)
        if self.ema:
            self.ema.shard(self.backbone.parameters())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.build_optimizer(self.backbone)
        scheduler = self.build_lr_scheduler(optimizer)
        self._typed_groups = hyperparameters(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self.ema:
            self.ema.to(self.device, self.backbone.parameters())

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            set_hyperparameters(config.scheduler, self._typed_groups)

    def on_train_end(self) -> None:
        self.update_average()

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.update_average()
        checkpoint["identity"] = self.identity
        if self.objective.sampling_eps is not None:  # named as in the reference
            for name, value in zip(MASK_RATES, self.objective.sampling_eps, strict=True):
                checkpoint["state_dict"][name] = torch.tensor(value, dtype=torch.float64)
        if self.ema:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, object]) -> None:
        names = [name.removeprefix("backbone.") for name in checkpoint["state_dict"]]
        check_names(names, self.backbone.state_dict(), "the checkpoint to be resumed")
        found = [checkpoint["state_dict"].pop(name, None) for name in MASK_RATES]
        if self.objective.sampling_eps is not None and None not in found:
            self.objective.clip(*(float(value) for value in found))
        if self.ema and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])


def check_reads(objective: Objective, network: type[Backbone]) -> None:
    """Refuse a network that does not read texts in the direction, blocks or latents of the objective.

    Raises:
        ValueError: with a network that does.
    """
    if objective.causal != network.causal:
        raise ValueError(
            f"the objective {type(objective).__name__} and the backbone {network.__name__} do not fit: "
            "left-to-right likelihoods need a causal backbone and masked diffusion a bidirectional one; use "
            "parameterization=ar backbone=ar (or hf_causal), or neither"
        )
    if issubclass(objective.model_class, BlockDenoiser) and not network.reads_blocks:
        raise ValueError(
            f"parameterization=bd3lm needs a network that reads texts in blocks, and {network.__name__} does not; use "
            "backbone=dit or hf_dit"
        )
    if issubclass(objective.model_class, JointDenoiser) and not network.reads_latents:
        raise ValueError(
            f"algo=mmldlm needs a network that reads texts and latents, and {network.__name__} does not; use "
            "backbone=mmdit"
        )


def _sum_over_devices(sums: Tensor) -> Tensor:
    """Sum in place over all devices. Unlike Lightning's `reduce` it has no barrier, at which the host would wait."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


@torch.no_grad()
def _counts(loss: TokenLoss, batch: Batch, encodes: int) -> dict[str, Tensor]:
    """Return the sums of a micro-batch: its nats, counted, projected and scored tokens, and the means of the loss.

    Masking objectives add `num_masked` and `cross_entropy` per row and pass, (B, P), and the same by part with
    `num_scored` for rows whose parts have their own mask rates.
    """
    logs = {name: value for name, value in loss.logs.items() if name.startswith(("num_", "cross_entropy"))}
    scored_B, tokens = scored_mask(batch).sum(-1), loss.mask_BL.sum()
    # The second encoding of a pass reads the clean text and projects all of it (objectives/d3pm.py).
    projected = logs["num_masked"].sum() + (encodes - 1) * scored_B.sum() if logs else tokens
    return {
        "nll": loss.total().detach(),
        "tokens": tokens,
        "projected": projected,
        "scored_B": scored_B,
        "means": loss.means,
        **logs,
    }


def _means(sums_3: Tensor) -> dict[str, Tensor]:
    """Return the means of the compared classes, each a sum and its denominator."""
    return {"class_cross_entropy": sums_3[[0, 2]], "class_accuracy": sums_3[[1, 2]]}
