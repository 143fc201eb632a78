"""The configurations of kuleshov-group/mdlm, kuleshov-group/bd3lms and s-sahoo/duo under the keys of our command line.

Everything that a network computes, or that its likelihood means, is read: objective, network, sizes, length, time
conditioning, noise. Words are translated by the tables below, so that a file can only choose what is listed there.
"""

from __future__ import annotations

from collections.abc import Callable

Read = Callable[[str], object]  # a key in the project's own words -> its plain value, None if it is absent

# The projects' words for an objective (mdlm's parameterization, elsewhere algo.name) -> parameterization=.
OBJECTIVES = {"subs": "subs", "mdlm": "subs", "bd3lm": "bd3lm", "d3pm": "d3pm", "sedd": "sedd", "score": "sedd",
              "ar": "ar", "duo": "udlm", "duo_base": "udlm"}  # fmt: skip
NETWORKS = {"dit": "dit", "hf_dit": "dit", "ar": "ar", "dimamba": "dimamba"}
NOISES = {"loglinear": "loglinear", "log-linear": "loglinear", "cosine": "cosine", "cosinesqr": "cosinesqr",
          "linear": "linear", "geometric": "geometric"}  # fmt: skip
_UNIFORM = "uniform-state diffusion"
_MISSING = {"distillation": _UNIFORM, "ot-finetune": _UNIFORM}
_AS_HERE = ("data.tokenizer_name_or_path", "model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads",
            "model.dropout", "model.length")  # fmt: skip


def settings_of_reference(read: Read) -> tuple[dict[str, object], str]:
    """The settings of a reference's `.ckpt`, and the reason why none of our models is its model ("" if one is).

    Keys are those of the command line (`model.hidden_size`, `parameterization`, `noise.eps`); what the file does not
    say, and what its network does not use, is left out.
    """
    grouped, blocks = read("algo.name") is not None, read("block_size") is not None  # bd3lms and duo; bd3lms alone
    of_algo = (lambda key: read(f"algo.{key}")) if grouped else read
    word = read("algo.name") or of_algo("parameterization")
    objective = OBJECTIVES.get(str(word))
    found = {key: read(key) for key in _AS_HERE} | {"parameterization": objective}
    network = "ar" if objective == "ar" else NETWORKS.get(str(of_algo("backbone")))
    found["backbone"] = network
    if network != "ar":
        found["time_conditioning"] = of_algo("time_conditioning")
        found |= _noise(read, grouped, blocks)
    if network in ("ar", "dimamba"):
        found.pop("model.cond_dim" if network == "ar" else "model.n_heads")
    if objective == "bd3lm":
        found["block_size"] = read("block_size")
    if blocks and objective in ("bd3lm", "subs", "sedd"):
        found["training.ignore_bos"] = of_algo("ignore_bos")
    if not blocks and objective in ("subs", "d3pm"):  # bd3lms: steps of its sampler
        found["T"] = of_algo("T")
    if objective == "d3pm":
        found["subs_masking"] = of_algo("subs_masking")
    if found.get("time_conditioning") and not grouped and objective == "subs":
        found["training.change_of_variables"] = read("training.change_of_variables")
    plain = {key: value for key, value in found.items() if isinstance(value, bool | int | float | str)}
    return plain, _reason(word, objective, of_algo, network)


def _noise(read: Read, grouped: bool, blocks: bool) -> dict[str, object]:
    """The schedule. bd3lms' runs to alpha = 0 and caps what the network is shown at -log 0.001, the end of ours."""
    choice = NOISES.get(str(read("noise.type")))
    if choice in ("linear", "geometric"):
        return {"noise": choice, **{key: read(key) for key in ("noise.sigma_min", "noise.sigma_max")}}
    if choice == "cosine" and grouped:  # duo's is another function of t; of the mask rate they all show the same sigma
        return {}
    return {"noise": choice, "noise.eps": 1e-3 if blocks or not grouped else read("noise.eps")}


def _reason(word: object, objective: str | None, of_algo: Read, network: str | None) -> str:
    if word is None:  # no configuration of these projects
        return ""
    if objective is None:
        return unknown_objective(str(word))
    wanted = {"causal_attention": objective == "ar", "cross_attn": objective == "bd3lm"}
    differing = [f"{key}={of_algo(key)}" for key, value in wanted.items() if of_algo(key) not in (None, value)]
    differing += [] if network else [f"backbone={of_algo('backbone')}"]
    return f"its network has {', '.join(differing)}, which none of our networks has" if differing else ""


def unknown_objective(word: str) -> str:
    """The reason why a model with this objective cannot be used."""
    name = _MISSING.get(word.lower())
    return f"its objective is {word}{f' ({name})' if name else ''}, which Palimpsest does not have"
