"""The page: a tab that samples texts, and one that classifies."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from palimpsest.app.classify_tab import ClassifyTab
from palimpsest.app.job import Jobs
from palimpsest.app.networks import Networks
from palimpsest.app.runs import Network, classifiers
from palimpsest.app.write_tab import WriteTab
from palimpsest.report.page import render

_HEADER = '<h1 class="name">Palimpsest</h1><p class="motto">A page scraped clean and written again.</p>'


def page(networks: Sequence[Network], extra: Sequence[str] = ()) -> gr.Blocks:
    """Return the page for `networks`; extra: words of the command line (key=value) for every experiment."""
    loaded, jobs = Networks(extra), Jobs()
    with gr.Blocks(title="Palimpsest", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_HEADER, apply_default_css=False, padding=False)
        with gr.Tab("Write"):
            WriteTab(networks, loaded, jobs)
        with gr.Tab("Classify"):
            ClassifyTab(classifiers(networks), loaded, jobs)

        def stop(request: gr.Request) -> None:
            jobs.stop(request.session_hash)

        blocks.unload(stop)  # when a window is closed
    return blocks


def head() -> str:
    """Return the page's style sheet in the colours of the reports, as HTML, because Gradio drops dark mode from CSS."""
    own = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"<style>\n{render('colours.css')}\n{own}</style>"


def theme() -> gr.themes.Base:
    """Return a Gradio theme in the colours and local typefaces of the reports."""
    base = gr.themes.Base(
        font=["system-ui", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
    )
    colour = {
        "body_background_fill": "paper", "body_text_color": "ink", "body_text_color_subdued": "muted",
        "background_fill_primary": "paper", "background_fill_secondary": "wash", "border_color_primary": "rule",
        "border_color_accent": "rule", "color_accent_soft": "wash",
        "block_background_fill": "paper", "block_border_color": "rule", "block_label_text_color": "muted",
        "block_title_text_color": "muted", "block_info_text_color": "muted", "panel_background_fill": "paper",
        "input_background_fill": "paper", "input_border_color": "rule", "input_border_color_focus": "blue",
        "input_placeholder_color": "muted", "accordion_text_color": "muted",
        "button_primary_background_fill": "ink", "button_primary_background_fill_hover": "ink",
        "button_primary_text_color": "paper", "button_primary_border_color": "ink",
        "button_secondary_background_fill": "paper", "button_secondary_background_fill_hover": "wash",
        "button_secondary_text_color": "ink", "button_secondary_border_color": "rule", "loader_color": "blue",
    }  # fmt: skip
    both = {f"{name}{mode}": f"var(--{value})" for name, value in colour.items() for mode in ("", "_dark")}
    plain = dict.fromkeys(("block_shadow", "input_shadow", "input_shadow_focus", "button_transition"), "none")
    return base.set(**both, **plain, color_accent="var(--ink)", block_title_text_weight="400")
