#!/usr/bin/env bash
# D3PM with an absorbing state on LM1B. Published: perplexity 76.9 (Austin et al., arXiv 2107.03006, as quoted in
# arXiv 2406.07524, table 1, on the test set: eval.split=test); not reproduced here. Before its time limit it saves
# and goes back into the queue; the same command resumes it after anything else. Arguments after the script's name are
# passed on.
#SBATCH --job-name=d3pm-lm1b
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
settings=(mode=train model=small data=lm1b parameterization=d3pm T=1000 time_conditioning=true model.length=128
  loader.global_batch_size=512 loader.batch_size=128 trainer.devices=4 strategy=ddp)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
