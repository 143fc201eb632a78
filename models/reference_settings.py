"""The configurations of kuleshov-group/mdlm, kuleshov-group/bd3lms and s-sahoo/duo in the keys of our command line.

Every setting of the network and of its likelihood is read: objective, network, sizes, length, time conditioning, noise.
Values are translated by the tables below, so that a file can only choose what is listed there.
"""

from collections.abc import Callable

Read = Callable[[str], object]  # key of the project -> its plain value, None if it is absent

# Names of objectives in the projects (mdlm's parameterization, elsewhere algo.name) -> parameterization=.
OBJECTIVES = {"subs": "subs", "mdlm": "subs", "bd3lm": "bd3lm", "d3pm": "d3pm", "sedd": "sedd", "score": "sedd",
              "ar": "ar", "duo": "udlm", "duo_base": "udlm"}  # fmt: skip
NETWORKS = {"dit": "dit", "hf_dit": "dit", "ar": "ar", "dimamba": "dimamba"}
NOISES = {"loglinear": "loglinear", "log-linear": "loglinear", "cosine": "cosine", "cosinesqr": "cosinesqr",
          "linear": "linear", "geometric": "geometric"}  # fmt: skip
_AS_HERE = ("data.tokenizer_name_or_path", "model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads",
            "model.dropout", "model.length")  # fmt: skip


def settings_of_reference(read: Read) -> tuple[dict[str, object], str]:
    """Return the settings of a reference's `.ckpt`, and the reason why no model here can use it ("" if one can). Keys
    are those of the command line; settings that the file lacks or its network does not use are left out."""
    grouped = read("algo.name") is not None  # bd3lms and duo
    blocks = read("block_size") is not None  # bd3lms
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
    if not blocks and objective in ("subs", "d3pm"):  # in bd3lms T is the number of sampling steps
        found["T"] = of_algo("T")
    if objective == "d3pm":
        found["subs_masking"] = of_algo("subs_masking")
    if found.get("time_conditioning") and not grouped and objective == "subs":
        found["training.change_of_variables"] = read("training.change_of_variables")
    plain = {key: value for key, value in found.items() if isinstance(value, bool | int | float | str)}
    return plain, _reason(word, objective, of_algo, network)


def _noise(read: Read, grouped: bool, blocks: bool) -> dict[str, object]:
    """Return the schedule. That of bd3lms runs to alpha = 0 and caps the network's input at -log 0.001, the end of
    ours."""
    choice = NOISES.get(str(read("noise.type")))
    if choice in ("linear", "geometric"):
        return {"noise": choice, **{key: read(key) for key in ("noise.sigma_min", "noise.sigma_max")}}
    if choice == "cosine" and grouped:  # another function of t in duo; sigma is the same function of the mask rate
        return {}
    return {"noise": choice, "noise.eps": 1e-3 if blocks or not grouped else read("noise.eps")}


def _reason(word: object, objective: str | None, of_algo: Read, network: str | None) -> str:
    if word is None:  # no configuration of these projects
        return ""
    if objective is None:
        uniform = str(word).lower() in ("distillation", "ot-finetune")
        kind = " (uniform-state diffusion)" if uniform else ""
        return f"its objective is {word}{kind}, which Palimpsest does not have"
    wanted = {"causal_attention": objective == "ar", "cross_attn": objective == "bd3lm"}
    differing = [f"{key}={of_algo(key)}" for key, value in wanted.items() if of_algo(key) not in (None, value)]
    differing += [] if network else [f"backbone={of_algo('backbone')}"]
    return f"its network has {', '.join(differing)}, which none of our networks has" if differing else ""
