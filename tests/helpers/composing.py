"""Compositions of the configuration that share their work: most of a small test is spent on reading the same files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml
from hydra._internal import config_loader_impl
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.default_element import ResultDefault
from omegaconf import DictConfig

_Loader = config_loader_impl.ConfigLoaderImpl


@contextmanager
def compositions_are_remembered() -> Iterator[None]:
    """Compose the files that the same choices name once; values that are typed are set in a copy each time."""
    listed, composed, compose = {}, {}, _Loader._compose_config_from_defaults_list

    def defaults_of(repo: object, config_name: str, overrides_list: list, **settings: bool) -> DefaultsList:
        typed = Overrides(repo=repo, overrides_list=overrides_list)
        choices = [word.input_line for word in overrides_list if not any(word is o for o in typed.config_overrides)]
        key = config_name, *_places(repo), *choices, *settings.items()
        if key not in listed:
            listed[key] = create_defaults_list(repo, config_name, overrides_list, **settings)
        known = listed[key]
        return DefaultsList(known.defaults, known.defaults_tree, typed.config_overrides, known.overrides)

    def config_of(self: _Loader, defaults: list[ResultDefault], repo: object) -> DictConfig:
        key = *_places(repo), *map(repr, defaults)
        if key not in composed:
            composed[key] = compose(self, defaults, repo)
        return copy.deepcopy(composed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)  # the same in C
        patch.setattr(config_loader_impl, "create_defaults_list", defaults_of)
        patch.setattr(_Loader, "_compose_config_from_defaults_list", config_of)
        yield


def _places(repo: object) -> list[str]:
    return [source.full_path() for source in repo.get_sources()]
