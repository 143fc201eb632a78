"""Generative classification: where the class of a text is decided, in reading order.

1. models: one model per class, or one network conditioned on the class.
2. scoring: log p(text | class) of every text under every class, with the same masks.
3. sequential_test: which texts need further draws.
4. bayes: p(class | text), averaged over the Monte Carlo error. This is the decision.
5. calibration: what a validation split says about the probabilities.
6. methods, baselines, ensembles: what is compared with it; measures: accuracy, log loss, ECE, abstention.
7. results: everything found about a split; predictions: the file with one row per text.
8. attributions: what each token contributes; typical, other_texts: texts unlike the data.
"""
