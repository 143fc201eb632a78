#!/usr/bin/env bash
# MDLM on OpenWebText. Published: perplexity 23.21 after 262B tokens (arXiv 2406.07524); not reproduced here. Before
# its time limit it saves and goes back into the queue; the same command resumes it after anything else. Arguments
# after the script's name are passed on.
#SBATCH --job-name=mdlm-owt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=4
#SBATCH --time=7-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%j.out
#SBATCH --error=watch_folder/%x_%j.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(mode=train model=small data=openwebtext-split parameterization=subs model.length=1024
  loader.global_batch_size=512 loader.batch_size=16 loader.eval_batch_size=16 trainer.devices=8 strategy=ddp)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
