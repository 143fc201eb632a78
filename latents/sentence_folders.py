"""What a folder of sentence-transformers says of its encoder: where the network lies, how tokens become one vector.

Read are `modules.json` and the configurations that it names; no code of a folder is ever run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

POOLINGS = ("mean", "cls", "last")
# The names of the library, as flags and as words.
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
            "mean": "mean", "cls": "cls", "lasttoken": "last"}  # fmt: skip


@dataclass(frozen=True)
class SentenceFolder:
    """network: the folder of the transformer. pooling: one of POOLINGS. normalize: vectors have norm 1. window: most
    tokens, special ones included. lower: texts are put into small letters first. prompt: what stands before each text.
    None, False or "" where the folder does not say."""

    network: Path
    pooling: str | None = None
    normalize: bool = False
    window: int | None = None
    lower: bool = False
    prompt: str = ""


def read_folder(folder: Path) -> SentenceFolder:
    """What `folder` says; of one without modules.json only that it is the network's.

    Raises:
        ValueError: it asks for something that is not done here, so that its vectors would be others than its own.
    """
    if not (folder / "modules.json").is_file():
        return SentenceFolder(folder)
    kinds = [(str(module["type"]).rpartition(".")[2], folder / module["path"])
             for module in sorted(_read(folder / "modules.json"), key=lambda module: module["idx"])]  # fmt: skip
    names = [name for name, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"latents.name_or_path={folder} is made of {', '.join(names)}; only Transformer, Pooling and Normalize are "
            "known here, so choose another encoder, or give its vectors with latents=file"
        )
    network = kinds[0][1]
    said = _read(network / "sentence_bert_config.json", {})
    whole = _read(folder / "config_sentence_transformers.json", {})
    prompt = (whole.get("prompts") or {}).get(whole.get("default_prompt_name"), "")
    pooling = _read(kinds[1][1] / "config.json")
    if prompt and pooling.get("include_prompt", True) is False:
        raise ValueError(f"latents.name_or_path={folder} leaves its prompt {prompt!r} out when it pools, which is not "
                         "done here; choose another encoder, or give its vectors with latents=file")  # fmt: skip
    return SentenceFolder(network, _pooling(pooling, folder), "Normalize" in names, said.get("max_seq_length"),
                          bool(said.get("do_lower_case")), prompt or "")  # fmt: skip


def _pooling(said: dict[str, object], folder: Path) -> str:
    modes = [name for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
    word = said.get("pooling_mode")
    modes = modes or ([word] if isinstance(word, str) else list(word or []))
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(f"latents.name_or_path={folder} pools by {', '.join(map(str, modes)) or 'nothing'}, and only "
                         f"one of {', '.join(POOLINGS)} is known here; choose another encoder, or give its vectors "
                         "with latents=file")  # fmt: skip
    return _POOLING[modes[0]]


def _read(path: Path, absent: object = None) -> object:
    if absent is not None and not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download the encoder again") from error
