"""The tab that samples texts: the settings, the live view, and the replay of the denoising."""

from collections.abc import Callable, Generator, Mapping, Sequence

import gradio as gr

from palimpsest.app.html import USER_ERRORS, error_message, framed, message
from palimpsest.app.job import Jobs, Stopped
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Network
from palimpsest.app.sampling import Frame, SamplingRequest, SamplingResult, keys_of, sample
from palimpsest.report.page import render
from palimpsest.samplers.unmasking import ORDERS, REMASKS, SCHEDULES
from palimpsest.settings.command_line import compose_config

PACES = {"full": 0.0, "brisk": 0.05, "slow": 0.2, "very slow": 1.0}  # minimum seconds per step
QUEUED = {"concurrency_id": "networks", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_ANY_CLASS = -1
_NARROW = {"min_width": 125}
_CHOICES = {"order": ORDERS, "schedule": SCHEDULES, "remask": REMASKS}
_OPTIONAL = ("top_k", "threshold")  # may be empty
_FIELDS = ("order", "schedule", "steps", "temperature", "top_k", "nucleus_p", "remask", "threshold")


class WriteTab:
    """The tab, built within the open gr.Blocks, with its event handlers."""

    def __init__(self, networks: Sequence[Network], loaded: Networks, jobs: Jobs) -> None:
        self._networks = {network.title: network for network in networks}
        self._loaded, self._jobs = loaded, jobs
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=360):
                self._texts()
            with gr.Column(scale=3, min_width=240):
                self._settings()
        inputs = {self.network, self.text, self.number, self.length, self.seed, self.class_id, self.pace, self.decoder,
                 *self.fields.values()}  # fmt: skip
        outputs = [self.go, self.stop, self.status, self.page, self.plain, self.command]
        self.go.click(self._write, inputs, outputs, **QUEUED)
        self.stop.click(self._stop, None, None, **AT_ONCE)
        self.network.change(self._choices, self.network, [self.decoder, self.class_id], **AT_ONCE)
        self.decoder.change(self._visible_fields, self.decoder, list(self.fields.values()), **AT_ONCE)

    def _texts(self) -> None:
        titles = list(self._networks)
        self.network = gr.Dropdown(titles, value=titles[0], label="Network", elem_id="network")
        example = "the plot is …      The [MASK] was {{5}} .      or nothing: a text out of masks alone"
        given = {"elem_id": "given", "elem_classes": "serif", "placeholder": example}
        self.text = gr.Textbox(label="Beginning, or a template", lines=3, **given)
        with gr.Row():
            self.go = gr.Button("Write", variant="primary", elem_id="write", scale=0)
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop-writing", scale=0)
        self.status = gr.HTML(elem_id="written-said", padding=False)
        style = render("live.css.j2")
        self.page = gr.HTML(elem_id="page", css_template=style, apply_default_css=False, padding=False)
        copy = {"buttons": ["copy"], "interactive": False, "visible": False}
        self.plain = gr.Textbox(label="Text", lines=2, max_lines=12, elem_id="plain", elem_classes="serif", **copy)
        self.command = gr.Textbox(label="The same in a terminal", max_lines=4, elem_classes="mono", **copy)

    def _settings(self) -> None:
        title, defaults = next(iter(self._networks)), compose_config([])
        classes, decoders = self._classes(title), self._networks[title].decoders
        self.class_id = gr.Dropdown(classes, value=_ANY_CLASS, label="Class", visible=len(classes) > 1)
        self.decoder = gr.Dropdown(decoders, value=decoders[0], label="Decoder", elem_id="decoder")
        with gr.Row():
            self.fields = {
                name: _field(name, defaults.sampling[name], name in keys_of(decoders[0])) for name in _FIELDS
            }
        with gr.Row():
            self.number = gr.Number(1, label="Texts", precision=0, elem_id="texts", **_NARROW)
            self.length = gr.Textbox(label="Tokens", placeholder="as trained", max_lines=1, elem_id="length", **_NARROW)
            self.seed = gr.Number(defaults.seed, label="Seed", precision=0, elem_id="seed", **_NARROW)
            self.pace = gr.Dropdown(list(PACES), value="brisk", label="Speed", elem_id="pace", **_NARROW)

    def _classes(self, title: str) -> list[tuple[str, int]]:
        return [("any", _ANY_CLASS), *((name, k) for k, name in enumerate(self._loaded.classes(self._networks[title])))]

    def _choices(self, title: str) -> tuple[object, object]:
        classes, decoders = self._classes(title), self._networks[title].decoders
        return (gr.Dropdown(decoders, value=decoders[0]),
                gr.Dropdown(classes, value=_ANY_CLASS, visible=len(classes) > 1))  # fmt: skip

    def _visible_fields(self, decoder: str) -> list[dict]:
        return [gr.update(visible=name in keys_of(decoder)) for name in self.fields]

    def _stop(self, request: gr.Request) -> None:
        self._jobs.stop(request.session_hash)

    def _request(self, values: Mapping[object, object]) -> SamplingRequest:
        decoder = values[self.decoder]
        settings = {"sampler": decoder, "seed": values[self.seed], "sampling.max_length": values[self.length]}
        settings |= {f"sampling.{name}": values[field] for name, field in self.fields.items()
                     if name in keys_of(decoder)}  # fmt: skip
        settings = {key: _number(key, value) for key, value in settings.items() if value not in (None, "")}
        class_id = None if values[self.class_id] in (None, _ANY_CLASS) else values[self.class_id]
        number = 1 if values[self.number] is None else values[self.number]
        return SamplingRequest(values[self.text], number, settings, class_id, PACES[values[self.pace]])

    def _write(self, values: Mapping[object, object], request: gr.Request) -> Generator[dict, None, None]:
        yield {
            self.go: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.page: "",
            self.status: message("reading the network …"),
            self.plain: gr.Textbox(visible=False),
            self.command: gr.Textbox(visible=False),
        }
        idle = {self.go: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}
        network, last = self._networks[values[self.network]], None

        def work(show: Callable[..., None]) -> SamplingResult:
            return sample(self._loaded, network, self._request(values), show)

        running = self._jobs.run(request.session_hash, work)
        try:
            while True:
                last: Frame = next(running)
                yield {self.status: message(_progress(last)), self.page: last.html}
        except StopIteration as done:
            yield idle | self._result(done.value)
        except Stopped:
            yield idle | {self.status: message(f"stopped: {_progress(last)}" if last else "stopped")}
        except USER_ERRORS as error:
            yield idle | {self.status: error_message(error), self.page: ""}
        finally:
            running.close()

    def _result(self, done: SamplingResult) -> dict:
        evaluations = f"{done.evaluations:,.0f} network evaluations" + (" a text" if len(done.texts) > 1 else "")
        facts = f"{done.sampler}  —  {evaluations}, {done.seconds:.2f} s"
        return {self.status: message(facts, done.warnings),
                self.page: framed(done.player, "The denoising, to be played"),
                self.plain: gr.Textbox("\n\n".join(done.texts), visible=True),
                self.command: gr.Textbox(done.command, visible=done.command is not None)}  # fmt: skip


def _field(name: str, default: object, visible: bool) -> gr.Dropdown | gr.Number | gr.Textbox:
    common = {"label": name.replace("_", " ").capitalize(), "elem_id": name, "visible": visible, **_NARROW}
    if name in _CHOICES:
        return gr.Dropdown(list(_CHOICES[name]), value=default, **common)
    if name in _OPTIONAL:
        return gr.Textbox(default, placeholder="none", max_lines=1, **common)
    return gr.Number(default, **common, **({"precision": 0} if name == "steps" else {"step": 0.1}))


def _number(key: str, value: object) -> object:
    """Convert the text of an optional field to a number."""
    if not isinstance(value, str) or not key.endswith(("max_length", *_OPTIONAL)):
        return value
    try:
        return float(value) if key.endswith("threshold") else int(value)
    except ValueError:
        raise ValueError(
            f"{key}={value} must be a {'' if key.endswith('threshold') else 'whole '}number; or leave it empty"
        ) from None


def _progress(frame: Frame) -> str:
    masks = f"{frame.masks_left:,} mask{'s' if frame.masks_left != 1 else ''} left"
    return f"step {frame.step:,}  —  {masks}, {frame.evaluations:,} network evaluations"
