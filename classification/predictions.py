"""predictions.parquet: the predictions for every text, for other programs and for later comparisons.

Columns: text_id, text (a hash, by which other runs recognise it), label, prediction, draws (masks per class), margin
(log p of the winner over the runner-up, nats) and margin_se (its Monte Carlo error), and for every class k:
posterior_k, log_p_k (nats), se_k (its Monte Carlo error, most of which is common to the classes). posterior_k is
averaged over the Monte Carlo error (classification/bayes.py, `averaged_posterior`), so it is less extreme than softmax
of log_p_k. Calibrated predictions have calibrated_<method>_k.
Shape suffixes: M texts, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.classification.scoring import ClassScores
from palimpsest.common.files import write_atomically

FILE = "predictions.parquet"


@rank_zero_only
def write_predictions(
    folder: Path,
    scores: ClassScores,
    text_M: np.ndarray,
    posterior_MC: np.ndarray,
    calibrated: Mapping[str, np.ndarray],
) -> None:
    """Write the file into `folder`, atomically, in the first process.

    Args:
        text_M: a hash of each text, by which other runs recognise it.
        calibrated: name -> posterior (M, C).
    """
    columns = {
        "text_id": scores.text_id_M,
        "text": text_M,
        "label": scores.label_M,
        "prediction": posterior_MC.argmax(axis=1),
        "draws": scores.draws_M,
        "margin": scores.margin_M,
        "margin_se": scores.margin_se_M,
    }
    by_class = {"posterior": posterior_MC, "log_p": scores.log_p_MC, "se": scores.se_MC}
    by_class |= {f"calibrated_{name}": values_MC for name, values_MC in calibrated.items()}
    for name, values_MC in by_class.items():
        columns |= {f"{name}_{k}": values_MC[:, k] for k in range(values_MC.shape[1])}
    table = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), table)
    write_atomically(folder / FILE, table.getvalue())


def predictions_file(path: str | Path) -> Path:
    """Return the file that `path` names, itself or by its folder.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"classify.compare: {path} holds no {FILE}; name the folder classify/test of a finished mode=classify run"
        )
    return file


def read_posterior(
    path: Path,
    text_id_M: np.ndarray,
    label_M: np.ndarray,
    text_M: np.ndarray,
    columns: Sequence[str] = ("posterior",),
) -> np.ndarray:
    """Return p(class | text) (M, C) that another run gave to the same texts.

    Args:
        text_M: hashes of the texts; older files have none.
        columns: names of columns without the number of the class; the first that the file has is read.

    Raises:
        ValueError: the file is about other texts.
    """
    table = pq.read_table(path).to_pydict()
    row_of = {text: row for row, text in enumerate(table["text_id"])}
    missing = [text for text in text_id_M.tolist() if text not in row_of]
    if missing:
        raise ValueError(
            f"classify.compare: {path} lacks {len(missing)} of the {len(text_id_M)} texts classified here (such as "
            f"number {missing[0]}); classify the same split there, with no smaller data.max_test_texts"
        )
    rows_M = np.array([row_of[text] for text in text_id_M.tolist()])
    column = next((name for name in columns if f"{name}_0" in table), None)
    if column is None:
        raise ValueError(f"classify.compare: {path} has no column {' or '.join(f'{name}_0' for name in columns)}")
    names = sorted((n for n in table if n.rpartition("_")[0] == column), key=lambda n: int(n.rpartition("_")[2]))
    other_text = "text" in table and (np.asarray(table["text"], dtype=np.uint64)[rows_M] != text_M).any()
    if other_text or (np.asarray(table["label"])[rows_M] != label_M).any():
        raise ValueError(
            f"classify.compare: {path} is about other texts, or has other labels for these; name a run on the same data"
        )
    return np.stack([np.asarray(table[name])[rows_M] for name in names], axis=1)
