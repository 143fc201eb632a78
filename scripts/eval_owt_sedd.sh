#!/usr/bin/env bash
# Perplexity of a trained SEDD on OpenWebText. Published: 24.10 (arXiv 2406.07524). Arguments are passed on,
# e.g. eval.checkpoint_path=/path/to/last.ckpt.
#SBATCH --job-name=eval-sedd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=0-04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%j.out
#SBATCH --error=watch_folder/%x_%j.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(mode=ppl_eval model=small data=openwebtext-split parameterization=sedd time_conditioning=true
  model.length=1024
  data.max_train_texts=20000 loader.eval_batch_size=16 eval.num_draws=8)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
