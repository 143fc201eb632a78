"""text8: the first 100 million characters of a cleaned Wikipedia (a to z and the space), as a source."""

import copy
import zipfile
from collections.abc import Mapping

import datasets

from palimpsest.common.values import Length, PresentPath
from palimpsest.data.hub import local_folder
from palimpsest.data.rows import check_split, from_table, text_table, with_documents
from palimpsest.data.sources import Source


class Text8:
    """Texts of `chunk` characters each, in order; the last one of a split may be shorter.

    Args:
        parts: a source whose splits are one long text each (HubOrFolder). If `$DATA_DIR/<folder>` has the original,
            `text8` or `text8.zip`, that is used instead.
        sizes: characters of train, validation and test, in this order in the original (90, 5 and 5 million: Tran et
            al., 2019, and all published figures).
    """

    label_names = None

    def __init__(self, parts: Source, folder: PresentPath, chunk: Length, sizes: Mapping[str, int]) -> None:
        self.parts, self.folder = parts, folder
        self.chunk = chunk
        self.sizes = dict(sizes)
        self._drop_last = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def published(self) -> "Text8":
        """Return text8 as the reference projects read it: without the last text of a split if it is shorter."""
        other = copy.copy(self)
        other._drop_last = True
        return other

    def load(self, split: str) -> datasets.Dataset:
        """Return the rows of a split. Raises ValueError if it does not exist or has the wrong size."""
        check_split(split, self.splits)
        text = self._original(split)
        if text is None:
            text = "".join(self.parts.load(split)["text"])
            if len(text) != self.sizes[split]:
                raise ValueError(f"the {split} split of text8 has {self.sizes[split]:,} characters, not {len(text):,}")
        end = len(text) - len(text) % self.chunk if self._drop_last else len(text)
        table = text_table([text[at : at + self.chunk] for at in range(0, end, self.chunk)])
        return from_table(next(with_documents([table], None)))

    def _original(self, split: str) -> str | None:
        """Return the split's part of the original, if there is one. Bytes are characters, since all are ASCII."""
        folder = local_folder(self.folder)
        found = [folder / name for name in ("text8", "text8.zip") if folder and (folder / name).is_file()]
        if not found:
            return None
        path = found[0]
        whole = zipfile.Path(path, "text8").read_bytes() if path.suffix == ".zip" else path.read_bytes()
        if len(whole) != sum(self.sizes.values()):
            raise ValueError(f"{path} has {len(whole):,} characters; text8 has {sum(self.sizes.values()):,}")
        before = list(self.sizes)[: list(self.sizes).index(split)]
        start = sum(self.sizes[name] for name in before)
        return whole[start : start + self.sizes[split]].decode("ascii")
