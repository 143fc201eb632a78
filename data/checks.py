"""What data may not be: settings that contradict one another, or mean nothing to the texts they are of."""

from __future__ import annotations

from collections.abc import Iterable


def _check_names(known: Iterable[str | None], train: str | None, valid: str | None) -> None:
    """data.train and data.valid (keys of the reference projects) name the data set, or one of those that it joins;
    other values would do nothing."""
    names = [name for name in known if name is not None]
    for key, value in (("data.train", train), ("data.valid", valid)):
        if value is not None and names and value not in names:
            raise ValueError(f"{key}={value}: a data set is trained and measured on its own splits; choose it with "
                             f"data={value}, or leave {key} as it is ({', '.join(sorted(names))})")  # fmt: skip


def check_settings(data: object, names: Iterable[str | None], train: str | None, valid: str | None) -> None:
    """Refuse contradictory settings of texts before anything is read. names, train, valid: of data sets.

    Raises:
        ValueError: settings that contradict one another.
    """
    _check_names(names, train, valid)
    packing = data.packings["train"]
    if data.random_crop and (not data.wrap or packing.chunk_special):
        raise ValueError("data.random_crop=true cuts stretches out of wrapped text, without a begin or an end; "
                         "set data.wrap=true and data.insert_train_special=false")  # fmt: skip
    _check_parts(data)
    if data.prefix_length >= data.length:
        raise ValueError(f"training.prefix_length={data.prefix_length} must leave something of model.length="
                         f"{data.length} to learn")  # fmt: skip
    if data.latents is not None and (data.endless or data.random_crop):
        key = "data.streaming=true without data.max_train_texts" if data.endless else "data.random_crop=true"
        raise ValueError(f"{key} makes rows as it goes, and latents are those of rows that lie still; leave it out, or "
                         "set latents=none")  # fmt: skip


def check_protocol(protocol: str | None, num_proc: int | None, streaming: bool, random_crop: bool) -> None:
    """Refuse settings that do not go together with data.protocol.

    Raises:
        ValueError: the setting, its value and what to set instead.
    """
    if protocol is None:
        if num_proc is not None:
            raise ValueError(f"data.num_proc={num_proc} belongs to data.protocol=reference; add that, or leave it out")
        return
    for key, value in (("data.streaming", streaming), ("data.random_crop", random_crop)):
        if value:
            raise ValueError(f"data.protocol=reference cuts whole splits into fixed rows; set {key}=false")


def _check_parts(data: object) -> None:
    if data.fill and (data.wrap or not all(packing.eos for packing in data.packings.values())):
        raise ValueError("data.fill=eos fills the row of each text behind its EOS; set data.wrap=false and "
                         "data.insert_train_eos=data.insert_valid_eos=true, or data.fill=null")  # fmt: skip
    if data.segments and not data.prompted:
        raise ValueError(f"data.segments=true: the texts of data={data.name} have no parts; set it to false")
    room = data.packings["train"].room
    if room is not None and room >= data.length:
        raise ValueError(f"data.segment_room={room} leaves a row of model.length={data.length} nothing for its other "
                         "parts; lower it")  # fmt: skip
    if data.segments and not data.fill:
        raise ValueError("data.segments=true with data.fill=null would show how long each part is, which a prompt does "
                         "not tell; set data.fill=eos")  # fmt: skip
    if data.segments and data.packings["train"].long_texts == "truncate":
        raise ValueError("data.long_texts=truncate might cut a part that others rest on, with data.segments=true; set "
                         "drop or error")  # fmt: skip
    if data.streaming and data.prompted and data.packings["train"].long_texts == "truncate":
        raise ValueError("data.long_texts=truncate with data.streaming=true: a prompt that fills its row may come "
                         "at any time and would end the run; set drop")  # fmt: skip
