#!/usr/bin/env bash
# The autoregressive baseline on LM1B, one padded sentence a row. Published: perplexity 22.32 after 33B tokens (arXiv
# 2406.07524, table 1, on the test set: eval.split=test); not reproduced here. Before its time limit it saves and goes
# back into the queue; the same command resumes it after anything else. Arguments after the script's name are passed
# on.
#SBATCH --job-name=ar-lm1b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=4
#SBATCH --time=4-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%j.out
#SBATCH --error=watch_folder/%x_%j.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(mode=train model=small-ar backbone=ar parameterization=ar data=lm1b model.length=128
  loader.global_batch_size=512 loader.batch_size=128 trainer.devices=4 strategy=ddp)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
