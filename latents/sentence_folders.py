"""The settings of an encoder in a folder of sentence-transformers: where its network is, and how it pools tokens.

Only `modules.json` and the configurations that it names are read; code of a folder is never run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

POOLINGS = ("mean", "cls", "last")
# The library's names, as flags and as words.
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
            "mean": "mean", "cls": "cls", "lasttoken": "last"}  # fmt: skip


@dataclass(frozen=True)
class SentenceFolder:
    """The settings of a folder; None, False or "" if it does not have them."""

    network: Path  # folder of the transformer
    pooling: str | None = None  # one of POOLINGS
    normalize: bool = False  # vectors have norm 1
    window: int | None = None  # largest number of tokens, special ones included
    lower: bool = False  # texts are lowercased first
    prompt: str = ""  # text before each text


def read_folder(folder: Path) -> SentenceFolder:
    """Read the settings of `folder`; without modules.json it is the folder of the network itself. Raises ValueError if
    it needs something that is not implemented here, so that the vectors would differ from its own."""
    if not (folder / "modules.json").is_file():
        return SentenceFolder(folder)
    kinds = [(str(module["type"]).rpartition(".")[2], folder / module["path"])
             for module in sorted(_read(folder / "modules.json"), key=lambda module: module["idx"])]  # fmt: skip
    names = [name for name, _ in kinds]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"latents.name_or_path={folder} consists of {', '.join(names)}; only Transformer, Pooling and Normalize "
            "are known here; choose another encoder, or give its vectors with latents=file"
        )
    network = kinds[0][1]
    transformer = _read(network / "sentence_bert_config.json", {})
    top = _read(folder / "config_sentence_transformers.json", {})
    prompt = (top.get("prompts") or {}).get(top.get("default_prompt_name"), "")
    pooling = _read(kinds[1][1] / "config.json")
    if prompt and pooling.get("include_prompt", True) is False:
        raise ValueError(
            f"latents.name_or_path={folder} excludes its prompt {prompt!r} from pooling, which is not "
            "possible here; choose another encoder, or give its vectors with latents=file"
        )
    return SentenceFolder(
        network,
        _pooling(pooling, folder),
        "Normalize" in names,
        transformer.get("max_seq_length"),
        bool(transformer.get("do_lower_case")),
        prompt or "",
    )


def _pooling(config: dict[str, object], folder: Path) -> str:
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    word = config.get("pooling_mode")
    modes = modes or ([word] if isinstance(word, str) else list(word or []))
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(
            f"latents.name_or_path={folder} pools by {', '.join(map(str, modes)) or 'nothing'}, and only one of "
            f"{', '.join(POOLINGS)} is known here; choose another encoder, or give its vectors with latents=file"
        )
    return _POOLING[modes[0]]


def _read(path: Path, absent: object = None) -> object:
    if absent is not None and not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download the encoder again") from error
