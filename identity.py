"""What makes two trainings the same one: the part of the configuration that determines the weights."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from contradictions import law

# Budgets, devices and bookkeeping are left out: they may change at a resume.
IDENTITY = ("data", "latents", "model", "backbone", "parameterization", "noise", "masking", "T", "subs_masking",
            "time_conditioning", "optim", "lr_scheduler", "plateau", "training", "seed", "loader.global_batch_size",
            "loader.batch_ramp", "trainer.gradient_clip_val")  # fmt: skip
NOT_IDENTITY = ("data.label", "data.cache_dir", "model.attn_backend", "backbone.attn_backend",
                "lr_scheduler.num_training_steps", "data.max_valid_texts", "data.max_test_texts",
                "backbone.resumed", "training.max_skipped_steps", "training.gradient_checkpointing",
                "training.sampling_eps_min", "training.sampling_eps_max", "training.clip_search_widths",
                "training.clip_search_delta", "training.fix_clipping", "parameterization.block_size",
                "data.judge._target_", "data.judge._partial_", "data.judge.kind", "latents.batch_size")  # fmt: skip
# Of the keys of training that NOT_IDENTITY has, parameterization=bd3lm has its own copy.
IDENTITY_IF_SET = ("training.from_pretrained", "training.freeze", "training.start_from_counts", "loader.batch_ramp",
                   "training.resample", "masking.resample", "parameterization.noising.resample", "data.fill",
                   "data.segments", "data.prompt_column", "data.source.prompt_column")  # fmt: skip
# Of texts that only classify.pretrain reads.
IDENTITY_IF_PRETRAINED = ("data.source.files.unsupervised", "data.source.hub_splits.unsupervised",
                          "data.source.unlabelled")  # fmt: skip


def identity(cfg: DictConfig) -> dict[str, object]:
    """The part of the configuration that determines the weights, flat: key as typed -> value."""
    flat: dict[str, object] = {}
    pretrained = cfg.classify.pretrain or cfg.data.get("train_splits")
    left_out = NOT_IDENTITY if pretrained else (*NOT_IDENTITY, *IDENTITY_IF_PRETRAINED)
    left_out = left_out if cfg.data.get("segments") else (*left_out, "data.segment_room")

    def visit(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                visit(f"{prefix}.{name}", child)
        elif prefix not in left_out and (node or prefix not in IDENTITY_IF_SET):
            flat[prefix] = node

    for key in IDENTITY:
        node = OmegaConf.select(cfg, key)
        visit(key, OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node)
    if cfg.data.streaming and cfg.data.get("max_train_texts") is None:
        flat |= {f"streaming.{key}": value for key, value in cfg.streaming.items() if key != "_target_"}
    if cfg.classify.sharing == "conditional":
        flat |= {f"classify.{key}": cfg.classify[key] for key in ("sharing", "label_dropout")}
    if cfg.classify.pretrain:
        flat |= {f"classify.{key}": cfg.classify[key] for key in ("pretrain", "pretrain_steps")}
    objective = law(cfg)
    flat |= {"block_size": cfg.block_size} if objective == "bd3lm" else {}
    return {**flat, "parameterization": objective}
