"""The tab that classifies a text: the probability of each class while masks are drawn, and what the words say."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial

import gradio as gr

from palimpsest.app import classifying
from palimpsest.app.classifying import Judged, Question
from palimpsest.app.job import Jobs, Stopped
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Classifier
from palimpsest.app.said import REFUSALS, framed, refused, told
from palimpsest.app.write_tab import AT_ONCE, WORKS
from palimpsest.settings.command_line import compose_config

_NONE = (
    "None of these networks classifies. `python main.py mode=classify` trains a model for each class, or one that is "
    "told the class (`classify.sharing=conditional`); start the page with `--checkpoint` and the folder of that run."
)


class ClassifyTab:
    """Builds the tab within the gr.Blocks that is open, and answers it."""

    def __init__(self, classifiers: Sequence[Classifier], loaded: Networks, jobs: Jobs) -> None:
        self._classifiers, self._loaded, self._jobs = {str(c.folder): c for c in classifiers}, loaded, jobs
        if not classifiers:
            gr.Markdown(_NONE)
            return
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=360):
                titles = list(self._classifiers)
                self.models = gr.Dropdown(titles, value=titles[0], label="Models of the classes", elem_id="models")
                self.text = gr.Textbox(label="Text", lines=4, elem_id="classified", elem_classes="serif",
                                       placeholder="a text whose class is asked for")  # fmt: skip
                with gr.Row():
                    self.go = gr.Button("Classify", variant="primary", elem_id="classify", scale=0)
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop-classifying", scale=0)
                self.said = gr.HTML(elem_id="classified-said", padding=False)
                self.verdict = gr.HTML(elem_id="verdict", apply_default_css=False, padding=False)
                self.evidence = gr.HTML(elem_id="evidence", apply_default_css=False, padding=False)
            with gr.Column(scale=3, min_width=240):
                self._settings()
        asked = {self.models, self.text, self.draws, self.confidence, self.prior, self.seed}
        shown = [self.go, self.stop, self.said, self.verdict, self.evidence]
        self.go.click(self._classify, asked, shown, **WORKS)
        self.stop.click(self._stop, None, None, **AT_ONCE)

    def _settings(self) -> None:
        usual = compose_config([])
        self.draws = gr.Number(usual.classify.num_draws, label="Masks for each class, at most", precision=0,
                               elem_id="draws")  # fmt: skip
        self.confidence = gr.Number(usual.classify.confidence, label="Enough when so certain; 1: never",
                                    step=0.01, elem_id="confidence")  # fmt: skip
        priors = [("uniform", "uniform"), ("shares of the training texts", "empirical")]
        self.prior = gr.Dropdown(priors, value="uniform", label="Prior")
        self.seed = gr.Number(usual.seed, label="Seed", precision=0)
        fields = (self.draws, self.confidence, self.seed)
        self._usual = [(field, field.value) for field in fields]  # of one that is left empty

    def _stop(self, request: gr.Request) -> None:
        self._jobs.stop(request.session_hash)

    def _classify(self, values: Mapping[object, object], request: gr.Request) -> Generator[dict, None, None]:
        yield {self.go: gr.Button(interactive=False), self.stop: gr.Button(interactive=True),
               self.said: told("reading the networks …"), self.verdict: "", self.evidence: ""}  # fmt: skip
        rest = {self.go: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}
        draws, confidence, seed = (value if values[field] is None else values[field] for field, value in self._usual)
        question = Question(values[self.text], draws, confidence, values[self.prior], seed)
        work = partial(classifying.classify, self._loaded, self._classifiers[values[self.models]], question)
        running = self._jobs.run(request.session_hash, work)
        try:
            while True:
                so_far: Judged = next(running)
                yield {self.said: told("drawing masks …"), self.verdict: so_far.html}
        except StopIteration as done:
            judged: Judged = done.value
            yield rest | {self.said: told("", judged.warnings), self.verdict: judged.html,
                          self.evidence: framed(judged.evidence, "What the words say")}  # fmt: skip
        except Stopped:
            yield rest | {self.said: told("stopped")}
        except REFUSALS as error:
            yield rest | {self.said: refused(error), self.verdict: ""}
        finally:
            running.close()
