#!/usr/bin/env bash
# IMDB by Bayes' rule, from nothing to the report: shared start, a model conditioned on the class, test reviews, baselines.
#   DATA_DIR=/data bash scripts/train_imdb_classifier.sh
# Start it again after any interruption: it resumes in the middle of whatever it was doing, and what is complete is kept.
# On a laptop, a network of 2.5 M weights, in an hour and a half on 2 CPU cores:
#   DATA_DIR=/data bash scripts/train_imdb_classifier.sh experiment=imdb_classifier_cpu
# What to expect: docs/results.md. The 12 x 768 model has not been run yet (configs/experiment/imdb_classifier.yaml).
# Needs DATA_DIR with imdb/ (and gpt2_tokenizer/ for the large models), or a network. Arguments are passed on.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
settings=(experiment=imdb_classifier)
for argument in "$@"; do
  if [[ "$argument" == experiment=* ]]; then settings=(); fi
done
exec python main.py "${settings[@]}" "$@"
