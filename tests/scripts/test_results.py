"""README.md and docs/results.md hold the figures of benchmarks/results/table.yaml, and each figure is in its source."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from palimpsest.scripts.make_results import ROOT, outdated, read_table, readme_table

MEASUREMENTS = read_table()


def numbers_in(text: str) -> list[float]:
    """Return every number of a text."""
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text.replace("−", "-"))]


def is_quoted_from(shown: str, numbers: Sequence[float]) -> bool:
    """Return whether a figure is one of `numbers`, or a share among them as per cent, rounded to its own digits."""
    half_unit = 0.5 * 10.0 ** -len(shown.partition(".")[2])
    return any(abs(scale * number - float(shown)) <= 1.001 * half_unit for number in numbers for scale in (1, 100))


def test_readme_and_page_are_up_to_date():
    assert not outdated(), "python scripts/make_results.py"


def test_the_table_of_the_readme_is_short():
    assert 1 <= len(readme_table(MEASUREMENTS).splitlines()) - 2 <= 8


def test_ids_are_unique():
    ids = [measurement["id"] for measurement in MEASUREMENTS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda measurement: measurement["id"])
def test_every_figure_is_in_its_source(measurement):
    source = ROOT / measurement["source"]
    assert source.is_file() and measurement["command"] and measurement["machine"]
    numbers = numbers_in(source.read_text(encoding="utf-8"))
    for figure in measurement["figures"]:
        assert figure["role"] in ("ours", "baseline", "optimum")
        for key in ("value", "error", "low", "high"):
            found = key not in figure or "derived" in figure or is_quoted_from(figure[key], numbers)
            assert found, f"{figure['what']}: {key} {figure[key]} is not in {measurement['source']}"


def test_a_figure_is_found_only_if_it_is_there():
    numbers = numbers_in('{"accuracy": 0.8532, "se": 7.1e-3}, 1.226 ± 0.005, −3')
    assert numbers == [0.8532, 0.0071, 1.226, 0.005, -3]
    assert is_quoted_from("85.3", numbers) and is_quoted_from("0.7", numbers) and is_quoted_from("-3", numbers)
    assert not is_quoted_from("85.4", numbers)
