"""The parts of every sampler: the loop, the choice of a token, the time grid, and a sampler's declarations.

A sampler is a `Step`, which chooses positions and then tokens; `run` evaluates the model and writes the tokens.

Shape suffixes: B batch, L length, R rows evaluated, N selected positions, V vocabulary, S times of a grid.
"""

import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import AboveZeroShare, AtLeastOne, Needs, NotNegative
from palimpsest.denoisers import Denoiser, mismatch
from palimpsest.process import Process, draw_categorical
from palimpsest.samplers.trace import Trace, Watcher


@dataclass(frozen=True)
class Request:
    """The predictions that a step needs from the denoiser.

    Attributes:
        at: the positions to predict.
        t_B: the time of each row; None for a causal model.
        s_B: the time to step to, for log p(x_s | x_t); None for log p(x_0 | x_t).
        every_row: also evaluate rows without positions, so that all steps have the same shape.
        erase_BL: tokens that become blank again after the step.
    """

    at: Positions
    t_B: Tensor | None
    s_B: Tensor | None = None
    every_row: bool = False
    erase_BL: Tensor | None = None


@dataclass(frozen=True)
class TokenChoice:
    """The rule by which a token is drawn from the model's distribution.

    The defaults draw from the distribution itself; all else samples a sharper one.

    Args:
        temperature: of the softmax; 0 for the most likely token.
        top_k: keep the k most likely tokens; None for all.
        nucleus_p: keep the fewest tokens whose probabilities sum to p or more (Holtzman et al., arXiv 1904.09751).
    """

    temperature: NotNegative = 1.0
    top_k: Annotated[AtLeastOne | None, Needs("temperature")] = None
    nucleus_p: Annotated[AboveZeroShare, Needs("temperature")] = 1.0

    def draw(self, log_p_NV: Tensor, u_N: Tensor) -> Tensor:
        """Draw one token id per row, (N,), from uniform numbers `u_N`."""
        if self.temperature == 0:
            return log_p_NV.argmax(-1)
        return draw_categorical(self.adjusted(log_p_NV), u_N)

    def adjusted(self, log_p_NV: Tensor) -> Tensor:
        """Return the logarithm of the distribution that `draw` samples, up to a constant per row."""
        if self.temperature == 0:
            best_N1 = log_p_NV.argmax(-1, keepdim=True)
            return torch.full_like(log_p_NV, -torch.inf).scatter(-1, best_N1, 0.0)
        log_p_NV = log_p_NV if self.temperature == 1 else (log_p_NV.double() / self.temperature).log_softmax(-1)
        if self.top_k is not None and self.top_k < log_p_NV.shape[-1]:
            weakest_N1 = log_p_NV.topk(self.top_k, dim=-1).values[:, -1:]
            log_p_NV = log_p_NV.masked_fill(log_p_NV < weakest_N1, -torch.inf)
        if self.nucleus_p < 1:
            ranked_NV, order_NV = log_p_NV.double().softmax(-1).sort(-1, descending=True)
            before_NV = ranked_NV.cumsum(-1) - ranked_NV
            outside_NV = torch.zeros_like(before_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= self.nucleus_p)
            log_p_NV = log_p_NV.masked_fill(outside_NV, -torch.inf)
        return log_p_NV


@dataclass(eq=False)
class Step(ABC):
    """The choices of a sampler at each step: first the positions, then the tokens.

    The settings of a sampler are keyword-only fields.
    """

    model: Denoiser
    trace: Trace
    noise: KeyedNoise
    choice: TokenChoice = field(default=TokenChoice(), kw_only=True)

    def __post_init__(self) -> None:  # noqa: B027 - some have nothing to prepare
        """Prepare the first step."""

    @functools.cached_property
    def u_BL(self) -> Tensor:  # noqa: N802
        """The uniform number that draws the token of each position."""
        return self.noise.uniform(self.trace.ids_BL.shape[1])

    @abstractmethod
    def positions(self, number: int, trace: Trace) -> Request | None:
        """Return the request of step `number`, counted from 1; None ends the sampling."""

    def tokens(self, log_p_NV: Tensor, at: Positions) -> tuple[Tensor, Positions]:
        """Choose tokens from the prediction at the N positions `at`, and say which of these positions they are for.

        By default a token is drawn for each by `self.choice` with the uniform numbers `self.u_BL`.
        """
        return self.choice.draw(log_p_NV, at.take(self.u_BL)), at


class Planned(Step):
    """Unmask positions at steps that are known before the first one, so that no step waits for the device.

    `__post_init__` of a subclass calls `plan`.
    """

    every_row = False

    def plan(self, number_BL: Tensor, time_BS: Tensor, last: int) -> None:
        """Plan all steps.

        Args:
            number_BL: the step that unmasks each position, counted from 0; negative for a position that stays.
            time_BS: the time of each step.
            last: number of steps.
        """
        self._at_each_step = Positions.by_number(number_BL, last)
        self._time_BS = time_BS

    def positions(self, number: int, trace: Trace) -> Request | None:
        at = next(self._at_each_step, None)
        return None if at is None else Request(at, self._time_BS[:, number - 1], every_row=self.every_row)


def run(step: Step, denoiser: Denoiser, trace: Trace, cond: dict[str, Tensor]) -> Trace:
    """Take all steps and return the trace.

    Only rows with requested positions are evaluated, and only these positions are projected onto the vocabulary, in
    chunks of a bounded size.

    Args:
        cond: conditioning that is passed to the denoiser, row by row (B, ...).
    """
    while (request := step.positions(trace.num_steps + 1, trace)) is not None:
        for at, rows_R, inside in row_chunks(request.at, denoiser.vocab_size, request.every_row):
            times = [None if t_B is None else t_B[rows_R] for t_B in (request.t_B, request.s_B)]
            x_RL, row_cond = trace.ids_BL[rows_R], select_rows(cond, rows_R)
            if request.s_B is None:
                log_p_NV = denoiser.denoise(x_RL, times[0], inside, **row_cond)
            else:
                log_p_NV = denoiser.reverse(x_RL, *times, inside, **row_cond)
            ids_M, now = step.tokens(log_p_NV, at)
            trace.write(now, ids_M, log_p_NV[at.find(now), ids_M])
            trace.evaluations_B[rows_R] += denoiser.evaluations
        if request.erase_BL is not None:
            trace.erase(request.erase_BL)
        trace.end_step(shown=request.every_row or len(request.at) > 0 or request.erase_BL is not None)
    return trace


def sampler(
    *processes: type[Process], lengthens: bool = False, independent: bool = False
) -> Callable[[Callable], Callable]:
    """Declare the forward processes that a sampler inverts, and whether it lengthens its texts.

    independent: it needs a model whose schedule alone decides when a token is unmasked.

    The type of the sampler's first argument is the denoiser that it needs, which is checked at every call.
    """

    def declared(sample: Callable) -> Callable:
        needed = next(iter(inspect.signature(sample, eval_str=True).parameters.values())).annotation

        @functools.wraps(sample)
        @torch.no_grad()
        def checked(model: object, *args: object, **kwargs: object) -> object:
            if not isinstance(model, needed):
                raise ValueError(mismatch(sample.__module__, type(model), needed))
            return sample(model, *args, **kwargs)

        checked.processes = processes
        checked.denoiser = needed
        checked.lengthens = lengthens
        checked.independent = independent
        return checked

    return declared


def sampler_of(
    step: type[Step], *processes: type[Process], independent: bool = False, otherwise: type[Step] | None = None
) -> Callable[..., Trace]:
    """Return the sampler that runs a step class; with a model whose network decides when a token is unmasked,
    `otherwise`, if it is given.

    The constructor of the class takes the model, the trace and the noise; its keyword arguments (of a dataclass, its
    fields) are the settings of the sampler.
    """
    parameters = list(inspect.signature(step.__init__, eval_str=True).parameters.values())[1:]
    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]

    def sample(
        model: Denoiser, x_BL: Tensor, generator: KeyedNoise, *, watch: Watcher | None = None, **cond: object
    ) -> Trace:
        trace = Trace(x_BL, model.process, watch)
        chosen = {p.name: cond.pop(p.name) for p in settings if p.name in cond}
        kind = step
        if otherwise is not None and not model.independent_unmasking:
            kind = otherwise
            known = inspect.signature(kind).parameters
            if lost := [name for name, value in chosen.items() if name not in known and isinstance(value, Tensor)]:
                raise ValueError(f"{lost[0]} needs a model whose schedule alone decides when a token is unmasked")
            chosen = {name: value for name, value in chosen.items() if name in known}
        steps = kind(model, trace, generator, **chosen)
        return run(steps, steps.model, trace, cond)

    plain = inspect.signature(sample, eval_str=True)
    model, *others = plain.parameters.values()
    model = model.replace(annotation=parameters[0].annotation)
    sample.__signature__ = plain.replace(parameters=[model, *others[:2], *settings, *others[2:]])
    sample.__module__ = step.__module__
    sample.__doc__ = step.__doc__
    return sampler(*processes, independent=independent)(sample)


def time_grid(num_steps: int, eps: float, device: torch.device | None = None) -> Tensor:
    """Return num_steps + 1 times, evenly spaced from 1 down to eps, float64."""
    return torch.linspace(1.0, eps, num_steps + 1, dtype=torch.float64, device=device)


def with_model(sampler: Callable[..., Trace], changed: Callable[[Denoiser], Denoiser]) -> Callable[..., Trace]:
    """Return `sampler` for a model that `changed` changes first."""
    return lambda model, *args, **cond: sampler(changed(model), *args, **cond)


_CHUNK_NUMBERS = 2**25  # maximum of log-probabilities that are held at once


def row_chunks(
    at: Positions, vocab_size: int, every_row: bool = False
) -> Iterator[tuple[Positions, Tensor, Positions]]:
    """Yield the positions in parts of whole rows, few enough to project at once; one row at least.

    Each part comes with its rows, (R,), and as positions within these rows, (R, L). Rows without positions are left
    out, unless `every_row`.
    """
    stops, numbers = [], 0
    for row, count in enumerate(at.counts):
        if numbers and numbers + count * vocab_size > _CHUNK_NUMBERS:
            stops.append(row)
            numbers = 0
        numbers += count * vocab_size
    for start, stop in itertools.pairwise([0, *stops, len(at.counts)]):
        part = at.in_rows(start, stop)
        if every_row:
            rows_R = torch.arange(start, stop, device=at.mask_BL.device)
            yield part, rows_R, Positions(at.mask_BL[start:stop], at.counts[start:stop])
        elif len(part):
            yield part, *part.compact()


def select_rows(cond: dict[str, Tensor], rows_R: Tensor) -> dict[str, Tensor]:
    """Return the conditioning of some rows; values that are not tensors hold for all rows."""
    return {name: value[rows_R] if isinstance(value, Tensor) else value for name, value in cond.items()}
