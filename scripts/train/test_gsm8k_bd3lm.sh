#!/usr/bin/env bash
# The way of train_gsm8k_bd3lm.sh in small, minutes on 2 CPU cores: 100 steps of training on GSM8K, the perplexity of
# a part of its validation split, two samples. Its numbers mean nothing; that it ends does.
# BLOCK_SIZE=4|8|16, DATA_DIR as there. PRETRAIN_CKPT: weights of this small size.
set -euo pipefail
cd "$(dirname "$0")/../.."
BLOCK_SIZE="${BLOCK_SIZE:-4}"
settings=(algo=bd3lm block_size="$BLOCK_SIZE" model=micro model.length=128 data=gsm8k_baseline
  data.max_valid_texts=64 loader.global_batch_size=8 loader.eval_batch_size=8 optim.lr=1e-3
  lr_scheduler.num_warmup_steps=10 trainer.max_steps=100 trainer.val_check_interval=50 trainer.accelerator=cpu
  eval.num_draws=2 sampling.num_sample_batches=1 sampling.num_sample_log=1)
[ -z "${PRETRAIN_CKPT:-}" ] || settings+=(training.from_pretrained="$PRETRAIN_CKPT")
python main.py mode=train "${settings[@]}" "$@"
python main.py mode=ppl_eval "${settings[@]}" "$@"
python main.py mode=sample_eval "${settings[@]}" loader.eval_batch_size=2 "$@"
