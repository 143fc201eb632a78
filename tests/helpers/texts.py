"""Data of a few words, for tests."""

from __future__ import annotations

from dataclasses import fields

from palimpsest.data.sources import Source
from palimpsest.dataloader import Batches, TextData, Texts

SETTINGS = frozenset(field.name for kind in (Texts, Batches) for field in fields(kind))


def text_data(source: Source, **settings: object) -> TextData:
    """Return the data of a source, with settings of its texts and its batches."""
    of_batches = {field.name for field in fields(Batches)}
    batches = {name: value for name, value in settings.items() if name in of_batches and value is not None}
    texts = {name: value for name, value in settings.items() if name not in of_batches}
    return TextData(source, Texts(**texts), Batches(**batches))
