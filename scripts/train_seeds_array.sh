#!/usr/bin/env bash
# One training per seed, as an array: each task has its own seed, so its own folder, log, requeueing and resume.
#   sbatch scripts/train_seeds_array.sh data=wikitext2 model=tiny        # seeds 1 to 5, two at a time
#   sbatch --array=1-20 scripts/train_seeds_array.sh data=wikitext2      # seeds 1 to 20
# Another thing than the seed: a list and its entry, as in scripts/eval_zero_shot_mdlm.sh.
#SBATCH --job-name=seeds
#SBATCH --array=1-5%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%A_%a.out
#SBATCH --error=watch_folder/%x_%A_%a.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(mode=train)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py seed="${SLURM_ARRAY_TASK_ID:-1}" "${settings[@]}" "$@"
