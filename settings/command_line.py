"""The command line: translates the references' spellings and explains mistakes in one message."""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from palimpsest.settings.declared import CONFIGS, is_path, takes_lists, takes_numbers, takes_texts
from palimpsest.settings.wiring import WIRING

_ABSENT = object()
_SETS_VARIABLE: list[bool] = []  # not empty within `clear_errors`, which sets HYDRA_FULL_ERROR itself

# Keys of the references under their names here. What names a choice is a group: its members are files in configs/.
ALIASES = {"sampling.predictor": "sampler", "training.masking": "masking", "eval.estimator": "estimator",
           "hydra.run.dir": "checkpointing.save_dir", "+wandb.offline": "wandb.offline",
           "sampling.logdir": "checkpointing.save_dir", "algo.T": "sampling.steps",
           "algo.time_conditioning": "time_conditioning", "algo.ignore_bos": "training.ignore_bos",
           "algo.subs_masking": "subs_masking",
           **{f"algo.{key}": f"training.{key}" for key in
              ("curriculum_end", "gumbel_tau_log10_start", "gumbel_tau_log10_end")},
           "algo.curriculum.end": "training.curriculum_end",
           **{f"algo.curriculum.{key}": f"training.{key}" for key in
              ("gumbel_tau_log10_start", "gumbel_tau_log10_end")},
           "sampling.p_nucleus": "sampling.nucleus_p", "training.finetune_path": "training.from_pretrained",
           "algo.clip_search_widths": "training.clip_search_widths",
           "algo.clip_search_delta": "training.clip_search_delta", "algo.fix_clipping": "training.fix_clipping",
           **{f"+data.insert_{split}_{what}": f"data.insert_{split}_{what}"
              for split in ("train", "valid") for what in ("special", "eos")}}  # fmt: skip
# Settings of kuleshov-group/bd3lms and s-sahoo/duo that have one value here, under which they say nothing.
SETTLED = {"algo.sampler": "semi_ar", "algo.cross_attn": "true", "algo.var_min": "true", "training.eval_nll": "true",
           "algo.T": "0", "algo.curriculum.start": "0", "sampling.use_float64": "true", "prior": "none"}  # fmt: skip
_OF_BLOCKS = ("algo.cross_attn", "algo.var_min")  # of which bd3lms' other objectives make nothing
# Groups that kuleshov-group/bd3lms spells otherwise: its key -> (our group, its choices in our words).
_BACKBONES = tuple(path.stem for path in sorted((CONFIGS / "backbone").glob("*.yaml")))
_OBJECTIVES = {path.stem: path.stem for path in sorted((CONFIGS / "parameterization").glob("*.yaml"))}
SPELLINGS = {"algo": ("parameterization", {"mdlm": "subs", "duo_base": "udlm", **_OBJECTIVES}),
             "algo.backbone": ("backbone", {name: name for name in _BACKBONES})}  # fmt: skip
# Texts, of which ${} is no interpolation either.
TEXTS = ("sampling.prefix", "sampling.template", "latents.prompt", "data.mask_token")
_QUOTED = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)
_ENTRY = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,])+""", re.DOTALL)  # between the commas of a list
_FOLDERS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
# Keys that no file in configs/ has, and that are read all the same where they are added.
_READ_IF_ADDED = ("data.train_splits",)
# Arguments of what is instantiated that the code gives itself; and groups whose entries are anybody's.
_GIVEN = ("num_classes", "latent_shape", "stop_id", "watch", "begin_B", "last_epoch")
_OPEN_GROUPS = ("callbacks", "logger")
# Settings that are mappings of values, with keys of their own.
_MAPPINGS = ("joint_modes", "modes", "files", "hub_splits", "sizes", "paths", "weights")
# Flags of Hydra that take a value: the next word, which `--info` may lack.
_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
               "--experimental-rerun", "--info", "-i")  # fmt: skip


def translate(arguments: list[str]) -> list[str]:
    """Return the arguments with the references' spellings replaced by ours, and paths quoted if Hydra needs it.

    Raises:
        ValueError: a spelling has no meaning here, or two contradict each other.
    """
    arguments, flags = _overrides_and_flags(arguments)
    arguments = _of_duo(_algo(arguments))
    laws = _values_of("parameterization", arguments)
    _check_groups(arguments, {"--config-dir", "-cd"} & set(flags) != set())
    out = []
    # Lightning starts its other processes with the first one's hydra.run.dir, which is not the user's.
    started = any(argument.startswith("hydra.job.name=train_ddp_process_") for argument in arguments)
    sweeps = any(argument.lower() in ("--multirun", "-m", "hydra.mode=multirun") for argument in (*arguments, *flags))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if SETTLED.get(key) == value.lower() or (key in _OF_BLOCKS and laws and "bd3lm" not in laws):
            continue
        if key == "algo.T" and laws == {"d3pm"}:  # of the loss in duo; elsewhere the steps of bd3lms' sampler
            key = "T"
        if key == "sampling.num_sample_batches" and value == "0" and "mode=sample_eval" not in arguments:
            key, value = "eval.generate_samples", "false"
        if key in SETTLED and key not in ALIASES:
            raise ValueError(f"{argument}: here it is always {SETTLED[key]}; leave it out")
        if key == "algo.mdlm_loss_scale" and value.lower() in ("true", "false"):
            # The log-linear schedule of mdlm, or exactly alpha = 1 - t.
            key, value = "noise.eps", "0.001" if value.lower() == "true" else "0"
        key = key if started and key == "hydra.run.dir" else ALIASES.get(key, key)
        if key in TEXTS and value not in ("", "null") and not _QUOTED.fullmatch(value):
            value = in_quotes(value)
        elif equals and not _is_plain(value) and not (CONFIGS / key.lstrip("+")).is_dir():
            value = _name(value, key.lstrip("+"), sweeps)
        out.append(f"{key}{equals}{value}")
    return [*_semi_ar(out), *flags]


def flags_last(arguments: list[str]) -> list[str]:
    """Return `arguments` with Hydra's flags (`-m`, `--cfg job`) behind the overrides, which Hydra reads as one run."""
    overrides, flags = _overrides_and_flags(arguments)
    return [*overrides, *flags]


def _overrides_and_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    overrides, flags, flag = [], [], ""
    for word in arguments:
        is_value = _takes_value(flag) and not (flag in ("--info", "-i") and "=" in word)
        is_flag = word.startswith("-") and not is_value
        (flags if is_flag or is_value else overrides).append(word)
        flag = word if is_flag else ""
    return overrides, flags


def _takes_value(flag: str) -> bool:
    """Return True if the flag takes the next word as its value. argparse lets users shorten flags."""
    shortened = flag.startswith("--") and flag != "--" and any(known.startswith(flag) for known in _WITH_VALUE)
    return flag in _WITH_VALUE or shortened


def _check_groups(arguments: list[str], more_folders: bool) -> None:
    """Refuse what chooses no file of a group, which Hydra would ignore or answer in its own words.

    more_folders: a flag of Hydra adds a folder of configurations, which may hold other choices.

    Raises:
        ValueError: names the group and its choices.
    """
    experiments = [argument.partition("=")[2] for argument in arguments if argument.startswith("experiment=")]
    more_folders = more_folders or any(argument.lstrip("+").startswith("hydra.searchpath=") for argument in arguments)
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if argument.startswith("~") and not (CONFIGS / argument[1:].partition("=")[0].partition("@")[0]).is_dir():
            raise ValueError(f"{argument} would remove a key that is read; set it to another value, or to null")
        folder = CONFIGS / ALIASES.get(key, key)
        if not equals or "/" in key or not folder.is_dir():
            continue
        known = [path.stem for path in sorted(folder.glob("*.yaml"))]
        unknown = [] if more_folders else _unknown_choices(value, known)
        is_no_name = re.fullmatch(r"null|~|true|false|[-+]?[\d.]+|", value) and (key, value) != ("experiment", "null")
        if unknown or is_no_name:
            guess = difflib.get_close_matches(unknown[0] if unknown else value, known, n=1)
            wrong = f"{argument}: {unknown[0]}" if unknown and unknown[0] != value else argument
            raise ValueError(
                f"{wrong} is unknown;{f' did you mean {guess[0]}?' if guess else ''} choose one of: {', '.join(known)}"
            )
    if len(set(experiments)) > 1:
        raise ValueError(f"experiment= takes one study, not {len(experiments)}: {', '.join(experiments)}")


def _unknown_choices(value: str, known: list[str]) -> list[str]:
    """Return the names in the value of a group, a list or the values of a sweep, that are not among the `known`."""
    if re.search(r"\$\{|\(", value):  # an interpolation, or a function of Hydra's sweeps
        return []
    names = re.findall(r"[^\s,\[\]'\"]+", value)
    return [name for name in names if name.removesuffix(".yaml") not in (*known, "null")]


def _is_plain(value: str) -> bool:
    """Return True if Hydra reads the value as the same text, or if it is a bool or empty."""
    word = re.fullmatch(r"[A-Za-z_/.][\w/.-]*", value, re.ASCII)
    return value in ("", "true", "false", "null") or (word is not None and value.lower() not in ("nan", "inf"))


def _name(typed: str, key: str, sweeps: bool) -> str:
    """Return a path or name (or a list of them) in Hydra's notation.

    It is quoted, and so taken literally, if Hydra would not read it as a text. ~ becomes the home folder. In a sweep,
    commas separate the values. Settings that are neither path nor name stay unchanged.
    """
    path = key in _FOLDERS_OF_HYDRA or is_path(key)
    if not (path or takes_texts(key)):
        return typed
    value = os.path.expanduser(typed) if path else typed
    try:
        read = OverridesParser.create().parse_override(f"key={value}")
        fits = sweeps if read.is_sweep_override() else _is_text(read.value()) or _is_other(read.value(), key)
        fits = fits and value == value.strip()  # Hydra would take the blanks away
    except HydraException:
        fits = False
    if fits:
        return value
    entry = partial(_name, key=key, sweeps=False)
    if value[:1] == "[" and value[-1:] == "]" and takes_lists(key):
        return f"[{','.join(entry(part.strip()) for part in _ENTRY.findall(value[1:-1]))}]"
    if sweeps and len(parts := _ENTRY.findall(value)) > 1:
        return ",".join(map(entry, parts))
    return QuotedString(value, Quote.double).with_quotes()


def _is_other(value: object, key: str) -> bool:
    """Return True if the setting also takes values of this other type."""
    if isinstance(value, list):
        return takes_lists(key) and all(map(_is_text, value))
    return type(value) is int and takes_numbers(key)


def key_of(word: str) -> str:
    """Return the key that a command-line argument sets."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def in_quotes(text: str) -> str:
    """Return `text` quoted for Hydra, so that no quote, backslash or ${} in it has a meaning."""
    text = re.sub(r"(\\*)\$\{", lambda slashes: slashes[1] * 2 + "\\${", text)
    return QuotedString(text, Quote.double).with_quotes()


def _algo(arguments: list[str]) -> list[str]:
    """Replace `algo=mdlm` and `algo.backbone=dit` by `parameterization=subs` and `backbone=dit`.

    Raises:
        ValueError: an unknown choice, or a different one under our own key.
    """
    for theirs, (ours, choices) in SPELLINGS.items():
        typed = [argument for argument in arguments if argument.startswith(f"{theirs}=")]
        if not typed:
            continue
        ours_of = {}
        for argument in typed:
            names = argument.partition("=")[2].split(",")  # several in a sweep
            if not set(names) <= set(choices):
                known = ", ".join(f"{theirs}={name}" for name in choices)
                raise ValueError(f"{argument} is unknown; what exists: {known} (the same as {ours}=)")
            ours_of[argument] = f"{ours}={','.join(choices[name] for name in names)}"
        own = [argument for argument in arguments if argument.startswith(f"{ours}=")]
        meant = set(ours_of.values())
        if len(meant | set(own)) > 1:
            raise ValueError(
                f"{' '.join([*typed, *own])} contradict each other: {theirs}= is another spelling of {ours}= "
                f"({typed[0]} means {ours_of[typed[0]]}); keep one of them"
            )
        arguments = [*(argument for argument in arguments if argument not in (*typed, *own)), *meant]
    return arguments


def _of_duo(arguments: list[str]) -> list[str]:
    """The values that s-sahoo/duo spells otherwise in our words.

    Raises:
        ValueError: sampling.noise_removal=greedy with a sampler that draws the last tokens, or ancestral without an
            objective, on which its meaning depends.
    """
    laws = _values_of("parameterization", arguments)
    brought = {sampler_of(law) for law in laws}
    own = next(iter(brought)) if brought in ({"ar"}, {"uniform"}) else None
    resampled = own == "uniform"
    predictors = {"ancestral": own or "ddpm", "ancestral_cache": own or "ddpm_cache"}
    words = {
        "noise": {"log-linear": "loglinear"},
        "sampler": predictors,
        "sampling.predictor": predictors,
        "sampling.noise_removal": {"greedy": "true", "none": "false", "ancestral": str(not resampled).lower()},
    }
    samplers = _values_of("sampling.predictor", arguments) | _values_of("sampler", arguments)
    draws_last = laws & {"sedd", "d3pm"} or "analytic" in samplers
    if draws_last and "greedy" in _values_of("sampling.noise_removal", arguments):
        raise ValueError(
            "sampling.noise_removal=greedy writes the most likely token wherever a mask is left, and the sampler of "
            f"{'parameterization=' + min(laws) if laws else 'sampling.predictor=analytic'} draws it; use "
            "sampling.noise_removal=true"
        )
    from_file = not laws and _values_of("eval.checkpoint_path", arguments) - {""}
    if from_file and "ancestral" in _values_of("sampling.noise_removal", arguments):
        raise ValueError(
            "sampling.noise_removal=ancestral is false for uniform noise and true for masks: type the objective of "
            "eval.checkpoint_path beside it (algo=duo_base, algo=mdlm, ...)"
        )
    out = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in words:
            value = ",".join(words[key].get(name, name) for name in value.split(","))
        out.append(f"{key}{equals}{value}")
    return out


def sampler_of(objective: str) -> str | None:
    """Return the sampler that the file of an objective brings; None if that of config.yaml fits it."""
    path = CONFIGS / "parameterization" / f"{objective}.yaml"
    defaults = OmegaConf.load(path).get("defaults", []) if path.is_file() else []
    return next((entry["override /sampler"] for entry in defaults if "override /sampler" in entry), None)


def _values_of(key: str, arguments: list[str]) -> set[str]:
    """Return what is typed for a key; several values in a sweep."""
    typed = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{key}=")]
    return {value for values in typed for value in values.split(",")}


def _semi_ar(arguments: list[str]) -> list[str]:
    """Replace the references' flag sampling.semi_ar by the sampler of that name.

    Raises:
        ValueError: it is neither true nor false, or another sampler is chosen too.
    """
    flags = [a.partition("=")[2].lower() for a in arguments if a.startswith("sampling.semi_ar=")]
    rest = [a for a in arguments if not a.startswith("sampling.semi_ar=")]
    if not set(flags) <= {"true", "false"}:
        raise ValueError(f"sampling.semi_ar={flags[-1]} must be true or false")
    if flags[-1:] != ["true"]:
        return rest
    others = [a for a in rest if a.startswith("sampler=") and a not in ("sampler=ddpm", "sampler=ddpm_cache")]
    if others and others != ["sampler=semi_ar"]:
        raise ValueError(
            f"sampling.semi_ar=true fills its windows by ddpm_cache, which contradicts {others[-1]} (the same as "
            "sampling.predictor=); leave one of them out"
        )
    return [*(a for a in rest if not a.startswith("sampler=")), "sampler=semi_ar"]


def compose_config(overrides: list[str]) -> DictConfig:
    """Return the configuration of these arguments, without running anything."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        words = translate(overrides)
        cfg = compose("config", overrides=words)
        refuse_unknown_additions(cfg, words)
        return cfg


def refuse_unknown_additions(cfg: DictConfig, words: list[str]) -> None:
    """Refuse keys that + or ++ adds to the configuration and nothing reads; call it where Hydra composes.

    Raises:
        ValueError: there is no such key.
    """
    added = [word for word in words if word.startswith("+") and not _is_choice(word)]
    if not added:
        return
    without = compose("config", overrides=[word for word in words if word not in added])
    for key in set(_keys(cfg)) - set(_keys(without)):
        if not _is_read(key, cfg, without):
            raise ValueError(_unknown_key(key, without))


def _is_choice(word: str) -> bool:
    """Return True if the argument chooses a file of a group."""
    key = word.lstrip("+").partition("=")[0].partition("@")[0]
    return (CONFIGS / key).is_dir() or key.startswith("hydra/")


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the keys of all values; the target of an interpolation has separate keys."""
    for name in node:
        child = node._get_node(name)
        if OmegaConf.is_dict(child) and not child._is_none() and not child._is_interpolation():
            yield from _keys(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_read(key: str, cfg: DictConfig, without: DictConfig) -> bool:
    """Return True if anything reads a key that `cfg` has and `without` lacks.

    It is inside a value that existed, or is an argument of an instantiated component.
    """
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        above, name = ".".join(parts[:end]), parts[end]
        there = OmegaConf.select(without, above, default=_ABSENT)
        if there is not _ABSENT and (not OmegaConf.is_dict(there) or not there) and above not in _OPEN_GROUPS:
            return parts[end - 1] in _MAPPINGS  # a value before, which may be a mapping
        node = OmegaConf.select(cfg, above)
        entry = end == 2 and parts[0] in _OPEN_GROUPS
        if above == "trainer":
            return key in {*WIRING["palimpsest.training.trainer.Arguments"].values()}
        if OmegaConf.is_dict(node) and "_target_" in node and (there is not _ABSENT or entry):
            own = ("_target_", "_partial_", "_convert_") if there is _ABSENT else there
            return name in own or _takes(node._target_, name, entry)
    return key in _READ_IF_ADDED


def _takes(target: str, name: str, entry: bool) -> bool:
    """Return True if the component has an argument of that name that the code does not set itself."""
    from palimpsest.settings.instantiation import resolve_target  # imports what it names, and torch with it

    parameters = inspect.signature(resolve_target(target)).parameters
    if name in parameters:
        return (entry or parameters[name].default is not inspect.Parameter.empty) and name not in _GIVEN
    return entry and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a user's mistakes into one message and exit status 2; HYDRA_FULL_ERROR=1 shows tracebacks instead."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    if before == "1" and not _SETS_VARIABLE:
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version of the story and exits
    _SETS_VARIABLE.append(True)
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _lacks_shared_memory(error):
            raise
        print(f"\nerror: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        sys.exit(2)
    finally:
        _SETS_VARIABLE.pop()
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ |= {} if before is None else {"HYDRA_FULL_ERROR": before}


def _lacks_shared_memory(error: BaseException) -> bool:
    """Return True for torch's errors of a worker without shared memory, or one that was killed for memory."""
    said = r"shared memory ?\(shm\)|shared memory object|DataLoader worker .*(exited unexpectedly|killed by signal)"
    return re.search(said, str(error)) is not None


def explain(error: BaseException, words: Sequence[str] | None = None) -> str:
    """Return one message that names the key, the value and the remedy. words: what was typed; None: by the shell."""
    if _lacks_shared_memory(error):
        return (
            "the worker processes that load data had too little shared memory (/dev/shm), or too little memory: set "
            "loader.num_workers=0, or give them more (docker run --shm-size=1g, or --ipc=host). The first line of it: "
            f"{str(error).strip().splitlines()[0]}"
        )
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        built = re.search(r"full_key: (\S+)", str(error))
        place = f"{built[1]}: " if built and isinstance(error.__cause__, TypeError) else ""
        return place + explain(error.__cause__, words)
    chain: BaseException | None = error
    while chain is not None:
        unknown = getattr(chain, "full_key", None)
        if unknown and "not in struct" in str(chain):
            typed = sys.argv[1:] if words is None else words
            keys = (key_of(word) for word in typed)  # of which Hydra says the beginning only
            return _unknown_key(
                next((key for key in keys if key.startswith(f"{unknown.rstrip('.')}.")), unknown),
                compose_config(_choices_typed(typed)),
            )
        if isinstance(chain, OverrideParseException):
            key, given, value = chain.override.partition("=")
            if not given:
                return f"{key} has no value; type {key}=..."
            return (
                f"{chain.override} cannot be read ({str(chain).splitlines()[0]}); if {value} is a text, put it in "
                f"two pairs of quotes: {key}='\"{value}\"'"
            )
        chain = chain.__cause__
    said = str(error)
    if said.startswith("Caught ") and "Original Traceback" in said:  # in a process that loads data
        return re.split(r"\n[\w.]+: ", said)[-1].strip()
    return said


def _choices_typed(words: Sequence[str]) -> list[str]:
    """Return the group choices among `words`, which decide the keys of the configuration."""
    try:
        return [word for word in translate(words) if "=" in word and _is_choice(word)]
    except ValueError:
        return []


def _part(path: Path, group: str) -> DictConfig:
    """Return what a choice's file says about its own group."""
    loaded = OmegaConf.load(path)
    return loaded.get(group, loaded)


def _unknown_key(key: str, cfg: DictConfig) -> str:
    parent, _, name = key.rpartition(".")
    while parent and not OmegaConf.is_dict(OmegaConf.select(cfg, parent)):
        parent, _, name = parent.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    existing = sorted(str(k) for k in node if not str(k).startswith("_"))
    if key.partition(".")[0] == "algo":
        parent = "algo"
        name = key.removeprefix("algo.")
        existing = sorted(alias.removeprefix("algo.") for alias in (*ALIASES, *SPELLINGS) if alias.startswith("algo."))
    close = difflib.get_close_matches(name, existing, n=1)
    prefix = f"{parent}." if parent else ""
    guess = f" Did you mean {prefix}{close[0]}?" if close else ""
    others = [path.stem for path in sorted((CONFIGS / prefix.rstrip(".")).glob("*.yaml"))
              if parent and OmegaConf.select(_part(path, parent), name) is not None]  # fmt: skip
    guess += f" It is a key of {parent}={', '.join(others)}." if others else ""
    listing = f"\n  what {parent or 'the configuration'} has: {', '.join(existing)}" if existing else ""
    return f"there is no key {key}.{guess}{listing}"
