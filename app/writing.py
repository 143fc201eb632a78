"""Texts for the page: drawn by the framework's samplers, watched while they are written, played afterwards."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from palimpsest.app.job import check_text, warnings
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Network
from palimpsest.evaluation.drawing import decoded, draw
from palimpsest.evaluation.sampling_inputs import Template
from palimpsest.report.denoising import denoising_page
from palimpsest.report.history import Recorder, samples_of
from palimpsest.report.live import LiveView, live_texts
from palimpsest.report.views import described
from palimpsest.samplers.trace import Trace
from palimpsest.settings.declared import CONFIGS

MOST_TEXTS = 16
_PICTURE_SECONDS = 0.05


@dataclass(frozen=True)
class Wish:
    """What is to be written. text: how texts begin, or a template with gaps. num_texts: how many. settings: keys of
    main.py, sampling.* and `sampler` and `seed` -> values. class_id: what a conditional network is told. pause: seconds
    that a step takes at least."""

    text: str
    num_texts: int
    settings: Mapping[str, object]
    class_id: int | None = None
    pause: float = 0.0


@dataclass(frozen=True)
class Picture:
    """Texts that are being written, as HTML, and how far they are. evaluations: of the network, per text."""

    html: str
    step: int
    masks_left: int
    evaluations: int


@dataclass(frozen=True)
class Written:
    """Texts, and the page that plays their denoising. how: the decoder, in a line. evaluations: of the network, mean
    per text. seconds: of the drawing, without pauses. warnings: what the framework said. command: what writes the same
    from a terminal; None where nothing does."""

    texts: list[str]
    player: str
    how: str
    evaluations: float
    seconds: float
    warnings: list[str]
    command: str | None


def write(networks: Networks, network: Network, wish: Wish, show: Callable[..., None]) -> Written:
    """Draw what is wished for, and `show` Pictures on the way.

    Raises:
        ValueError: as main.py would refuse it; or more than the page takes.
    """
    check_text(wish.text)
    if not 1 <= wish.num_texts <= MOST_TEXTS:
        raise ValueError(f"sampling.num_samples={wish.num_texts}: this page writes 1 to {MOST_TEXTS} texts at once; "
                         "python scripts/generate.py writes more")  # fmt: skip
    with warnings() as heard:
        given = Template.of(wish.text)
        writer = networks.writer(network, {**wish.settings, "sampling.num_samples": wish.num_texts})
        diffusion, data, drawing = (
            writer.diffusion,
            writer.data,
            writer.experiment.build.drawing(writer.diffusion.provenance.length),
        )
        given = replace(drawing.given, prefix=given.prefix, template=given.template)
        drawing = replace(drawing, given=given)
        number = wish.num_texts  # a single batch: only the first is watched
        recorder = Recorder(number, diffusion.objective.process.blank_id)
        watch = _Watch(recorder, LiveView.of(number, diffusion, data, drawing), show, wish.pause)
        start = time.perf_counter()
        drawn = draw(diffusion, data, drawing, number, number, writer.experiment.seed, wish.class_id, watch)
        seconds = time.perf_counter() - start - watch.waited
    samples = samples_of(drawn, data.tokenizer, watch.recorder.histories())
    return Written(
        [decoded(text, given, data.tokenizer) for text in drawn], denoising_page(samples), described(drawing.protocol),
        sum(text.evaluations for text in drawn) / len(drawn), seconds, heard, _command(network, wish, given),
    )  # fmt: skip


@cache
def keys_of(decoder: str) -> frozenset[str]:
    """The keys of `sampling` that a choice of sampling.predictor reads."""
    files = (CONFIGS / "sampler" / f"{decoder}.yaml", CONFIGS / "token_choice" / "model.yaml")
    settings = "".join(file.read_text(encoding="utf-8") for file in files)
    return frozenset(re.findall(r"\$\{sampling\.(\w+)\}", settings))


class _Watch:
    """Records what is written, and shows it."""

    def __init__(self, recorder: Recorder, texts: LiveView, show: Callable[..., None], pause: float) -> None:
        self.recorder, self._texts, self._show, self._pause = recorder, texts, show, pause
        self._shown_at = self.waited = 0.0  # waited: seconds, in all, for the sake of those who watch

    def __call__(self, trace: Trace) -> None:
        self.recorder(trace)
        changed, now = self._texts.update(trace), time.monotonic()
        picture, wait = None, 0.0
        if changed and now - self._shown_at >= min(_PICTURE_SECONDS, self._pause or _PICTURE_SECONDS):
            texts = self._texts
            html = live_texts([list(texts.tokens(row)) for row in texts.rows])
            picture = Picture(html, texts.step, texts.left, texts.evaluations)
            wait, self._shown_at = max(0.0, self._pause - (time.monotonic() - now)), now
        self.waited += wait
        self._show(picture, wait)


def _command(network: Network, wish: Wish, given: Template) -> str | None:
    if wish.class_id is not None:
        return None
    settings = dict(wish.settings)
    words = ["--checkpoint", str(network.path), "--num-samples", str(wish.num_texts)]
    words += ["--seed", str(settings.pop("seed"))] if "seed" in settings else []
    words += ["--prefix", given.prefix] if given.prefix else ["--template", given.template] if given.template else []
    words += [f"{'sampling.predictor' if key == 'sampler' else key}={value}" for key, value in settings.items()]
    return f"python scripts/generate.py {shlex.join(words)}"
