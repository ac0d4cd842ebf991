"""The next tokens of many sequences from their logits, each by its own request's rules.

Tensors are named by their axes: B sequences of a batch, S of them that sample, V tokens of the vocabulary.

Drawing is a race: every token's probability is divided by a draw from the exponential distribution, and the largest
quotient wins, as in ``torch.multinomial``. Where the same request's logits differ in their last bits, as they do
between batches of different size, a race is decided otherwise only if two tokens tie to these bits; looking a uniform
draw up in the cumulative distribution would be undecided at each of its many steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from shellv_core.serving.engine import GenerationRequest


@dataclass(frozen=True)
class Choice:
    """A chosen token; `logprob` and `top` (token id and log-probability, most likely first) where asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's rules, its source of randomness, and what it has said so far.

    Args:
        request: the rules.
        prompt_ids: for the repetition penalty, which counts the prompt.
        end_ids: tokens that end an answer, barred before `min_tokens`.
        vocabulary_size: length of the logits.
        device: where the logits are.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        end_ids: Iterable[int],
        vocabulary_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        import torch

        self.request = request
        self.num_tokens = 0
        self._end_ids = torch.tensor(sorted(end_ids), device=device, dtype=torch.long)
        self._bias = {int(token_id): float(bias) for token_id, bias in request.logit_bias.items()}
        self._seen_V: torch.Tensor | None = None
        if request.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocabulary_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(list(set(prompt_ids)), device=device)] = True
        self._counts_V: torch.Tensor | None = None
        if request.frequency_penalty or request.presence_penalty:
            self._counts_V = torch.zeros(vocabulary_size, device=device)
        # A seed gives the same draws on every device; without one they are made where they are needed.
        self._generator = torch.Generator(device if request.seed is None else "cpu")
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    @property
    def adjusts(self) -> bool:
        """Whether `adjusted` changes anything at this token."""
        return (
            self._seen_V is not None
            or self._counts_V is not None
            or bool(self._bias)
            or self.num_tokens < self.request.min_tokens
        )

    def adjusted(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits after penalties and bias, as new float32 numbers."""
        import torch

        request, scores_V = self.request, logits_V.float().clone()
        if self._seen_V is not None:
            penalty = request.repetition_penalty
            punished_V = torch.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
            scores_V = torch.where(self._seen_V, punished_V, scores_V)
        if self._counts_V is not None:
            scores_V -= request.frequency_penalty * self._counts_V + request.presence_penalty * (self._counts_V > 0)
        for token_id, bias in self._bias.items():
            scores_V[token_id] += bias
        if self.num_tokens < request.min_tokens:
            scores_V[self._end_ids] = -torch.inf
        return scores_V

    def draw(self, vocabulary_size: int) -> torch.Tensor:
        """This step's exponential draws, shape [V]."""
        import torch

        empty_V = torch.empty(vocabulary_size, device=self._generator.device)
        return empty_V.exponential_(generator=self._generator)

    def note(self, token_id: int) -> None:
        """Remember what was chosen."""
        self.num_tokens += 1
        if self._seen_V is not None:
            self._seen_V[token_id] = True
        if self._counts_V is not None:
            self._counts_V[token_id] += 1


def choose(logits_BV: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """Pick the next token of each sequence; None where its logits are not finite.

    The samplers remember the choice.
    """
    import torch

    finite_B = logits_BV.isfinite().all(dim=-1)
    scores_BV = logits_BV
    adjusting = [index for index, sampler in enumerate(samplers) if sampler.adjusts]
    if adjusting:
        scores_BV = logits_BV.float().clone()
        for index in adjusting:
            scores_BV[index] = samplers[index].adjusted(logits_BV[index])
    chosen_B = scores_BV.argmax(dim=-1)
    sampling = [index for index, sampler in enumerate(samplers) if sampler.request.temperature > 0]
    if sampling:
        rows_S = torch.tensor(sampling, device=logits_BV.device)
        chosen_B[rows_S] = _race(scores_BV[rows_S].float(), [samplers[index] for index in sampling])
    token_ids, finite = torch.stack([chosen_B, finite_B.long()]).tolist()
    reports = _logprobs(logits_BV, token_ids, samplers)
    choices: list[Choice | None] = []
    for index, sampler in enumerate(samplers):
        if not finite[index]:
            choices.append(None)
            continue
        sampler.note(token_ids[index])
        choices.append(reports.get(index) or Choice(token_ids[index]))
    return choices


def _race(scores_SV: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Token ids [S] drawn from what temperature, top-k, top-p and min-p leave."""
    import torch

    requests, device, size = [sampler.request for sampler in samplers], scores_SV.device, scores_SV.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    # The largest score is taken off first, so that a tiny temperature does not overflow.
    scores_SV = (scores_SV - scores_SV.amax(dim=-1, keepdim=True)) / column([each.temperature for each in requests])
    if any(each.top_k or each.top_p < 1 for each in requests):
        sorted_SV, order_SV = scores_SV.sort(dim=-1, descending=True, stable=True)
        drop_SV = torch.arange(size, device=device) >= column([each.top_k or size for each in requests])
        sorted_SV = sorted_SV.masked_fill(drop_SV, -torch.inf).softmax(dim=-1)
        # A share of 1 keeps all, whatever rounding makes of the sum.
        shares = column([each.top_p if each.top_p < 1 else 2.0 for each in requests])
        drop_SV |= sorted_SV.cumsum(dim=-1) - sorted_SV >= shares
        scores_SV = scores_SV.masked_fill(drop_SV.new_zeros(drop_SV.shape).scatter(1, order_SV, drop_SV), -torch.inf)
    # The most likely token's score is 0, so this compares probabilities.
    floors = column([each.min_p for each in requests])
    scores_SV = scores_SV.masked_fill(scores_SV.exp() < floors, -torch.inf)
    draws_SV = torch.stack([sampler.draw(size).to(device) for sampler in samplers])
    return (scores_SV.softmax(dim=-1) / draws_SV).argmax(dim=-1)


def _logprobs(logits_BV: torch.Tensor, token_ids: list[int], samplers: Sequence[Sampler]) -> dict[int, Choice]:
    """The choices of the sequences whose requests ask for log-probabilities, by index."""
    import torch

    asking = [index for index, sampler in enumerate(samplers) if sampler.request.logprobs]
    if not asking:
        return {}
    rows = torch.tensor(asking, device=logits_BV.device)
    logprobs_RV = logits_BV[rows].float().log_softmax(dim=-1)
    chosen_R1 = torch.tensor([[token_ids[index]] for index in asking], device=logits_BV.device)
    chosen = logprobs_RV.gather(1, chosen_R1)[:, 0].tolist()
    count = min(max(samplers[index].request.top_logprobs for index in asking), logits_BV.shape[-1])
    values, ids = logprobs_RV.topk(count, dim=-1)
    found = {}
    for index, logprob, top_ids, top_values in zip(asking, chosen, ids.tolist(), values.tolist(), strict=True):
        wanted = samplers[index].request.top_logprobs
        top = tuple(zip(top_ids[:wanted], top_values[:wanted], strict=True))
        found[index] = Choice(token_ids[index], logprob, top)
    return found
