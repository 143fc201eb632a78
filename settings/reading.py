"""Checks of settings against the arguments that read them: invalid values and unread settings are refused.

Readers are the arguments of components that the configuration names with `_target_`, and of objects that the code
builds from keys (settings/wiring.py). The types of the arguments define their values (common/values.py).
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from palimpsest.common.values import GROUP, Needs, entry_of, hints, maybe_group, needs, setting_of, shown
from palimpsest.settings.command_line import key_of
from palimpsest.settings.declared import CONFIGS, REFERENCE, absolute, readers
from palimpsest.settings.instantiation import class_built_by, plain, resolve_target
from palimpsest.settings.wiring import ROOTS, WIRING

log = logging.getLogger(__name__)


_TARGET = re.compile(r"\w+(\.\w+)+")
_CIRCLE = "Recursive interpolation detected"
_OF_HYDRA = ("_target_", "_partial_", "_convert_", "_args_", "_recursive_")
# Sizes that a kind of network has not are no mistake: one command is tried with several kinds.
_ANY_NETWORK = "model."
# Arguments of mode=sample_eval that only sampling.direction= brings into use.
_DIRECTED = "mode.directed."
# Read by logger=wandb alone. Published commands name it whatever they log to.
_WANDB = "wandb"


@dataclass(frozen=True)
class Argument:
    """An argument of a component, and the setting that it receives.

    Attributes:
        at: key at which the configuration has the value.
        key: key at which it was typed.
        hint: type of the argument.
        needs: what must be set for the argument to be read, with the key of that; None: nothing.
    """

    at: str
    key: str
    hint: object
    needs: tuple[str, Needs] | None = None


class Readers:
    """The readers of a composed configuration: objects that the code builds, and components that these refer to."""

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg, self._raw = cfg, OmegaConf.to_container(cfg)

    @cached_property
    def arguments(self) -> list[Argument]:
        """Return every argument of every component that is built."""
        found: list[Argument] = []
        places = [*ROOTS]  # grows while it is read
        for place in places:
            for argument in self._of(place, _at(self._raw, place)):
                found.append(argument)
                if argument.key not in (argument.at, *places):
                    places.append(argument.key)
        for target, keys in WIRING.items():
            known = hints(resolve_target(target))
            present = {name: key for name, key in keys.items() if _has(self._raw, key)}
            found += [Argument(key, key, known[name], _needed(known[name], keys.get)) for name, key in present.items()]
        return found

    def _of(self, place: str, node: object, around: tuple[str, Needs] | None = None) -> Iterator[Argument]:
        if isinstance(node, str) and (reference := REFERENCE.fullmatch(node)):
            yield Argument(place, absolute(place, reference[1]), object)
        if not isinstance(node, dict):
            return
        known = hints(resolve_target(node["_target_"])) if "_target_" in node else {}
        for name, value in node.items():
            at = f"{place}.{name}"
            if name in _OF_HYDRA:
                continue
            hint = known.get(name, object)
            needed = _needed(hint, lambda sibling: f"{place}.{sibling}") or around
            for reference in REFERENCE.findall(value) if isinstance(value, str) else ():
                whole = REFERENCE.fullmatch(value) is not None
                yield Argument(at, absolute(at, reference), hint if whole else object, needed)
            if isinstance(value, dict):
                yield from self._of(at, value, needed)
            yield Argument(at, at, object if _is_reference(value) else hint, needed)

    def refuse_wrong(self) -> None:
        """Raise ValueError for the first value that its reader does not accept."""
        for key, value in leaves(self._raw):
            if key.endswith("_target_") and not (isinstance(value, str) and _TARGET.fullmatch(value)):
                raise ValueError(f"{key}={shown(value)} must be the dotted name of a class or function, as in configs/")
        wired = [key.partition(".")[0] for keys in WIRING.values() for key in keys.values() if "." in key]
        for group in dict.fromkeys(wired):
            if not isinstance(self._raw.get(group), dict):
                raise ValueError(f"{group}={shown(self._raw.get(group))} must be {GROUP.description}")
        self._refuse_broken()
        for argument in self.arguments:
            _refuse(argument.key, argument.hint, plain(OmegaConf.select(self._cfg, argument.at)))

    def _refuse_broken(self) -> None:
        """Refuse references to absent keys at their origin, because whatever refers to them fails too."""
        failed = {}
        refers = {key: value for key, value in leaves(self._raw) if _is_reference(value)}
        for key in refers:
            try:
                OmegaConf.select(self._cfg, key)
            except (OmegaConfBaseException, RecursionError) as error:
                failed[key] = str(error).splitlines()[0]
        for key in failed:
            if not any(f"${{{other}}}" in refers[key] for other in failed if failed[other] == failed[key] != _CIRCLE):
                raise ValueError(f"{key}={refers[key]} must be a value, or refer to a key that exists: {failed[key]}")

    def refuse_unread(self, words: Sequence[str]) -> None:
        """Raise ValueError for a setting among the typed `words` that nothing reads, with what would read it."""
        read = {*ROOTS, *self._read()}
        unused = []
        for word in words:
            key = key_of(word)
            value = OmegaConf.select(self._cfg, key, default=None)
            usual = self._resolved(key, _at(_defaults(), key))
            if key in _referred_in("mode"):
                _refuse_wrong_unread(key, plain(value))
            if key.startswith("hydra.") or (type(value), value) == (type(usual), usual):
                continue
            if _is_read(key, read):
                self._refuse_switched_off(key, word)
                continue
            _refuse_wrong_unread(key, plain(value))
            if key.partition(".")[0] == _WANDB:
                unused.append(word)
                continue
            message = _unread(key, word, self._cfg)
            if not key.startswith(_ANY_NETWORK):
                raise ValueError(message)
            log.warning(message)
        if unused:
            print(f"{' '.join(unused)}: wandb is not used; logger=wandb uses it", file=sys.stderr)

    def _refuse_switched_off(self, key: str, word: str) -> None:
        """Raise ValueError if another setting keeps every argument that receives a typed one from being read."""
        needed = [argument.needs for argument in self.arguments if argument.key == key]
        if not needed or any(one is None or one[1].met_by(OmegaConf.select(self._cfg, one[0])) for one in needed):
            return
        at, mark = needed[0]
        typed, value = _at(self._raw, at), OmegaConf.select(self._cfg, at)
        setting = absolute(at, REFERENCE.fullmatch(typed)[1]) if _is_reference(typed) else at
        enough = mark.values or ((True,) if value is False else ())
        remedy = f"add {' or '.join(f'{setting}={shown(one)}' for one in enough)}" if enough else f"set {setting}"
        raise ValueError(f"{word} means nothing with {setting}={shown(value)}; {remedy}, or leave it out")

    def _read(self) -> set[str]:
        """Return the keys that something reads, or would in another mode: one command is given with several."""
        directed = OmegaConf.select(self._cfg, "sampling.direction") is not None
        read = [argument for argument in self.arguments if directed or not argument.at.startswith(_DIRECTED)]
        of_modes = _referred_in("mode") - (frozenset() if directed else _referred_in("sampler"))
        return {argument.key for argument in read} | {argument.at for argument in read} | of_modes

    def _resolved(self, key: str, value: object) -> object:
        """Return the value that a default refers to, such as `block_size: ${model.length}`."""
        reference = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        return OmegaConf.select(self._cfg, absolute(key, reference[1])) if reference else value


def leaves(node: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield keys and values, with interpolations unresolved."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse(key: str, hint: object, value: object) -> None:
    """Raise ValueError for a value that its type does not accept; a component to be built is a group of settings."""
    if (entry := entry_of(hint)) and value is not None:
        if not isinstance(value, dict) or not value:
            raise ValueError(f"{key}={shown(value)} must be names with their values, {{name:value}}")
        for name, one in value.items():
            _refuse(f"{key}.{name}", entry, one)
    setting = setting_of(hint) or (None if hint is object else maybe_group(hint))
    if setting is not None and not setting.accepts(value):
        raise ValueError(f"{key}={shown(value)} must be {setting.description}")


def _needed(hint: object, key_of_sibling: Callable[[str], str]) -> tuple[str, Needs] | None:
    """Return what brings an argument of this type into use, with its key; None if nothing has to."""
    mark = needs(hint)
    return mark and (mark.setting if "." in mark.setting else key_of_sibling(mark.setting), mark)


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and "${" in value


def _has(node: object, key: str) -> bool:
    group, _, name = key.rpartition(".")
    around = _at(node, group) if group else node
    return isinstance(around, dict) and name in around


def _at(node: object, place: str) -> object:
    for part in place.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _is_read(key: str, read: set[str]) -> bool:
    """Return True if the key, a group around it or a setting in it is read."""
    parts = key.split(".")
    around = any(".".join(parts[:end]) in read for end in range(1, len(parts) + 1))
    return around or any(other.startswith(f"{key}.") for other in read)


@cache
def _defaults() -> dict[str, object]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml"))


@cache
def _referred_in(group: str) -> frozenset[str]:
    """Return the keys that some choice of a group reads."""
    files = (CONFIGS / group).glob("*.yaml")
    return frozenset(key for path in files for key in REFERENCE.findall(path.read_text(encoding="utf-8")))


def _refuse_wrong_unread(key: str, value: object) -> None:
    """Refuse a value that no reader of the setting would accept."""
    known = [hints(resolve_target(target)).get(argument, object) for target, argument in readers(key)]
    settings = [setting for hint in known if (setting := setting_of(hint)) is not None]
    if settings and not any(setting.accepts(value) for setting in settings):
        raise ValueError(f"{key}={shown(value)} must be {settings[0].description}")


def _unread(key: str, word: str, cfg: DictConfig) -> str:
    """Return the message that nothing reads a setting, and what would."""
    naming = re.compile(rf"\$\{{{re.escape(key)}\}}")
    files = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if naming.search(path.read_text(encoding="utf-8"))]
    groups = dict.fromkeys(path.parent.name for path in files)
    if "sampler" in groups:
        groups.pop("mode", None)  # which reads it with sampling.direction= only
    choices = {group: "|".join(path.stem for path in files if path.parent.name == group) for group in groups}
    choosers = ", ".join(f"{group}={names}" for group, names in choices.items())
    remedy = f"it is read by {choosers}; choose one of these, or leave it out" if choosers else "leave it out"
    sampler = f" with sampling.predictor={_sampler(cfg.sampler)}" if "sampler" in groups else ""
    return f"{word} means nothing to parameterization={class_built_by(cfg.parameterization).name}{sampler}: {remedy}"


def _sampler(node: DictConfig) -> str:
    """Return the choice of sampler, as it is typed; its path if it is none of configs/."""

    def kind(node: DictConfig) -> tuple[object, ...]:
        return node._target_, node.get("skip_idle"), OmegaConf.select(node, "inner._target_")

    files = sorted((CONFIGS / "sampler").glob("*.yaml"))
    return next((path.stem for path in files if kind(OmegaConf.load(path)) == kind(node)), node._target_)
