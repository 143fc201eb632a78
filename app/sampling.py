"""Sampling of texts in the app, with live views and a page that replays the denoising."""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from palimpsest.app.job import check_text, collected_warnings
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

MAX_TEXTS = 16
_FRAME_SECONDS = 0.05


@dataclass(frozen=True)
class SamplingRequest:
    """Texts to sample."""

    text: str  # the beginning of each text, or a template with gaps
    num_texts: int
    settings: Mapping[str, object]  # values of the keys `sampling.*`, `sampler` and `seed`
    class_id: int | None = None  # the class to condition on
    pause: float = 0.0  # minimum seconds per step


@dataclass(frozen=True)
class Frame:
    """A live view of unfinished texts, as HTML, with their progress; evaluations: of the network, per text."""

    html: str
    step: int
    masks_left: int
    evaluations: int


@dataclass(frozen=True)
class SamplingResult:
    """Sampled texts."""

    texts: list[str]
    player: str  # a page that replays their denoising
    sampler: str  # in one line
    evaluations: float  # of the network, mean per text
    seconds: float  # without pauses
    warnings: list[str]
    command: str | None  # the same in a terminal, if possible


def sample(networks: Networks, network: Network, request: SamplingRequest, show: Callable[..., None]) -> SamplingResult:
    """Sample the requested texts, with calls of `show(frame, seconds to wait)` on the way.

    Raises ValueError for a setting that main.py would refuse, or too many or too long texts for the app.
    """
    check_text(request.text)
    number = request.num_texts
    if not 1 <= number <= MAX_TEXTS:
        raise ValueError(
            f"sampling.num_samples={number}: this page writes 1 to {MAX_TEXTS} texts at once; "
            "python scripts/generate.py writes more"
        )
    with collected_warnings() as warnings:
        prompt = Template.of(request.text)
        settings = {**request.settings, "sampling.num_samples": number}
        experiment, data, diffusion = networks.sampler(network, settings)
        drawing = experiment.build.drawing(diffusion.provenance.length)
        prompt = replace(drawing.inputs, prefix=prompt.prefix, template=prompt.template)
        drawing = replace(drawing, inputs=prompt)
        recorder = Recorder(number, diffusion.objective.process.blank_id)
        view = _LiveView(recorder, LiveView.of(number, diffusion, data, drawing), show, request.pause)
        start = time.perf_counter()
        # A single batch, because only the first is recorded.
        drawn = draw(diffusion, data, drawing, number, number, experiment.seed, request.class_id, view)
        seconds = time.perf_counter() - start - view.waited
    samples = samples_of(drawn, data.tokenizer, recorder.histories())
    return SamplingResult(
        [decoded(text, prompt, data.tokenizer) for text in drawn],
        denoising_page(samples),
        described(drawing.protocol),
        sum(text.evaluations for text in drawn) / len(drawn),
        seconds,
        warnings,
        _command(network, request, prompt),
    )


@cache
def keys_of(decoder: str) -> frozenset[str]:
    """Return the keys of `sampling` that a choice of sampling.predictor reads."""
    files = (CONFIGS / "sampler" / f"{decoder}.yaml", CONFIGS / "token_choice" / "model.yaml")
    settings = "".join(file.read_text(encoding="utf-8") for file in files)
    return frozenset(re.findall(r"\$\{sampling\.(\w+)\}", settings))


class _LiveView:
    """A watcher of the sampler that records the trace and shows frames of it."""

    def __init__(self, recorder: Recorder, texts: LiveView, show: Callable[..., None], pause: float) -> None:
        self._recorder, self._texts = recorder, texts
        self._show, self._pause = show, pause
        self._shown_at = self.waited = 0.0  # waited: total seconds of pauses

    def __call__(self, trace: Trace) -> None:
        self._recorder(trace)
        changed, now = self._texts.update(trace), time.monotonic()
        frame, wait = None, 0.0
        if changed and now - self._shown_at >= min(_FRAME_SECONDS, self._pause or _FRAME_SECONDS):
            texts = self._texts
            html = live_texts([list(texts.tokens(row)) for row in texts.rows])
            frame = Frame(html, texts.step, texts.left, texts.evaluations)
            wait, self._shown_at = max(0.0, self._pause - (time.monotonic() - now)), now
        self.waited += wait
        self._show(frame, wait)


def _command(network: Network, request: SamplingRequest, prompt: Template) -> str | None:
    if request.class_id is not None:
        return None
    settings = dict(request.settings)
    words = ["--checkpoint", str(network.path), "--num-samples", str(request.num_texts)]
    words += ["--seed", str(settings.pop("seed"))] if "seed" in settings else []
    words += ["--prefix", prompt.prefix] if prompt.prefix else []
    words += ["--template", prompt.template] if prompt.template and not prompt.prefix else []
    words += [f"{'sampling.predictor' if key == 'sampler' else key}={value}" for key, value in settings.items()]
    return f"python scripts/generate.py {shlex.join(words)}"
