"""The exact Bayes denoiser of a corpus with a known distribution: p(masked token | visible tokens).

It replaces a trained network, so that a sampler or an estimator is measured alone: `Subs(schedule,
process).model(ExactDenoiser(...))`. `denoise` gives the same answer in float64.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, S states, A arcs, n longest text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.common.positions import Positions
from palimpsest.corpora.grammar import END, FiniteStateGrammar

_IMPOSSIBLE = -1e4  # log-probability of an impossible token: finite, so that the head can multiply it
Likelihood = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Step:
    """The arcs at one position of the texts, between the states before and after it."""

    source_A: Tensor
    id_A: Tensor
    target_A: Tensor
    p_A: Tensor
    end_S: Tensor  # probability that the text ends in each state after the position
    leaves_SA: Tensor  # 1 if the arc leaves the state before
    enters_SA: Tensor  # 1 if the arc enters the state after


class ExactDenoiser(nn.Module):
    """A backbone with the exact log p(x_0 | x_t) of a mixture of grammars with equal weights, by the forward-backward
    algorithm. Its hidden states are the log-probabilities of the vocabulary, its head is the identity.

    The text of a row is everything that is neither special nor padding, so its length is known. The noise level is
    ignored, since the posterior of a masked diffusion does not depend on it (Ou et al., arXiv 2406.03736, theorem 1).

    Args:
        grammars: each text is drawn from one of them, with equal weights.
        id_of_token: id of each token of the grammars; other ids are special.
        mask_id: the mask token.
        vocab_size: number of ids.
    """

    encodes_positions = True

    def __init__(
        self, grammars: Sequence[FiniteStateGrammar], id_of_token: Mapping[str, int], mask_id: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.mask_id, self.vocab_size = mask_id, vocab_size
        self.parts = {}
        self.head = nn.Linear(vocab_size, vocab_size, bias=False, dtype=torch.float64).requires_grad_(False)
        nn.init.eye_(self.head.weight)
        self._is_word_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._is_word_V[list(id_of_token.values())] = True
        self._num_grammars, self._steps = len(grammars), self._steps_of(grammars, id_of_token)

    def _steps_of(self, grammars: Sequence[FiniteStateGrammar], id_of_token: Mapping[str, int]) -> list[_Step]:
        """Return the steps of all grammars in parallel, from the first token of a text to the last of the longest."""
        columns, begin = [], []
        first = 0
        for grammar in grammars:
            arcs, ids = grammar.arcs, np.array([id_of_token.get(token, -1) for token in grammar.token_ids])
            token_A = np.where(arcs.token == END, -1, ids[arcs.token])
            columns.append((arcs.source + first, token_A, arcs.target + first, np.exp(arcs.log_p)))
            begin.append(first + grammar.start)
            first += grammar.num_states
        source_A, id_A, target_A, p_A = (np.concatenate(column) for column in zip(*columns, strict=True))
        end_S, ends_A = np.zeros(first), id_A < 0
        end_S[source_A[ends_A]] = p_A[ends_A]
        before, steps = np.array(begin), []
        while len(arcs := np.flatnonzero(np.isin(source_A, before) & ~ends_A)):
            after = np.unique(target_A[arcs])
            source, target = np.searchsorted(before, source_A[arcs]), np.searchsorted(after, target_A[arcs])
            columns = (source, id_A[arcs], target, p_A[arcs], end_S[after],
                       np.eye(len(before))[:, source], np.eye(len(after))[:, target])  # fmt: skip
            steps.append(_Step(*map(torch.from_numpy, columns)))
            before = after
        return steps

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None,
        attention_mask: Tensor | None = None,
        at: Positions | None = None,
    ) -> Tensor:
        """Return the log-probabilities, bounded below, at the N positions `at`, float64 (N, V), or everywhere,
        (B, L, V)."""
        chosen = Positions.everywhere(tokens_BL) if at is None else at
        log_p_NV = self.denoise(tokens_BL, None, chosen, attention_mask).clamp(min=_IMPOSSIBLE)
        return log_p_NV.unflatten(0, tokens_BL.shape) if at is None else log_p_NV

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions, attention_mask: Tensor | None = None) -> Tensor:
        """Return log p(token | visible tokens) at the N positions `at`, float64 (N, V): uniform over all words at
        special tokens, and if no text of the corpus has the visible tokens."""
        inside_BL = self._is_word_V[x_BL] | (x_BL == self.mask_id)
        if attention_mask is not None:
            inside_BL &= attention_mask.bool()
        likelihood = lambda x_B, id_A: (x_B == self.mask_id) | (x_B == id_A[:, None])
        return self._posterior(x_BL, at, inside_BL, likelihood, use_own=True)

    def _posterior(
        self, x_BL: Tensor, at: Positions, inside_BL: Tensor, likelihood: Likelihood, use_own: bool
    ) -> Tensor:
        """Return log p(clean token | noised text) at the N positions `at`, float64 (N, V).

        Args:
            inside_BL: True on the tokens of the texts.
            likelihood: noised tokens (B,) and clean tokens (A,) -> q(noised | clean) up to a constant, (A, B).
            use_own: use the token at a position for the prediction there.
        """
        uniform_V = self._is_word_V.double() / self._is_word_V.sum()
        p_NV = uniform_V.repeat(len(at), 1)
        length_B = inside_BL.sum(-1)
        text_Bn = torch.arange(int(length_B.max())) < length_B[:, None]
        # The texts alone, from their first token on, with the row of the output for each position, -1 for none.
        x_Bn, output_Bn = torch.zeros(text_Bn.shape, dtype=torch.long), torch.full(text_Bn.shape, -1)
        x_Bn[text_Bn] = x_BL[inside_BL]
        output_Bn[text_Bn] = at.spread(torch.arange(len(at)), -1)[inside_BL]
        forward = self._forward(x_Bn, likelihood)
        backward_SB = torch.zeros_like(forward[-1])
        for position in reversed(range(len(forward) - 1)):
            step = self._steps[position]
            backward_SB = torch.where(length_B == position + 1, step.end_S[:, None], backward_SB)
            likelihood_AB = likelihood(x_Bn[:, position], step.id_A)
            ahead_AB = step.p_A[:, None] * backward_SB.index_select(0, step.target_A)
            rows_R = (output_Bn[:, position] >= 0).nonzero().squeeze(-1)
            if len(rows_R):
                joint_AR = ahead_AB[:, rows_R] * forward[position][:, rows_R].index_select(0, step.source_A)
                joint_AR = joint_AR * likelihood_AB[:, rows_R] if use_own else joint_AR
                joint_VR = p_NV.new_zeros(self.vocab_size, len(rows_R)).index_add_(0, step.id_A, joint_AR)
                possible_R = joint_VR.sum(0) > 0
                p_NV[output_Bn[rows_R[possible_R], position]] = joint_VR.T[possible_R]
            backward_SB = _scaled(step.leaves_SA @ ahead_AB.mul_(likelihood_AB))
        return (p_NV / p_NV.sum(-1, keepdim=True)).log()

    def _forward(self, x_Bn: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """Return the probability of each state and of the noised tokens so far, before each position and after the
        last, (S, B), scaled to sum to 1; all 0 if that is impossible."""
        forward = [torch.full((self._num_grammars, len(x_Bn)), 1 / self._num_grammars, dtype=torch.float64)]
        for position, step in enumerate(self._steps[: x_Bn.shape[1]]):
            p_AB = step.p_A[:, None] * forward[-1].index_select(0, step.source_A)
            forward.append(_scaled(step.enters_SA @ p_AB.mul_(likelihood(x_Bn[:, position], step.id_A))))
        return forward


class ExactLeaveOneOut(ExactDenoiser):
    """A backbone with the exact leave-one-out posterior, log p(x_0 at a position | the other tokens of x_t), for noise
    of other tokens. `attention_mask` separates the texts from padding, because any token may be noise.

    Args:
        process: the forward process, a process.Resampling.
    """

    def __init__(
        self,
        grammars: Sequence[FiniteStateGrammar],
        id_of_token: Mapping[str, int],
        mask_id: int,
        vocab_size: int,
        process: object,
    ) -> None:
        super().__init__(grammars, id_of_token, mask_id, vocab_size)
        self.process = process

    def encode(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, at: Positions | None = None
    ) -> Tensor:
        chosen = Positions.everywhere(tokens_BL) if at is None else at
        inside_BL = torch.ones_like(chosen.mask_BL) if attention_mask is None else attention_mask.bool()
        alpha_B = (-sigma_B.double()).exp()
        log_p_NV = self.leave_one_out(tokens_BL, alpha_B, chosen, inside_BL).clamp(min=_IMPOSSIBLE)
        return log_p_NV.unflatten(0, tokens_BL.shape) if at is None else log_p_NV

    def leave_one_out(self, x_BL: Tensor, alpha_B: Tensor, at: Positions, inside_BL: Tensor) -> Tensor:
        """Return log p(x_0 | the other tokens of x_t) at the N positions `at`, float64 (N, V)."""
        kept_B, noise_BV = self.process.keep_prob(alpha_B), self.process.noise_prob(alpha_B)
        likelihood = lambda x_B, id_A: noise_BV.gather(1, x_B[:, None]).T + kept_B * (x_B == id_A[:, None])
        return self._posterior(x_BL, at, inside_BL, likelihood, use_own=False)


def _scaled(p_SB: Tensor) -> Tensor:
    return p_SB / p_SB.sum(0).clamp(min=torch.finfo(p_SB.dtype).tiny)
