"""Classification by latents: the class whose centroid is nearest to the latent sampled for a text.

Shape suffixes: R rows of a split, M texts, K latent tokens, D numbers of each, C classes.
"""

from collections.abc import Sequence

import numpy as np

from palimpsest.classification.models import ClassModel
from palimpsest.classification.scoring import ClassScores
from palimpsest.dataloader import TextData
from palimpsest.evaluation.centroids import fit_centroids
from palimpsest.evaluation.conditional_generation import choose, latents_of
from palimpsest.evaluation.drawing import SamplingContext
from palimpsest.evaluation.editing import labelled_latents
from palimpsest.evaluation.experiment import Experiment
from palimpsest.evaluation.latent_measures import flat
from palimpsest.samplers.gaussian import LatentSteps


def nearest_centroid(
    experiment: Experiment,
    models: Sequence[ClassModel],
    data: TextData,
    split: str,
    scores: ClassScores,
    log_prior_C: np.ndarray,
    how: LatentSteps,
) -> tuple[np.ndarray, float]:
    """Return p(class | text) (M, C) by latents sampled for the texts, and the network evaluations per text.

    Latents are sampled without class conditioning, averaged over a text's windows and over the networks, and compared
    with the class centroids of the train split's own latents.
    """
    networks = list(dict.fromkeys(model.diffusion for model in models))
    table = data.split(split)
    chosen = choose(data, split, len(table), experiment.seed, networks[0].objective.process.blank_id)
    trainer, every_R = experiment.trainer("latents of texts"), np.arange(len(table))
    contexts = [
        SamplingContext(trainer, network, data, experiment.build.drawing(), experiment.seed) for network in networks
    ]
    sampled = [latents_of(context, chosen.rows, chosen.blanks, chosen.key_M, every_R, how) for context in contexts]
    latent_RF = flat(np.mean(sampled, axis=0))
    row_M = np.searchsorted(scores.text_id_M, np.asarray(table["text_id"]))
    windows_M = np.bincount(row_M, minlength=len(scores.text_id_M))
    latent_MF = np.zeros((len(windows_M), latent_RF.shape[1]))
    np.add.at(latent_MF, row_M, latent_RF)
    train = ((flat(latent_NKD), label_N) for latent_NKD, label_N in labelled_latents(data))
    centroids = fit_centroids(train, len(data.label_names))
    posterior_MC = centroids.posterior(latent_MF / windows_M[:, None], log_prior_C)
    return posterior_MC, float(windows_M.mean()) * len(networks) * how.evaluations
