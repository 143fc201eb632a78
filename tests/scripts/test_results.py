"""README.md and docs/results.md hold the figures of benchmarks/results/table.yaml, and each figure is in its source."""

from __future__ import annotations

import pytest

from palimpsest.scripts.make_results import ROOT, is_quoted_from, numbers_in, outdated, read_table, readme_table

MEASUREMENTS = read_table()


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
