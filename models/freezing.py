"""Parts of a network that training leaves unchanged (training.freeze).

They are frozen once, before optimizer, average and strategy are built: a parameter that is frozen or released later
would get different gradients on different devices.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from palimpsest.models.backbone import Backbone


def freeze(backbone: Backbone, names: Sequence[str] | None) -> None:
    """Freeze the parts of `backbone` (its `parts`) with these names. Raises ValueError if a part does not exist or is
    empty, or nothing is left to train."""
    if names is None:
        return
    if not backbone.parts:
        raise ValueError(f"training.freeze: {type(backbone).__name__} names no parts to freeze; leave it out")
    parts = {name: [p for module in modules for p in module.parameters()] for name, modules in backbone.parts.items()}
    for name in names:
        if not parts.get(name):
            existing = ", ".join(sorted(name for name, parameters in parts.items() if parameters))
            raise ValueError(f"training.freeze: {type(backbone).__name__} has no part {name}; what exists: {existing}")
        for parameter in parts[name]:
            parameter.requires_grad = False
    if not any(p.requires_grad for p in backbone.parameters()):
        raise ValueError(f"training.freeze=[{', '.join(names)}] leaves nothing to train; leave a part out")


def refuse_frozen(backbone: nn.Module, new: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError if parameters of `new`, which have random values, are frozen and would stay random."""
    frozen = {name: p for name, p in new.items() if not p.requires_grad}
    if frozen:
        raise ValueError(
            f"training.freeze would keep random values in {summary(frozen)} of {type(backbone).__name__}; name weights "
            "to start from that have them (training.from_pretrained=), or freeze other parts"
        )


def summary(parameters: Mapping[str, nn.Parameter]) -> str:
    """List parameters by the module that they belong to, without block numbers."""
    groups: dict[str, int] = {}
    for name, parameter in parameters.items():
        words = name.split(".")
        group = ".".join([words[0], "*", words[2]] if len(words) > 2 and words[1].isdigit() else words[:1])
        groups[group] = groups.get(group, 0) + parameter.numel()
    return ", ".join(f"{group} ({number:,})" for group, number in groups.items())
