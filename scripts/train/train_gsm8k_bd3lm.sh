#!/usr/bin/env bash
# Block diffusion on GSM8K: sbatch scripts/train/train_gsm8k_bd3lm.sh. Not measured here.
# BLOCK_SIZE=4|8|16 (any divisor of 512). PRETRAIN_CKPT=a .ckpt, a Hub-layout folder or a Hub id, such as
# kuleshov-group/bd3lm-owt-block_size4: the weights to start from; without it training begins from nothing.
# DATA_DIR: where gsm8k/ and gpt2_tokenizer/ lie, for nodes without a network.
# Before its time limit it saves and goes back into the queue; the same command resumes it after anything else.
# Arguments after the script's name are passed on.
#SBATCH --job-name=gsm8k-bd3lm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%j.out
#SBATCH --error=watch_folder/%x_%j.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
BLOCK_SIZE="${BLOCK_SIZE:-4}"
settings=(mode=train algo=bd3lm block_size="$BLOCK_SIZE" model=small data=gsm8k_baseline model.length=512
  loader.global_batch_size=256 loader.batch_size=16 loader.eval_batch_size=16 trainer.max_steps=50000
  trainer.val_check_interval=1000)
[ -z "${PRETRAIN_CKPT:-}" ] || settings+=(training.from_pretrained="$PRETRAIN_CKPT")
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
