"""Detection of texts from elsewhere by p(text), beside detection by the largest posterior.

Simple texts can be more likely than those of the data (Nalisnick et al. 2019, arXiv 1810.09136). So texts are also
ranked by how far they are from typical likelihoods, in both directions (Nalisnick et al. 2019, arXiv 1906.02994).

Shape suffixes: M texts.
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.classification.bayes import posterior
from palimpsest.classification.measures import auroc, top_log_odds
from palimpsest.classification.scoring import ClassScores
from palimpsest.classification.typical import nats_per_token
from palimpsest.common.metrics import Estimate
from palimpsest.data.files import Columns, read_files, readable_files
from palimpsest.dataloader import TextData, with_texts

SPLIT = "other texts"
_SETTING = "classify.other_texts"


def with_other_texts(data: TextData, path: str, split: str) -> TextData:
    """Return `data` with an additional split: the texts of files, at most as many as `split` has.

    Of more texts a fixed random choice is taken. They are packed like those of `split`, but long ones are cut where
    data.long_texts=error would refuse them. Their class is unknown.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the files cannot be read or hold no text; the texts do not fit the settings of the data.
    """
    if split == "validation":
        raise ValueError(
            f"{_SETTING}={path} compares with the likelihoods of validation texts, which classify.split=validation "
            "would report; leave one of them out"
        )
    if data.latents is not None:
        raise ValueError(f"{_SETTING}={path}: these texts have no latents; set it to null, or latents=none")
    tables = read_files(readable_files(path, _SETTING), _SETTING, Columns())
    texts = [text for table in tables for text in table.column("text").to_pylist()]
    if len(texts) < 2:
        number = "one text" if texts else "no text"
        raise ValueError(f"{_SETTING}={path} holds {number}, and an area with its error needs two; name more texts")
    chosen = np.sort(np.random.default_rng(0).permutation(len(texts))[: len(data.texts(split))])
    return with_texts(data, SPLIT, [texts[i] for i in chosen], cut_long=True)


@dataclass(frozen=True)
class Detection:
    """Separation of other texts from those of the split: the probability that another text ranks as more unusual."""

    own_M: np.ndarray  # nats per token of the split's texts
    other_M: np.ndarray  # of the other texts
    typical: float  # median of validation texts, nats per token
    by_likelihood: Estimate  # area under the ROC curve; unusual: the least likely
    by_typicality: Estimate  # unusual: the farthest from the typical likelihood, in both directions
    by_posterior: Estimate  # unusual: the smallest largest posterior, as a classifier without p(text) would have it

    def results(self) -> dict[str, object]:
        """Return the numbers for results.json."""
        return {
            "texts": len(self.other_M), "median_nats_per_token": float(np.median(self.other_M)),
            "median_nats_per_token_of_validation": self.typical, "auroc_of_likelihood": self.by_likelihood,
            "auroc_of_typicality": self.by_typicality, "auroc_of_largest_posterior": self.by_posterior,
        }  # fmt: skip


def detect(scores: ClassScores, other: ClassScores, validation: ClassScores, log_prior_C: np.ndarray) -> Detection:
    """Measure how well p(text), its typicality and the largest posterior separate other texts from those of the
    split."""
    own_M, other_M, validation_M = (nats_per_token(one, log_prior_C) for one in (scores, other, validation))
    typical = float(np.median(validation_M))
    # The averaged posterior of a text depends on the other texts, so Bayes' rule on the estimates is compared.
    surety_M, other_surety_M = (top_log_odds(posterior(one.log_p_MC, log_prior_C)) for one in (scores, other))
    return Detection(
        own_M,
        other_M,
        typical,
        auroc(other_M, own_M),
        auroc(np.abs(other_M - typical), np.abs(own_M - typical)),
        auroc(-other_surety_M, -surety_M),
    )
