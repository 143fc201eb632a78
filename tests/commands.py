"""Commands, as main.py runs them, for tests."""

from __future__ import annotations

import re

import pytest
from hydra.errors import InstantiationException

from palimpsest import main
from palimpsest.settings.command_line import compose_config, explain


def run(*arguments: str) -> dict[str, object]:
    """The results of a command."""
    return main.run(compose_config(list(arguments)), "a test")


def refused(said: str, *arguments: str) -> None:
    """That this command ends with an error message that matches `said`."""
    with pytest.raises((ValueError, OSError, InstantiationException)) as caught:
        run(*arguments)
    assert re.search(said, explain(caught.value)), explain(caught.value)
