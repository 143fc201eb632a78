"""Loading of checkpoints into models, and the initial weights of a training."""

import logging
from dataclasses import dataclass
from typing import Annotated

from palimpsest.common.files import PathOrUrl, exists
from palimpsest.common.values import IF_SET, FilePath, Length
from palimpsest.data.stream import check_same_texts
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion, Provenance
from palimpsest.experiment.building import Builder, with_label
from palimpsest.experiment.runs import Runs
from palimpsest.models.checkpoints import Checkpoint, read_checkpoint, read_progress
from palimpsest.models.compatibility import FUNCTION, check_compatible
from palimpsest.models.freezing import refuse_frozen, summary
from palimpsest.settings.identity import identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Loader of the weights of a configuration's models.

    Args:
        writes: texts are sampled, so block diffusion may exceed the length of its training.
        length: tokens per row.
        from_pretrained: the checkpoint that a new training starts from.
        disable_ema: use the raw weights instead of their average.
    """

    build: Builder
    runs: Runs
    writes: bool
    length: Length
    from_pretrained: Annotated[FilePath, IF_SET] | None
    disable_ema: bool

    def trained(self, data: TextData, checkpoint_path: str, disable_ema: bool) -> Diffusion:
        """Return the model on its device with the weights of `checkpoint_path`, by default those of its own training.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is incompatible.
        """
        path = with_label(checkpoint_path, data.label) or self.runs.model_path()
        if not checkpoint_path and not exists(path):
            raise FileNotFoundError(
                f"this configuration has no trained model at {path}: train it (the same command with mode=train), "
                "or name one with eval.checkpoint_path="
            )
        checkpoint = read_checkpoint(path)
        self._check_length(checkpoint)
        shape = (*FUNCTION, "model.mask_padding", "block_size", "data.segments", "data.segment_room")
        shape += ("model.length",) if "configuration" in checkpoint.identity and not self._any_length() else ()
        check_compatible(checkpoint, identity(self.build.cfg), (*shape, "parameterization"), data)
        self._warn_of_length(checkpoint)
        if not self.writes:
            self._warn_of_other_texts(checkpoint, data)
        diffusion = self.build.diffusion(data)
        checkpoint.load_into(diffusion.backbone, use_ema=not disable_ema)
        diffusion.ema = None
        averaged = checkpoint.ema is not None and not disable_ema
        length = checkpoint.settings.get("model.length")
        diffusion.provenance = Provenance(str(path), checkpoint.step, averaged, length)
        return diffusion.eval().to(self.build.machine.device)

    def _any_length(self) -> bool:
        """Return True if texts may be longer than in training: block diffusion samples with an attention window."""
        return self.build.objective_name == "bd3lm" and self.writes and not self.build.cfg.data.get("segments")

    def _warn_of_other_texts(self, checkpoint: Checkpoint, data: TextData) -> None:
        """Warn if files have changed since the training, because held-out parts that are cut from them change too."""
        ours = {key: value for key, value in identity(self.build.cfg).items() if key.startswith("data.")}
        same = all(checkpoint.settings.get(key, value) == value for key, value in ours.items())
        own = "configuration" in checkpoint.identity and checkpoint.step is not None
        if not own or checkpoint.identity.get("label") != data.label or not same:
            return
        try:
            check_same_texts(read_progress(checkpoint.path).train_size, data.train_size)
        except ValueError as error:
            log.warning("%s\nHeld-out texts may be among those that %s was trained on", error, checkpoint.path)

    def _check_length(self, checkpoint: Checkpoint) -> None:
        """Refuse texts that are too long for a measurement."""
        longest = checkpoint.settings.get("model.length")
        block_diffusion = self.build.objective_name == "bd3lm"
        if block_diffusion and longest and self.length > longest and not self._any_length():
            raise ValueError(
                f"model.length={self.length} is longer than the {longest} tokens that {checkpoint.path} was trained "
                "on; longer texts can be sampled with a window (mode=sample_eval), but not measured, nor can segments"
            )

    def _warn_of_length(self, checkpoint: Checkpoint) -> None:
        longest = checkpoint.settings.get("model.length")
        if longest not in (None, self.length):
            log.warning(
                "model.length=%d: %s was trained on texts of %d tokens; leave model.length out to use that length",
                self.length,
                checkpoint.path,
                longest,
            )

    def load_initial(self, diffusion: Diffusion, data: TextData, shared: PathOrUrl | None) -> PathOrUrl | None:
        """Load the initial weights of a new training, and return their path; None if it starts from random weights.

        The first of these that is set: `shared`, the joint model of all classes (its averaged weights);
        training.from_pretrained; the file that backbone=hf_dit was built from; the Hub model of hf_causal or hf_mlm.
        Incompatible weights are refused before anything changes.
        """
        of_network = with_label(self.build.cfg.backbone.get("checkpoint_path"), data.label)
        named = {
            "classify.pretrain": shared,
            "training.from_pretrained": self.from_pretrained,
            "eval.checkpoint_path": of_network,
        }
        key = next((key for key, path in named.items() if path), None)
        if key is not None:
            checkpoint = read_checkpoint(named[key], key)
            check_compatible(checkpoint, diffusion.identity["configuration"], FUNCTION, data)
        else:
            checkpoint = diffusion.backbone.pretrained()
        if checkpoint is None:
            refuse_frozen(diffusion.backbone, dict(diffusion.backbone.named_parameters()))
            return None
        new = diffusion.start_from(checkpoint, use_ema=shared is not None or not self.disable_ema)
        if new:
            print(f"not in {checkpoint.path}, so initialized: {summary(new)}")
        return checkpoint.path
