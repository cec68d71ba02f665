"""Where the trainer gets what an objective takes beside log-probs: the one table from arguments to their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import losses
from fastpo.algorithms.base import Column, Completions, State
from fastpo.reference.registry import Domain


class Stream(NamedTuple):
    """An input per token: the part of this stream of the batch that belongs to the input's side."""

    name: str


class Drawn(NamedTuple):
    """A stream that is drawn for every step.

    Attributes:
        name: of the stream.
        draw: from the completions of the step and a seeded generator to the stream.
    """

    name: str
    draw: Callable[[Completions, torch.Generator], Tensor]


class Seen(NamedTuple):
    """What a statistic of the step is computed from, without gradients.

    Attributes:
        policy, reference: for the k-th completions, their summed log-probs (B,).
        lengths: for the k-th completions, their tokens (B,).
        labels: bool (B,) of unpaired data, else None.
        generator: of this step.
    """

    policy: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    labels: Tensor | None
    generator: torch.Generator

    def ratio(self, k: int) -> Tensor:
        """The log-ratios of the k-th completions."""
        return self.policy[k] - self.reference[k]


class Statistic(NamedTuple):
    """Inputs that are known only from all examples of the step, and perhaps of those before.

    Attributes:
        compute: from what is seen, the hyper-parameters and the state to the inputs by name, and the new state.
        hyper: hyper-parameters that the objective itself does not have: defaults and domains.
        mismatched: whether it looks at completions under prompts that are not theirs, the last ones of each example.
    """

    compute: Callable[[Seen, Mapping[str, Any], State], tuple[dict[str, Tensor], State]]
    hyper: Mapping[str, tuple[float, Domain]] = {}
    mismatched: bool = False


_DECAY = {"decay": (0.9, Domain(0.0, 1.0, high_open=True))}


def _mismatched_kl(seen: Seen, hyper: Mapping[str, Any], state: State) -> tuple[dict[str, Tensor], State]:
    return {"kl": losses.kto_kl(seen.policy[-1], seen.reference[-1])}, {}


def _shift(seen: Seen, hyper: Mapping[str, Any], state: State) -> tuple[dict[str, Tensor], State]:
    if seen.labels is None:
        rewards = torch.cat([seen.ratio(0), seen.ratio(1)])
        labels = torch.arange(len(rewards), device=rewards.device) < len(rewards) // 2
    else:
        rewards, labels = seen.ratio(0), seen.labels
    delta = losses.bco_delta(hyper["beta"] * rewards, labels, previous=state.get("delta"), decay=float(hyper["decay"]))
    return {"delta": delta}, {"delta": delta}


def _moments(state: State) -> losses.Moments | None:
    return losses.Moments(state["mean"], state["std"]) if state else None


def _batch_beta(seen: Seen, hyper: Mapping[str, Any], state: State) -> tuple[dict[str, Tensor], State]:
    found = losses.beta_dpo_statistics(
        # drawn on the CPU, so that every device draws the same
        (seen.ratio(0) - seen.ratio(1)).cpu(),
        beta=float(hyper["beta"]),
        alpha=float(hyper["alpha"]),
        kept=float(hyper["kept"]),
        decay=float(hyper["decay"]),
        previous=_moments(state),
        generator=seen.generator,
    )
    device = seen.policy[0].device
    inputs = {"batch_beta": found.batch_beta.to(device), "keep": found.keep.to(device)}
    return inputs, found.moments._asdict()


def _gaps(seen: Seen, hyper: Mapping[str, Any], state: State) -> tuple[dict[str, Tensor], State]:
    each = [seen.ratio(k) / seen.lengths[k] for k in (0, 1)]
    found = losses.alpha_dpo_statistics(each[0] - each[1], decay=float(hyper["decay"]), previous=_moments(state))
    return {"gap_mean": found.mean, "gap_std": found.std}, found._asdict()


def _sample(completions: Completions, generator: torch.Generator) -> Tensor:
    pairs = len(completions.lengths) // 2
    ends = completions.cu_seqlens
    chosen = int(ends[pairs])
    masks = [torch.ones(n, dtype=torch.bool) for n in (chosen, int(ends[-1]) - chosen)]
    return torch.cat(
        losses.sampo_sample(
            *masks,
            chosen_cu_seqlens=ends[: pairs + 1],
            rejected_cu_seqlens=ends[pairs:] - chosen,
            generator=generator,
        )
    )


_SHIFT = Statistic(_shift, _DECAY)
_BETA = Statistic(
    _batch_beta,
    {"alpha": (0.6, Domain(0.0, low_open=True)), "kept": (0.8, Domain(0.0, 1.0, low_open=True)), **_DECAY},
)
_GAPS = Statistic(_gaps, _DECAY)

SOURCES: Mapping[str, Column | Stream | Drawn | Statistic] = {
    "labels": Column("label", boolean=True),
    "density_ratio": Column("density_ratio", default=1.0),
    "chosen_score": Column("chosen_score"),
    "rejected_score": Column("rejected_score"),
    "chosen_reward": Column("chosen_reward"),
    "rejected_reward": Column("rejected_reward"),
    "chosen_win_rate": Column("chosen_win_rate"),
    "rejected_win_rate": Column("rejected_win_rate"),
    "win_probability": Column("win_probability"),
    "chosen_is_reference": Column("chosen_is_reference", boolean=True),
    "chosen_visits": Column("chosen_visits"),
    "rejected_visits": Column("rejected_visits"),
    "chosen_log_sum_p2": Stream("policy_log_sum_p2"),
    "rejected_log_sum_p2": Stream("policy_log_sum_p2"),
    "chosen_entropy": Stream("reference_normalised_entropy"),
    "rejected_entropy": Stream("reference_normalised_entropy"),
    "chosen_kl": Stream("kl"),
    "rejected_kl": Stream("kl"),
    "chosen_sample": Drawn("sample", _sample),
    "rejected_sample": Drawn("sample", _sample),
    "kl": Statistic(_mismatched_kl, mismatched=True),
    "delta": _SHIFT,
    "batch_beta": _BETA,
    "keep": _BETA,
    "gap_mean": _GAPS,
    "gap_std": _GAPS,
}
