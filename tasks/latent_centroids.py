"""Classification through latents: the class whose centroid is nearest to the latent that a network draws for a text.

Shape suffixes: R rows of a split, M texts, K latent tokens, D numbers of each, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palimpsest.classification.centroids import fit_centroids
from palimpsest.classification.measures import measure
from palimpsest.samplers.gaussian import LatentSteps
from palimpsest.tasks.base import Experiment
from palimpsest.tasks.class_models import Hypothesis
from palimpsest.tasks.class_scoring import ClassScores
from palimpsest.tasks.directions import Directed, Setting, choose, latents_of
from palimpsest.tasks.editing import labelled_latents
from palimpsest.tasks.latent_measures import flat
from palimpsest.tasks.verdicts import Method


def nearest_centroid(
    experiment: Experiment, hypotheses: Sequence[Hypothesis], data: object, split: str, scores: ClassScores,
    log_prior_C: np.ndarray, how: LatentSteps,
) -> Method:  # fmt: skip
    """Latents of every text of `split`, drawn without telling a class and averaged over a text's windows and over the
    networks, where each class has one; held against the centroids of the train split's own latents."""
    networks = list(dict.fromkeys(h.diffusion for h in hypotheses))
    table = data.split(split)
    chosen = choose(data, split, len(table), experiment.seed, networks[0].objective.process.blank_id)
    trainer, every_R = experiment.trainer("latents of texts"), np.arange(len(table))
    drawn = [latents_of(Setting(experiment, Directed(latent=how), trainer, network, data, split, len(table), 1),
                        chosen.rows, chosen.blanks, chosen.names_M, every_R, how) for network in networks]  # fmt: skip
    latent_RF = flat(np.mean(drawn, axis=0))
    row_M = np.searchsorted(scores.text_id_M, np.asarray(table["text_id"]))
    windows_M = np.bincount(row_M, minlength=len(scores.text_id_M))
    latent_MF = np.zeros((len(windows_M), latent_RF.shape[1]))
    np.add.at(latent_MF, row_M, latent_RF)
    train = ((flat(latent_NKD), label_N) for latent_NKD, label_N in labelled_latents(data))
    centroids = fit_centroids(train, len(data.label_names))
    posterior_MC = centroids.posterior(latent_MF / windows_M[:, None], log_prior_C)
    evaluations = float(windows_M.mean()) * len(networks) * how.steps * (1 if how.guidance in (0, 1) else 2)
    return Method(NAME, posterior_MC, measure(posterior_MC, scores.label_M), evaluations)


NAME = "nearest class centroid of the text's latent"
