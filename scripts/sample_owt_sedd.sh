#!/usr/bin/env bash
# Samples of a trained SEDD with their generative perplexity under GPT-2 large. Published: 127.1 s for 64 samples of
# 5000 steps on an A5000 (README of kuleshov-group/mdlm). Arguments are passed on, e.g.
# eval.checkpoint_path=/path/to/last.ckpt.
#SBATCH --job-name=sample-sedd
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
settings=(mode=sample_eval model=small data=openwebtext-split parameterization=sedd time_conditioning=true
  model.length=1024
  sampling.predictor=analytic sampling.steps=1000 loader.eval_batch_size=8 sampling.num_sample_batches=2
  eval.compute_generative_perplexity=true data.max_train_texts=20000)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
