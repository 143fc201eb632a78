#!/usr/bin/env bash
# MDLM on LM1B, one padded sentence a row. Published: perplexity 27.04 after 33B tokens, 23.00 after 327B (arXiv
# 2406.07524, table 1, on the test set: eval.split=test); not reproduced here. Before its time limit it saves and goes
# back into the queue; the same command resumes it after anything else. Arguments after the script's name are passed
# on.
#SBATCH --job-name=mdlm-lm1b
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
settings=(mode=train model=small data=lm1b parameterization=subs model.length=128
  loader.global_batch_size=512 loader.batch_size=128 trainer.devices=4 strategy=ddp)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
