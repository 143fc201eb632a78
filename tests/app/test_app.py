"""python -m app: the same results as main.py, and the page itself in a headless browser."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from scipy.special import expit

from palimpsest.app import __main__ as command
from palimpsest.app.classifying import ClassifyRequest, classify
from palimpsest.app.html import error_message
from palimpsest.app.job import Job, Stopped
from palimpsest.app.networks import Networks
from palimpsest.app.runs import classifiers, find
from palimpsest.app.sampling import SamplingRequest, sample
from palimpsest.classification.bayes import posterior_interval
from palimpsest.classification.scoring import SequentialTest, score_classes
from palimpsest.dataloader import with_texts
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.evaluation.drawing import decoded, draw
from palimpsest.evaluation.sampling_inputs import Template
from palimpsest.experiment.experiment import Experiment
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import CHROMIUM, ROOT, TINY, run
from tests.helpers.networks import EVEN, two_models


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with the models of two classes."""
    folder = tmp_path_factory.mktemp("app")
    for label in (0, 1):
        run(
            *TINY,
            f"data.label={label}",
            f"data.cache_dir={folder / 'cache'}",
            "sampling.num_sample_log=0",
            "~logger",
            f"checkpointing.save_dir={folder / 'run'}",
        )
    return folder / "run"


@pytest.fixture
def extra(trained) -> list[str]:
    """Settings for this machine."""
    return [f"data.cache_dir={trained.parent / 'cache'}", "trainer.accelerator=cpu"]


def test_runs_are_found_and_grouped_into_classifiers(trained, tmp_path, monkeypatch):
    first, second = networks = find([str(trained)])
    assert [network.label for network in networks] == [0, 1] and first.title == str(trained / "label=0")
    assert [found.networks for found in classifiers(networks)] == [(first, second)]
    assert classifiers([first]) == [] and first.decoders[0] == "unmask"
    assert not {"ar", "block", "block_unmask"} & set(first.decoders) and "first_hitting" in first.decoders
    monkeypatch.chdir(tmp_path)
    for wanted, typed in (
        ("there is no trained network below ./outputs: train one", []),
        ("no run in this folder", ["."]),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(wanted)):
            find(typed)
    shutil.copytree(trained, tmp_path / "outputs" / "reviews" / "micro-0")
    (tmp_path / "outputs/torn/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/torn/checkpoints/last.ckpt").write_bytes(b"half a che")
    newest = tmp_path / "outputs/reviews/micro-0/label=1/checkpoints/last.ckpt"
    os.utime(newest, (time.time() + 9, time.time() + 9))
    assert [network.title for network in find([])] == [f"outputs/reviews/micro-0/label={label}" for label in (1, 0)]


def test_texts_are_those_that_main_draws(trained, extra):
    network, frames = find([str(trained)])[1], []
    settings = {"sampler": "unmask", "sampling.steps": 4, "sampling.order": "random", "sampling.remask": "remdm",
                "seed": 5}  # fmt: skip
    request = SamplingRequest("the plot {{2}} is [MASK] .", 3, settings)
    done = sample(Networks(extra), network, request, lambda frame, seconds: frames.append(frame))
    words = [f"{'sampling.predictor' if key == 'sampler' else key}={value}" for key, value in settings.items()]
    e = Experiment(compose_config([*network.words, "data.label=1", *words, *extra]), "a test")
    diffusion = e.weights.trained(e.build.data(), str(network.path), False)
    prompt = Template(template=request.text)
    drawing = type(e.build.drawing())(e.build.drawing().sampler, prompt)
    drawn = draw(diffusion, e.build.data(), drawing, 3, 2, e.seed)
    assert done.texts == [decoded(text, prompt, e.build.data().tokenizer) for text in drawn]
    assert all(text.endswith(".") for text in done.texts), "a full stop after a gap is a known token"
    assert done.evaluations == np.mean([text.evaluations for text in drawn]) and "remask remdm" in done.sampler
    shown = [frame for frame in frames if frame is not None]
    assert shown[0].step == 0 and shown[0].html.count('class="m"') == 9 and 'class="g"' in shown[0].html
    assert "--seed 5 --template 'the plot {{2}} is [MASK] .' sampling.predictor=unmask" in done.command


def test_a_typed_text_is_encoded_like_a_test_text(trained, extra):
    e = Experiment(compose_config([*find([str(trained)])[0].words, *extra, "data.max_test_texts=3"]), "a test")
    data = e.build.data()
    typed = with_texts(data, "typed", data.texts("test")["text"])
    rows, wanted = typed.split("typed"), data.split("test")
    assert [row.tolist() for row in rows["input_ids"]] == [row.tolist() for row in wanted["input_ids"]]
    assert {int(label) for label in rows["label"]} == {-1} and "typed" not in data._splits
    with pytest.raises(ValueError, match="there is no text with any token in it"):
        with_texts(data, "typed", [""])


def test_live_views_of_a_classification_show_every_round_and_change_nothing():
    e = Experiment(compose_config(TINY), "a test")
    seen, ask = [], (e.trainer, two_models(e), e.build.data(), "test", Nelbo(), SequentialTest(8, 1.0), 3, EVEN)
    watched, alone = score_classes(*ask, seen.append), score_classes(*ask)
    assert [scores.nats_MCP.shape[-1] for scores in seen] == [4, 6, 8]
    np.testing.assert_allclose(watched.nats_MCP, alone.nats_MCP, rtol=1e-6)
    np.testing.assert_array_equal(watched.nats_MCP, seen[-1].nats_MCP)


def test_the_interval_of_a_probability_follows_the_log_odds():
    noise_CK = np.random.default_rng(0).normal(size=(3, 50)) * np.array([[1.0], [1.0], [4.0]])
    nats_CK = noise_CK + np.array([[0.0], [0.5], [8.0]])
    two = nats_CK[:2]
    low_C, high_C = (ends_MC[0] for ends_MC in posterior_interval(two[None], EVEN))
    margin, se = (two[1] - two[0]).mean(), (two[1] - two[0]).std(ddof=1) / np.sqrt(50)
    np.testing.assert_allclose([low_C[0], high_C[0]], expit([margin - 2.009575 * se, margin + 2.009575 * se]))
    np.testing.assert_allclose([low_C[1], high_C[1]], [1 - high_C[0], 1 - low_C[0]])
    prior_C = np.log([0.2, 0.3, 0.5])
    low_C, high_C = (ends_MC[0] for ends_MC in posterior_interval(nats_CK[None], prior_C))
    # the quantiles of the posterior over resampled draws
    take = np.random.default_rng(1).integers(50, size=(4000, 50))
    joint = prior_C - nats_CK[:, take].mean(-1).T
    p = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
    np.testing.assert_allclose(low_C, np.quantile(p, 0.025, axis=0), atol=0.012)
    np.testing.assert_allclose(high_C, np.quantile(p, 0.975, axis=0), atol=0.012)
    assert posterior_interval(nats_CK[None, :, :1], prior_C)[1].tolist() == [[1, 1, 1]]


def test_a_job_shows_the_latest_view_and_can_be_stopped():
    job, shown = Job(), []

    def work(show):
        for step in range(10**9):
            show(step, 0.001)

    with pytest.raises(Stopped):
        for step in job.views(work):
            shown.append(step)
            if len(shown) == 5:
                job.stop()
    assert shown == sorted(shown) and len(shown) <= 7
    views = Job().views(work)
    next(views)
    views.close()  # it returns only after the thread has ended
    with pytest.raises(ZeroDivisionError):
        list(Job().views(lambda show: 1 / 0))


def test_a_job_can_be_stopped_within_a_network():
    """Between two views a network may run for minutes."""
    job, layer, seen = Job(), torch.nn.Linear(2, 2), []

    def work(show):
        show("begun")
        for step in range(10**9):
            seen.append(step)
            layer(torch.zeros(2))

    views = job.views(work)
    assert next(views) == "begun"
    views.close()  # it returns only after the thread has ended
    layer(torch.zeros(2))  # other threads are not affected
    assert len(seen) < 10**7


def test_typed_numbers_are_checked_before_use(trained, extra):
    first, *_ = found = find([str(trained)])
    networks = Networks(extra)

    def refusal(text: str, number: int = 1, steps: int = 4) -> str:
        request = SamplingRequest(text, number, {"sampler": "unmask", "sampling.steps": steps})
        with pytest.raises(ValueError) as error:
            sample(networks, first, request, lambda *_: None)
        return str(error.value)

    assert "asks for 999,999,999 tokens in its gaps: too many for model.length=" in refusal("a {{999999999}} b")
    assert "sampling.num_samples=17: this page writes 1 to 16" in refusal("a", 17)
    assert "sampling.num_samples=0" in refusal("a", 0) and "100,001 characters" in refusal("a" * 100_001)
    assert "sampling.steps=1000000000 must be a whole number from 1 to 1000000" in refusal("a", steps=10**9)
    draws = ClassifyRequest("a text", 10**9, 0.9, "uniform", 1)
    with pytest.raises(ValueError, match=r"classify.num_draws=1000000000 must be a whole number from 1 to 1000000"):
        classify(networks, classifiers(found)[0], draws, lambda *_: None)


def test_without_gradio_the_message_names_the_package(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs gradio, .* pip install gradio==\d"):
        command.main()


def test_an_error_message_is_escaped():
    assert error_message(ValueError("<script>alert(1)</script>")).count("<script>") == 0


# ------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def served(trained):
    """The address of a page served by another process."""
    pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
    words = [sys.executable, "-m", "palimpsest.app", "--port", "0", "--checkpoint", str(trained),
             f"data.cache_dir={trained.parent / 'cache'}", "trainer.accelerator=cpu"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def asked() -> list[str]:
    """Addresses that the browser requested."""
    return []


@pytest.fixture
def window(served, asked):
    """The page, in a browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium or google-chrome on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.wait_for_selector("#write")
        yield page
        browser.close()


def write(window, text: str, pace: str = "", **fields: str) -> None:
    """Fill in the fields and press the button."""
    window.fill("#given textarea", text)
    if pace:
        window.click("#pace input")
        window.get_by_role("option", name=pace, exact=True).click()
    for name, value in fields.items():
        window.fill(f"#{name} input, #{name} textarea", value)
    window.click("#write")


def written(window) -> str:
    """Return the sampled text when it is complete."""
    window.wait_for_selector("#page iframe")
    return window.input_value("#plain textarea")


def a_text_is_shown_live_and_replayed(window):
    write(window, "The  plot is", "slow", steps="8")
    window.wait_for_selector("#page .page .m")
    assert window.inner_text("#page .page .g >> nth=0") == "The" and "masks left" in window.inner_text("#written-said")
    text = written(window)
    assert text.startswith("The  plot is ") and "[MASK]" not in text and "▢" not in text
    assert "network evaluations" in window.inner_text("#written-said")
    player = window.frame_locator("#page iframe")
    assert player.locator(".page .m").count() == 0 and "step" in player.locator("output").inner_text()
    player.locator("[data-do=first]").click()
    assert player.locator(".page .m").count() > 3
    player.locator("[data-do=play]").click()
    player.locator(".page:not(:has(.m))").wait_for()
    height = window.locator("#page iframe").bounding_box()["height"]
    assert height > 150, "the frame is as high as what it frames"


def an_error_is_shown_and_the_page_works_on(window):
    write(window, "The [MASK] is {{3}} .", "full", temperature="-1")
    message = window.wait_for_selector("#written-said [role=alert]").inner_text()
    assert message.startswith("sampling.temperature=-1") and "must be a number in [0, inf)" in message
    write(window, "The [MASK] is {{3}} .", temperature="0.5", top_k="five")
    window.wait_for_selector("#written-said [role=alert]:has-text('sampling.top_k=five must be a whole number')")
    write(window, "The [MASK] is {{3}} .", top_k="5", texts="2")
    texts = written(window).split("\n\n")
    assert len(texts) == 2 and all(re.fullmatch(r"The ?\S+ is .+\.", text) for text in texts), texts
    assert "[MASK]" not in " ".join(texts) and "▢" not in " ".join(texts)


def sampling_can_be_stopped(window):
    write(window, "The plot", "very slow", texts="1", steps="8")
    window.wait_for_selector("#page .page .m")
    window.click("#stop-writing")
    window.wait_for_selector("#written-said :has-text('stopped: step')")
    assert window.is_enabled("#write") and window.locator("#page .page .m").count() > 0


def a_text_is_classified_with_attributions(window):
    window.get_by_role("tab", name="Classify").click()
    window.fill("#classified textarea", "the plot is dull and I truly loved the acting .")
    window.fill("#draws input", "8")
    window.click("#classify")
    window.wait_for_selector("#evidence iframe")
    rows = window.locator("#verdict tbody tr")
    assert sorted(rows.locator("th").all_inner_texts()) == ["negative", "positive"]
    assert "masks under every class" in window.inner_text("#verdict .said")
    evidence = window.frame_locator("#evidence iframe")
    assert evidence.locator(".words").count() == 1 and evidence.locator(".words span[style]").count() > 3
    share = [float(re.search(r"[\d.]+", text)[0]) for text in rows.locator(".share").all_inner_texts()]
    assert sum(share) == pytest.approx(100, abs=2)
    window.fill("#confidence input", "0.2")
    window.click("#classify")
    window.wait_for_selector("#classified-said [role=alert]:has-text('classify.confidence=0.2')")


def only_this_machine_has_access_and_the_browser_contacts_nothing_else(served, window, asked):
    root = served.partition("?")[0]
    port = int(root.rpartition(":")[2].rstrip("/"))
    heard = [line.split()[1] for name in ("tcp", "tcp6") if (table := Path("/proc/net") / name).exists()
             for line in table.read_text().splitlines()[1:] if line.split()[3] == "0A"]  # fmt: skip
    assert [address for address in heard if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert len(asked) > 5 and {url for url in asked if not url.startswith((root, "data:", "about:"))} == set()
    assert "default-src 'self'" in window.request.get(root).headers["content-security-policy"]
    other = window.request.get(served, headers={"Host": "somewhere.example"})
    assert other.status == 400, "a name that points here is none of ours"
    assert window.request.post(f"{root}gradio_api/upload", multipart={"files": "x"}).status == 404
    with pytest.raises(HTTPError, match="403"):  # without a cookie
        urlopen(root)
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert window.request.get(root, headers=foreign).status == 403


def a_closed_window_stops_its_work(served, window):
    """Another window gets its turn long before the closed window's text would have been complete."""
    leaving = window.context.browser.new_page()
    leaving.goto(served)
    leaving.wait_for_selector("#write")
    write(leaving, "The plot", "very slow", steps="30")
    leaving.wait_for_selector("#page .page .m")
    leaving.close()
    start = time.monotonic()
    write(window, "The plot", "full", steps="2")
    window.wait_for_function("() => document.querySelector('#plain textarea')?.value.startsWith('The plot')")
    assert time.monotonic() - start < 15


def test_the_page(served, window, asked):
    """One page for all checks, because it starts slowly."""
    a_text_is_shown_live_and_replayed(window)
    an_error_is_shown_and_the_page_works_on(window)
    sampling_can_be_stopped(window)
    a_closed_window_stops_its_work(served, window)
    a_text_is_classified_with_attributions(window)
    only_this_machine_has_access_and_the_browser_contacts_nothing_else(served, window, asked)
