"""The tab that classifies a text: live class probabilities, and token attributions."""

from collections.abc import Generator, Mapping, Sequence
from functools import partial

import gradio as gr

from palimpsest.app.classifying import ClassifyRequest, ClassifyResult, classify
from palimpsest.app.html import USER_ERRORS, error_message, framed, message
from palimpsest.app.job import Jobs, Stopped
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Classifier
from palimpsest.app.write_tab import AT_ONCE, QUEUED
from palimpsest.settings.command_line import compose_config

_NONE = (
    "None of these networks classifies. `python main.py mode=classify` trains a model for each class, or one "
    "conditioned on the class (`classify.sharing=conditional`); start the page with `--checkpoint` and its folder."
)


class ClassifyTab:
    """The tab, built within the open gr.Blocks, with its event handlers."""

    def __init__(self, classifiers: Sequence[Classifier], loaded: Networks, jobs: Jobs) -> None:
        self._classifiers = {str(c.folder): c for c in classifiers}
        self._loaded, self._jobs = loaded, jobs
        if not classifiers:
            gr.Markdown(_NONE)
            return
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=360):
                titles = list(self._classifiers)
                self.models = gr.Dropdown(titles, value=titles[0], label="Models of the classes", elem_id="models")
                self.text = gr.Textbox(
                    label="Text", lines=4, elem_id="classified", elem_classes="serif", placeholder="a text to classify"
                )
                with gr.Row():
                    self.go = gr.Button("Classify", variant="primary", elem_id="classify", scale=0)
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop-classifying", scale=0)
                self.status = gr.HTML(elem_id="classified-said", padding=False)
                self.prediction = gr.HTML(elem_id="verdict", apply_default_css=False, padding=False)
                self.attributions = gr.HTML(elem_id="evidence", apply_default_css=False, padding=False)
            with gr.Column(scale=3, min_width=240):
                self._settings()
        inputs = {self.models, self.text, self.draws, self.confidence, self.prior, self.seed}
        outputs = [self.go, self.stop, self.status, self.prediction, self.attributions]
        self.go.click(self._classify, inputs, outputs, **QUEUED)
        self.stop.click(self._stop, None, None, **AT_ONCE)

    def _settings(self) -> None:
        defaults = compose_config([])
        self.draws = gr.Number(
            defaults.classify.num_draws, label="Masks for each class, at most", precision=0, elem_id="draws"
        )
        self.confidence = gr.Number(
            defaults.classify.confidence, label="Enough when so certain; 1: never", step=0.01, elem_id="confidence"
        )
        priors = [("uniform", "uniform"), ("shares of the training texts", "empirical")]
        self.prior = gr.Dropdown(priors, value="uniform", label="Prior")
        self.seed = gr.Number(defaults.seed, label="Seed", precision=0)
        fields = (self.draws, self.confidence, self.seed)
        self._defaults = [(field, field.value) for field in fields]  # for fields left empty

    def _stop(self, request: gr.Request) -> None:
        self._jobs.stop(request.session_hash)

    def _classify(self, values: Mapping[object, object], request: gr.Request) -> Generator[dict, None, None]:
        yield {
            self.go: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.status: message("reading the networks …"),
            self.prediction: "",
            self.attributions: "",
        }
        idle = {self.go: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}
        draws, confidence, seed = (value if values[field] is None else values[field] for field, value in self._defaults)
        question = ClassifyRequest(values[self.text], draws, confidence, values[self.prior], seed)
        work = partial(classify, self._loaded, self._classifiers[values[self.models]], question)
        running = self._jobs.run(request.session_hash, work)
        try:
            while True:
                so_far: ClassifyResult = next(running)
                yield {self.status: message("drawing masks …"), self.prediction: so_far.html}
        except StopIteration as done:
            result: ClassifyResult = done.value
            yield idle | {
                self.status: message("", result.warnings),
                self.prediction: result.html,
                self.attributions: framed(result.attributions, "What the words say"),
            }
        except Stopped:
            yield idle | {self.status: message("stopped")}
        except USER_ERRORS as error:
            yield idle | {self.status: error_message(error), self.prediction: ""}
        finally:
            running.close()
