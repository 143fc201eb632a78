#!/usr/bin/env bash
# Zero-shot perplexities of an MDLM trained on OpenWebText, one array task per data set. Published (arXiv
# 2406.07524): ptb 95.26, wikitext103 32.83, lm1b-gpt2 67.01, lambada 47.52, ag_news 61.15, pubmed 41.89, arxiv
# 37.37. data.protocol=reference makes the rows of that paper's code, on the splits that it measured; how many
# processes prepared them is not published (data.num_proc). Arguments are passed on, e.g.
# eval.checkpoint_path=/path/to/last.ckpt.
#SBATCH --job-name=eval-zero-shot
#SBATCH --array=0-6
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=0-04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=watch_folder/%x_%A_%a.out
#SBATCH --error=watch_folder/%x_%A_%a.err
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(mode=ppl_eval model=small parameterization=subs model.length=1024 data.max_train_texts=20000
  loader.eval_batch_size=16 eval.num_draws=8 eval.checkpoint_path=kuleshov-group/mdlm-owt backbone=hf_dit)
data=(ptb wikitext103 lm1b-gpt2 lambada ag_news scientific_papers_pubmed scientific_papers_arxiv)
name="${data[${SLURM_ARRAY_TASK_ID:-0}]}"
case $name in # the reference measures these two on their test set, AG News wrapped
  lm1b-gpt2) settings+=(eval.split=test) ;;
  ag_news) settings+=(eval.split=test data.wrap=true) ;;
esac
exec ${SLURM_JOB_ID:+srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1}} python -u main.py data="$name" data.protocol=reference "${settings[@]}" "$@"
