#!/usr/bin/env bash
# Texts of 2048 tokens from the published MDLM, window by window. Published: 89.3 s a text on a 3090, generative
# perplexity 27.18 (arXiv 2406.07524). Arguments are passed on, e.g. eval.checkpoint_path=/path/to/last.ckpt.
#SBATCH --job-name=sample-semi-ar
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
settings=(mode=sample_eval data=openwebtext-split model.length=1024 eval.checkpoint_path=kuleshov-group/mdlm-owt
  backbone=hf_dit
  sampling.semi_ar=true sampling.stride_length=512 sampling.num_strides=2 sampling.steps=1000
  loader.eval_batch_size=2 eval.compute_generative_perplexity=true data.max_train_texts=20000)
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py "${settings[@]}" "$@"
