"""The exact Bayes denoiser of a corpus that knows its own distribution: p(masked token | visible tokens).

It takes the place of a trained network wherever one is evaluated, so that a sampler or an estimator is measured by
itself: `Subs(schedule, process).model(ExactDenoiser(...))`. `denoise` gives the same answer in float64.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, S states, A arcs, n longest text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.corpora.grammar import END, FiniteStateGrammar

_IMPOSSIBLE = -1e4  # log-probability of an impossible token: finite, so that the head can multiply it


@dataclass(frozen=True)
class _Step:
    """The arcs at one place of the texts, between the states before and behind it.

    source_A, id_A, target_A, p_A: of each arc. end_S: for each state behind, the probability that the text ends there.
    leaves_SA, enters_SA: 1 where an arc leaves a state before, enters one behind.
    """

    source_A: Tensor
    id_A: Tensor
    target_A: Tensor
    p_A: Tensor
    end_S: Tensor
    leaves_SA: Tensor
    enters_SA: Tensor


class ExactDenoiser(nn.Module):
    """A backbone that answers log p(x_0 | x_t) of a mixture of grammars with equal weights, by the forward-backward
    algorithm. Its hidden states are the log-probabilities of the vocabulary, its head is the identity.

    The text of a row is what is neither special nor padding, so its length is known. The noise level is ignored, since
    the posterior of a masked diffusion does not depend on it (Ou et al., arXiv 2406.03736, theorem 1).

    Args:
        grammars: of which each text is drawn, with equal weights.
        id_of_token: id of each token of the grammars; other ids are special.
        mask_id: the mask token.
        vocab_size: number of ids.
    """

    encodes_positions = True

    def __init__(
        self, grammars: Sequence[FiniteStateGrammar], id_of_token: Mapping[str, int], mask_id: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.mask_id, self.vocab_size, self.parts = mask_id, vocab_size, {}
        self.head = nn.Linear(vocab_size, vocab_size, bias=False, dtype=torch.float64).requires_grad_(False)
        nn.init.eye_(self.head.weight)
        self._is_word_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._is_word_V[list(id_of_token.values())] = True
        self._num_grammars, self._steps = len(grammars), self._steps_of(grammars, id_of_token)

    def _steps_of(self, grammars: Sequence[FiniteStateGrammar], id_of_token: Mapping[str, int]) -> list[_Step]:
        """The steps of all grammars side by side, from the first token of a text to the last of the longest."""
        columns, first, begin = [], 0, []
        for grammar in grammars:
            arcs, ids = grammar.arcs, np.array([id_of_token.get(token, -1) for token in grammar.token_ids])
            token_A = np.where(arcs.token == END, -1, ids[arcs.token])
            columns.append((arcs.source + first, token_A, arcs.target + first, np.exp(arcs.log_p)))
            begin.append(first + grammar.start)
            first += grammar.num_states
        source_A, id_A, target_A, p_A = (np.concatenate(column) for column in zip(*columns, strict=True))
        end_S, ends_A, here, steps = np.zeros(first), id_A < 0, np.array(begin), []
        end_S[source_A[ends_A]] = p_A[ends_A]
        while len(arcs := np.flatnonzero(np.isin(source_A, here) & ~ends_A)):
            there = np.unique(target_A[arcs])
            source, target = np.searchsorted(here, source_A[arcs]), np.searchsorted(there, target_A[arcs])
            columns = (source, id_A[arcs], target, p_A[arcs], end_S[there],
                       np.eye(len(here))[:, source], np.eye(len(there))[:, target])  # fmt: skip
            steps.append(_Step(*map(torch.from_numpy, columns)))
            here = there
        return steps

    def encode(
        self, tokens_BL: Tensor, sigma_B: Tensor | None, attention_mask: Tensor | None = None,
        at_BL: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The finite log-probabilities at the N positions of `at_BL`, float64 (N, V); everywhere (B, L, V) without."""
        chosen_BL = torch.ones_like(tokens_BL, dtype=torch.bool) if at_BL is None else at_BL
        log_p_NV = self.denoise(tokens_BL, None, chosen_BL, attention_mask).clamp(min=_IMPOSSIBLE)
        return log_p_NV.unflatten(0, tokens_BL.shape) if at_BL is None else log_p_NV

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log p(token | visible tokens) at the N positions of `at_BL`, float64 (N, V).

        Uniform over all words where the visible tokens belong to no text of the corpus, and at special tokens.
        """
        inside_BL = self._is_word_V[x_BL] | (x_BL == self.mask_id)
        if attention_mask is not None:
            inside_BL &= attention_mask.bool()

        def evidence(x_B: Tensor, id_A: Tensor) -> Tensor:
            return (x_B == self.mask_id) | (x_B == id_A[:, None])

        return self._answers(x_BL, at_BL, inside_BL, evidence, own=True)

    def _answers(
        self, x_BL: Tensor, at_BL: Tensor, inside_BL: Tensor, evidence: Callable[[Tensor, Tensor], Tensor], own: bool
    ) -> Tensor:
        """Return log p(clean token | noised text) at the N positions of `at_BL`, float64 (N, V).

        Args:
            inside_BL: True on the tokens of the texts.
            evidence: noised tokens (B,) and clean tokens (A,) -> q(noised | clean) up to a constant, (A, B).
            own: use the token at a position for the prediction there.
        """
        uniform_V = self._is_word_V.double() / self._is_word_V.sum()
        p_NV = uniform_V.repeat(int(at_BL.sum()), 1)
        length_B = inside_BL.sum(-1)
        text_Bn = torch.arange(int(length_B.max())) < length_B[:, None]
        # The texts alone, from their first token on, with the number of the answer that each position is asked for.
        x_Bn, answer_Bn = torch.zeros(text_Bn.shape, dtype=torch.long), torch.full(text_Bn.shape, -1)
        x_Bn[text_Bn] = x_BL[inside_BL]
        answer_Bn[text_Bn] = torch.where(at_BL, at_BL.flatten().cumsum(0).view(at_BL.shape) - 1, -1)[inside_BL]
        forward = self._forward(x_Bn, evidence)
        backward_SB = torch.zeros_like(forward[-1])
        for place in reversed(range(len(forward) - 1)):
            step = self._steps[place]
            backward_SB = torch.where(length_B == place + 1, step.end_S[:, None], backward_SB)
            told_AB = evidence(x_Bn[:, place], step.id_A)
            ahead_AB = step.p_A[:, None] * backward_SB.index_select(0, step.target_A)
            rows_R = (answer_Bn[:, place] >= 0).nonzero().squeeze(-1)
            if len(rows_R):
                joint_AR = ahead_AB[:, rows_R] * forward[place][:, rows_R].index_select(0, step.source_A)
                joint_AR = joint_AR * told_AB[:, rows_R] if own else joint_AR
                joint_VR = p_NV.new_zeros(self.vocab_size, len(rows_R)).index_add_(0, step.id_A, joint_AR)
                possible_R = joint_VR.sum(0) > 0
                p_NV[answer_Bn[rows_R[possible_R], place]] = joint_VR.T[possible_R]
            backward_SB = _scaled(step.leaves_SA @ ahead_AB.mul_(told_AB))
        return (p_NV / p_NV.sum(-1, keepdim=True)).log()

    def _forward(self, x_Bn: Tensor, evidence: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Before each place, and after the last, the probability of each state and of what is noised until there,
        (S, B), scaled to sum to 1; all 0 where that is impossible."""
        forward = [torch.full((self._num_grammars, len(x_Bn)), 1 / self._num_grammars, dtype=torch.float64)]
        for place, step in enumerate(self._steps[: x_Bn.shape[1]]):
            p_AB = step.p_A[:, None] * forward[-1].index_select(0, step.source_A)
            forward.append(_scaled(step.enters_SA @ p_AB.mul_(evidence(x_Bn[:, place], step.id_A))))
        return forward


class ExactLeaveOneOut(ExactDenoiser):
    """The exact leave-one-out posterior, log p(x_0 at a position | the other tokens of x_t), if noise is other tokens.

    It takes the place of a network. `attention_mask` tells the texts from padding, because any token may be noise.

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
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, at_BL: Tensor | None = None
    ) -> Tensor:
        chosen_BL = torch.ones_like(tokens_BL, dtype=torch.bool) if at_BL is None else at_BL
        inside_BL = torch.ones_like(chosen_BL) if attention_mask is None else attention_mask.bool()
        alpha_B = (-sigma_B.double()).exp()
        log_p_NV = self.leave_one_out(tokens_BL, alpha_B, chosen_BL, inside_BL).clamp(min=_IMPOSSIBLE)
        return log_p_NV.unflatten(0, tokens_BL.shape) if at_BL is None else log_p_NV

    def leave_one_out(self, x_BL: Tensor, alpha_B: Tensor, at_BL: Tensor, inside_BL: Tensor) -> Tensor:
        """Return log p(x_0 | the other tokens of x_t) at the N positions of `at_BL`, float64 (N, V)."""
        kept_B, noise_BV = self.process.keep_prob(alpha_B), self.process.noise_prob(alpha_B)

        def evidence(x_B: Tensor, id_A: Tensor) -> Tensor:
            return noise_BV.gather(1, x_B[:, None]).T + kept_B * (x_B == id_A[:, None])

        return self._answers(x_BL, at_BL, inside_BL, evidence, own=False)


def _scaled(p_SB: Tensor) -> Tensor:
    return p_SB / p_SB.sum(0).clamp(min=torch.finfo(p_SB.dtype).tiny)
