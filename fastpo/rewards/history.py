"""Rewards that know the past, a prompt's answers or a rubric's scores. Their state is saved with checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.segment_stats import statistics
from fastpo.reference.ranks import _process_group

if TYPE_CHECKING:
    from fastpo.reference.ranks import Group


class HapoHistory:
    """HAPO: a response is rewarded for being shorter than the shortest correct one its prompt has had so far.

    c + w r, c whether it is correct, h the history, l its length; r = 0 without a history, and else

        "cosine": f = cos(min(π/2 · l/h, π)); max(floor, f) of a correct, min(0, f) of a wrong response
        "linear": of a correct one 1 - l/h below h, 0 to (1 + tolerance) h, max(floor, -(l - (1 + tolerance) h)/h)
                  beyond; of a wrong one 0 to there, and max(-1, the same) beyond

    All responses of a batch see the history before it: ask for `rewards`, then `update`.

    Args:
        statistic: h: "shortest", or "mean", of all correct ones.
        form: as above.
        weight: w, at least 0.
        floor: in [-1, 0].
        tolerance: of "linear", at least 0.

    Source: HAPO (2505.11225) eq. 2-5, and its code, which keeps a history per process and none within a batch.
    """

    def __init__(
        self,
        *,
        statistic: Literal["shortest", "mean"] = "shortest",
        form: Literal["cosine", "linear"] = "cosine",
        weight: float = 1.0,
        floor: float = -0.7,
        tolerance: float = 0.1,
    ) -> None:
        if statistic not in ("shortest", "mean"):
            raise ValueError(f"statistic must be 'shortest' or 'mean', got {statistic!r}")
        if form not in ("cosine", "linear"):
            raise ValueError(f"form must be 'cosine' or 'linear', got {form!r}")
        for name, value in (("weight", weight), ("tolerance", tolerance)):
            if not 0 <= _checks.number(name, value) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value:g}")
        if not -1 <= _checks.number("floor", floor) <= 0:
            raise ValueError(f"floor must be in [-1, 0], got {floor:g}")
        self.statistic, self.form = statistic, form
        self.weight, self.floor, self.tolerance = weight, floor, tolerance
        # the shortest correct length, their sum, and their number
        self._seen: dict[str | int, tuple[float, float, int]] = {}

    def _checked(self, prompts: Sequence[str | int], lengths: Tensor, correct: Tensor) -> None:
        _checks.tensor("lengths", lengths, _checks.INTEGERS + _checks.FLOATS)
        _checks.tensor("correct", correct, (torch.bool,))
        if lengths.dim() != 1 or len(prompts) != len(lengths):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({len(prompts)},): one per prompt")
        _checks.shape("correct", correct, lengths.shape, "one per response")
        if any(isinstance(p, bool) or not isinstance(p, (str, int)) for p in prompts):
            raise TypeError("prompts must be names or numbers: str or int")
        if not bool((lengths >= 0).all()):
            raise ValueError("lengths must be at least 0")

    def length(self, prompt: str | int) -> float | None:
        """h of a prompt, None before its first correct response."""
        if prompt not in self._seen:
            return None
        shortest, total, count = self._seen[prompt]
        return shortest if self.statistic == "shortest" else total / count

    def rewards(self, prompts: Sequence[str | int], lengths: Tensor, correct: Tensor) -> Tensor:
        """c + w r of responses, by the history as it is.

        Args:
            prompts: of each response, B names or numbers that stay the same over the run.
            lengths: (B,), in tokens as they were generated.
            correct: bool (B,).

        Returns:
            fp32 (B,).

        Raises:
            TypeError, ValueError: wrong types or shapes, or a negative length.
        """
        self._checked(prompts, lengths, correct)
        history = [self.length(p) for p in prompts]
        there = torch.tensor([h is not None for h in history], dtype=torch.bool, device=lengths.device)
        # a correct answer without tokens counts as one token long
        h = torch.tensor([max(h or 1.0, 1.0) for h in history], dtype=torch.float64, device=lengths.device)
        ratio = lengths.double() / h
        if self.form == "cosine":
            f = torch.cos((math.pi / 2 * ratio).clamp(max=math.pi))
            r = torch.where(correct, f.clamp(min=self.floor), f.clamp(max=0))
        else:
            excess = ratio - (1 + self.tolerance)
            right = torch.where(ratio < 1, 1 - ratio, torch.where(excess <= 0, 0, (-excess).clamp(min=self.floor)))
            r = torch.where(correct, right, torch.where(excess <= 0, 0, (-excess).clamp(min=-1)))
        return (correct.double() + self.weight * torch.where(there, r, 0)).float()

    def update(
        self, prompts: Sequence[str | int], lengths: Tensor, correct: Tensor, *, process_group: Group = None
    ) -> None:
        """Take in a batch, after its rewards; over ranks, all batches, so that all have one history."""
        self._checked(prompts, lengths, correct)
        rows = zip(prompts, lengths.tolist(), correct.tolist(), strict=True)
        found = [(prompt, float(length)) for prompt, length, right in rows if right]
        if process_group is not None and process_group is not False:
            of = _process_group(process_group)
            everyone: list[Any] = [None] * dist.get_world_size(of)
            dist.all_gather_object(everyone, found, group=of)
            found = [pair for rank in everyone for pair in rank]
        for prompt, length in found:
            shortest, total, count = self._seen.get(prompt, (math.inf, 0.0, 0))
            self._seen[prompt] = min(shortest, length), total + length, count + 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {p: (float(s[0]), float(s[1]), int(s[2])) for p, s in state["seen"].items()}


def rubric_score(judgement: str, *, pattern: str = r"<score>\s*(-?\d+)\s*</score>") -> int:
    """The sum of a judge's integer scores of the items of a rubric; 0 where none can be read.

    Args:
        judgement: the judge's text.
        pattern: a regular expression with one group, an integer. The default is ours: ask the judge for it.

    Raises:
        ValueError: the pattern has not one group.

    Source: Toward evaluative thinking (2504.20157); that it is a sum, and 0 on failure, is its code's.
    """
    compiled = re.compile(pattern)
    if compiled.groups != 1:
        raise ValueError(f"pattern must have one group, got {compiled.groups}")
    return sum(int(score) for score in compiled.findall(judgement))


class VersionNormalizer:
    """Scores by a rubric that is rewritten during the run, relative to the other scores by the same version.

    Every rewriting moves and scales the scores: (s - mean) / (std + eps) is by the version's own mean and deviation,
    over all that it has given so far.

    Args:
        eps: added to the deviation, at least 0.

    Source: derived for Meta Policy Optimization (2504.20157), which trains on the scores as they are.
    """

    def __init__(self, *, eps: float = 1e-6) -> None:
        if not 0 <= _checks.number("eps", eps) < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {eps}")
        self.eps = eps
        # number, mean, and sum of squared deviations
        self._seen: dict[int, tuple[float, float, float]] = {}

    def update(self, scores: Tensor, version: int, *, process_group: Group = None) -> None:
        """Take in scores (B,) by a version; NaN is none."""
        own = statistics(_scores(scores).reshape(1, -1), ddof=0, skip_nan=True)
        parts = [torch.stack([own.count, own.mean, own.count * own.var]).flatten().tolist()]
        if process_group is not None and process_group is not False:
            of = _process_group(process_group)
            everyone: list[Any] = [None] * dist.get_world_size(of)
            dist.all_gather_object(everyone, parts[0], group=of)
            parts = everyone
        count, mean, squares = self._seen.get(version, (0.0, 0.0, 0.0))
        for n, m, s in parts:
            if n:
                shift, total = m - mean, count + n
                squares += s + shift * shift * count * n / total
                mean += shift * n / total
                count = total
        self._seen[version] = count, mean, squares

    def normalize(self, scores: Tensor, version: int) -> Tensor:
        """(s - mean) / (std + eps), fp32 (fp64 for fp64 scores); 0 where all scores so far were equal; NaN for NaN."""
        values = _scores(scores)
        if version not in self._seen:
            raise ValueError(f"version {version} has given no scores yet: update first")
        count, mean, squares = self._seen[version]
        std = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
        if std == 0:
            return torch.where(values.isnan(), values, 0)
        return ((values.double() - mean) / (std + self.eps)).to(values.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {int(v): (float(s[0]), float(s[1]), float(s[2])) for v, s in state["seen"].items()}


def _scores(scores: Tensor) -> Tensor:
    _checks.tensor("scores", scores, _checks.FLOATS)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (B,)")
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
