"""Checks of data settings that contradict one another or do not apply to the chosen texts."""


def check_settings(data: object) -> None:
    """Refuse contradictory settings of `data`, a TextData, before anything is read.

    data.train and data.valid (keys of the reference projects) may only name the data set itself, or one that it joins.
    Raises ValueError with the settings and the remedy.
    """
    settings = data.settings
    packing = data.packings["train"]
    known = sorted({settings.name, *getattr(data.source, "sources", ())} - {None})
    for key, value in (("data.train", settings.train), ("data.valid", settings.valid)):
        if value is not None and known and value not in known:
            remedy = f"set data={value}, or leave {key} as it is ({', '.join(known)})"
            raise ValueError(f"{key}={value}: a data set is trained and measured on its own splits; {remedy}")
    truncates, room = packing.long_texts == "truncate", packing.room
    has_all_eos = all(split.eos for split in data.packings.values())
    row_by_row = "data.streaming=true without data.max_train_texts" if data.endless else "data.random_crop=true"
    labels = {"data.label_noise": settings.label_noise, "data.texts_per_class": settings.texts_per_class}
    labels = {key: value for key, value in labels.items() if value}
    of_labels = ", ".join(f"{key}={value}" for key, value in labels.items())
    whole = "data.protocol=reference cuts whole splits into fixed rows"
    mistakes = [
        (settings.protocol is None and settings.num_proc is not None,
         f"data.num_proc={settings.num_proc} belongs to data.protocol=reference; add that, or leave it out"),
        (settings.protocol and settings.streaming, f"{whole}; set data.streaming=false"),
        (settings.protocol and settings.random_crop, f"{whole}; set data.random_crop=false"),
        (labels and settings.streaming,
         f"{of_labels} needs all texts of each class, and data.streaming=true reads some; set data.streaming=false"),
        (labels and data.latents is not None,
         f"{of_labels} with latents=: the latents are fitted on all training texts; leave {', '.join(labels)} out, or "
         "set latents=none"),
        (labels and hasattr(data.source, "sources"),
         f"{of_labels}: data={data.name} joins data sets, and its texts have no labels; leave {', '.join(labels)} out"),
        (settings.random_crop and (not data.wrap or packing.chunk_special),
         "data.random_crop=true crops wrapped text without special tokens; set data.wrap=true and "
         "data.insert_train_special=false"),
        (data.document_mask and not (data.wrap and has_all_eos),
         "data.document_mask=true keeps the documents of wrapped rows apart, by their end tokens; set data.wrap=true "
         "and data.insert_train_eos=data.insert_valid_eos=true, or data.document_mask=false"),
        (data.document_mask and _has_lines(data.source),
         f"data.document_mask=true: the texts of data={data.name} are lines of documents, and would be kept apart from "
         "their own documents; set it to false"),
        (data.fill and (data.wrap or not has_all_eos),
         "data.fill=eos pads each text's row with EOS; set data.wrap=false and "
         "data.insert_train_eos=data.insert_valid_eos=true, or data.fill=null"),
        (data.segments and not data.prompted,
         f"data.segments=true: the texts of data={data.name} have no parts; set it to false"),
        (room is not None and room >= data.length,
         f"data.segment_room={room} leaves no tokens of model.length={data.length} for other parts; lower it"),
        (data.segments and not data.fill,
         "data.segments=true with data.fill=null would show how long each part is; set data.fill=eos"),
        (data.segments and truncates,
         "data.long_texts=truncate might cut a part that others rest on, with data.segments=true; set drop or error"),
        (settings.streaming and data.prompted and truncates,
         "data.long_texts=truncate with data.streaming=true: a prompt that fills its row would end the run; set drop"),
        (data.prefix_length + (packing.bos or packing.chunk_special) >= data.length,
         f"training.prefix_length={data.prefix_length} must leave something of model.length={data.length} to learn"),
        (data.latents is not None and (data.endless or settings.random_crop),
         f"{row_by_row} makes rows while training, and latents need stored rows; leave it out, or set latents=none"),
    ]  # fmt: skip
    for is_mistake, message in mistakes:
        if is_mistake:
            raise ValueError(message)


def _has_lines(source: object) -> bool:
    """Return True if texts are lines of longer documents."""
    parts = getattr(source, "sources", None) or {}
    return getattr(source, "document_start", "") != "" or any(map(_has_lines, parts.values()))
