"""Exponential moving average of parameters, in the layout of the reference checkpoints."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palimpsest.models.sharding import gather, sharded_like


class EMA:
    """Shadow copies s of parameters p: after the n-th update s -= (1 - d)(s - p), d = min(decay, (1 + n) / (10 + n)).

    The ramp on d lets short runs forget their initialisation. Frozen parameters are averaged too, so that the file does
    not depend on what was frozen; they equal their average bit for bit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow_params, self._matched(parameters), 1 - decay)

    @contextmanager
    def swapped(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Give the parameters their averages within the context, and their own values after it."""
        current = self._matched(parameters)
        saved = [p.detach().clone() for p in current]
        self.copy_to(current)
        try:
            yield
        finally:
            _copy(saved, current)

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        _copy(self.shadow_params, self._matched(parameters))

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restart the average at the current parameters, with count zero."""
        self.num_updates = 0
        _copy(self._matched(parameters), self.shadow_params)

    def to(self, device: torch.device, parameters: Iterable[nn.Parameter]) -> None:
        """Move the averages to a device, in the precision of the parameters."""
        self.shadow_params = [s.to(device, p.dtype) for s, p in zip(self.shadow_params, self._matched(parameters))]

    def shard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Shard the averages over devices as the parameters are (models/sharding.py)."""
        self.shadow_params = [sharded_like(s, p) for s, p in zip(self.shadow_params, self._matched(parameters))]

    def state_dict(self) -> dict[str, object]:
        """Return the averages as whole tensors. If they are sharded, all devices must call it together."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": gather(self.shadow_params)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load averaged weights and the number of their updates; the decay stays. Raises ValueError if shapes differ;
        nothing has been changed then."""
        loaded: list[Tensor] = state["shadow_params"]
        ours, theirs = [tuple(s.shape) for s in self.shadow_params], [tuple(s.shape) for s in loaded]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint's EMA holds {len(theirs)} tensors that do not fit the model's {len(ours)} parameters"
            )
        self.num_updates = int(state["num_updates"])
        self.shadow_params = [s.to(t.dtype) for s, t in zip(self.shadow_params, loaded)]
        _copy([sharded_like(t, s) for t, s in zip(loaded, self.shadow_params)], self.shadow_params)

    def _matched(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        parameters = list(parameters)
        assert len(parameters) == len(self.shadow_params), "EMA was built for other parameters"
        return parameters


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for s, t in zip(source, target, strict=True):
        t.copy_(s)
