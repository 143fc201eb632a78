"""Arguments of objects that the code builds without a `_target_`, and the configuration keys they come from.

All other objects are named by a `_target_` in configs/, next to their arguments.
"""

_TEXTS = ("tokenizer_name_or_path", "tokenizer_folder", "vocab_size", "mask_token", "name", "train", "valid",
          "streaming", "document_mask", "random_crop", "wrap", "insert_train_special", "insert_valid_special",
          "insert_train_eos", "insert_valid_eos", "score_special", "fill", "segments", "segment_room", "long_texts",
          "drop_empty", "label", "max_train_texts", "max_valid_texts", "max_test_texts", "label_noise",
          "texts_per_class", "train_splits", "protocol", "num_proc", "cache_dir")  # fmt: skip
_TRAINER = ("num_sanity_val_steps", "max_steps", "log_every_n_steps", "limit_train_batches", "limit_val_batches",
            "limit_test_batches", "val_check_interval", "fast_dev_run", "gradient_clip_val", "gradient_clip_algorithm",
            "benchmark", "deterministic", "detect_anomaly", "min_steps", "profiler", "max_time")  # fmt: skip


def _in(group: str, *names: str) -> dict[str, str]:
    """Return the keys of arguments that are called as in a group of the configuration."""
    return {name: f"{group}.{name}" for name in names}


# Component -> its argument -> the key.
WIRING: dict[str, dict[str, str]] = {
    "palimpsest.dataloader.Texts": {
        "length": "model.length",
        "prefix_length": "training.prefix_length",
        "first_given": "training.ignore_bos",
        **_in("data", *_TEXTS),
    },
    "palimpsest.dataloader.Batches": {
        "global_batch_size": "loader.global_batch_size",
        "batch_ramp": "loader.batch_ramp",
        "max_steps": "trainer.max_steps",
        "seed": "seed",
    },
    "palimpsest.data.loading.Loading": _in(
        "loader", "num_workers", "prefetch_factor", "pin_memory", "persistent_workers"
    ),
    "palimpsest.training.machine.Machine": {
        "accelerator": "trainer.accelerator",
        "devices_per_node": "trainer.devices",
        "num_nodes": "trainer.num_nodes",
        "typed_precision": "trainer.precision",
        "accumulate_grad_batches": "trainer.accumulate_grad_batches",
        **_in("loader", "batch_size", "eval_batch_size", "global_batch_size", "eval_global_batch_size"),
        "ramp": "loader.batch_ramp",
    },
    "palimpsest.training.trainer.Arguments": _in("trainer", *_TRAINER),
    "palimpsest.diffusion.Diffusion": {
        "ema": "training.ema",
        "seed": "seed",
        **_in("classify", "label_dropout", "discriminative_weight"),
    },
    "palimpsest.evaluation.likelihood.Precision": _in("eval", "num_draws", "target_se", "max_draws"),
    "palimpsest.evaluation.sampling_inputs.Template": _in("sampling", "prefix", "template", "max_length"),
    "palimpsest.experiment.runs.Runs": {
        "output_dir": "output_dir",
        "data_name": "data.name",
        "model_name": "model.name",
        "label": "data.label",
        "save_dir": "checkpointing.save_dir",
        "resume": "checkpointing.resume_from_ckpt",
        "resume_path_typed": "checkpointing.resume_ckpt_path",
        "max_steps": "trainer.max_steps",
        "class_patience": "classify.patience",
        "fast_dev_run": "trainer.fast_dev_run",
    },
    "palimpsest.experiment.weights.Weights": {
        "length": "model.length",
        "from_pretrained": "training.from_pretrained",
        "disable_ema": "eval.disable_ema",
    },
    "palimpsest.experiment.building.Choices": {
        **_in("classify", "sharing", "bigrams", "pretrain", "pretrain_steps", "pretrain_lr_factor"),
        **_in("training", "freeze", "gradient_checkpointing", "start_from_counts", "max_skipped_steps"),
        "compile": "trainer.compile",
        "max_failed_saves": "checkpointing.max_failed_saves",
        "checkpoint_path": "eval.checkpoint_path",
    },
}
# Groups whose components the code builds directly; others are built if one of these refers to them.
ROOTS = ("mode", "backbone", "parameterization", "process", "sampler", "estimator", "optim", "lr_scheduler",
         "strategy", "callbacks", "logger", "plateau", "latents", "streaming", "data.source", "data.truth",
         "data.judge")  # fmt: skip
