"""verl's advantage estimators, policy losses, log-probs and entropies, computed by fastpo under verl's names.

    from fastpo.integrations import verl

    verl.register()      # in the driver and in every worker, before training
    verl.unregister()

Workers are processes of their own: `VERL_USE_EXTERNAL_MODULES=your_module` makes verl import a module of yours in each,
which calls `register`. In the configuration nothing changes: `algorithm.adv_estimator=grpo` and
`actor.policy_loss.loss_mode=gspo` then mean ours.

What is replaced, in verl 0.9.1, in the registries and as functions of `verl.trainer.ppo.core_algos`:

- the estimators gae, grpo, grpo_vectorized, grpo_passk, reinforce_plus_plus, reinforce_plus_plus_baseline, rloo,
  rloo_vectorized, remax, opo and gpg, by `fastpo.advantages`;
- the losses vanilla, gspo, sapo, gpg, clip_cov, kl_cov, geo_mean and cispo, by `fastpo.losses`;
- `logprobs_from_logits`, `entropy_from_logits` and `entropy_from_logits_with_chunking`, all of
  `verl.utils.torch_functional`, by `fastpo.token_logprobs`.

The numbers are verl's on tokens that count, with its conventions: the aggregations and their denominators over the
global batch, dual clip, groups of one sample, epsilons, GPG's share of rewards that are not 0. What differs:

- Tokens that do not count have the advantage and the return 0; verl leaves there what its recursions carried.
- Advantages of equal rewards are exactly 0, and a batch without a token has the loss 0.
- Log-probs and entropies are fp32 for bf16 and fp16 logits, and logits are never overwritten.
- Clip-Cov draws its tokens from another stream of random numbers.
- GSPO's log-ratios are bounded by 20, not 10; tokens whose rollout weight is 0 are in no clip fraction.

KL-Cov with rollout weights, which multiply its penalty too, stays verl's. Written and tested against verl 0.9.1; the
tests of this repository have a stand-in of its shape where it is not installed.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo import advantages, losses, token_logprobs
from fastpo.integrations._swaps import Swap, Swaps

_CORE = "verl.trainer.ppo.core_algos"
_FUNCTIONS = "verl.utils.torch_functional"
_LOSS = (
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
)
_MODES = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


def _aggregation(mode: str, config: Any, mask: Tensor) -> tuple[dict[str, Any], float]:
    """Our aggregation and its denominator, and a number by which the loss is divided after it."""
    if config is None:
        raise ValueError("config must be given: verl's ActorConfig")
    if mode not in _MODES:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(_MODES)}; got {mode!r}")
    info = dict(config.global_batch_info)
    ranks = info.get("dp_size", 1)
    options: dict[str, Any] = {"aggregation": _MODES[mode]}
    if mode == "token-sum":
        return {**options, "num_items": 1 / ranks}, 1.0
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    total = info.get(name)
    if total is not None:
        options["num_items"] = total / ranks
    elif ranks > 1:
        raise ValueError(f"loss_agg_mode={mode!r} on {ranks} ranks needs global_batch_info[{name!r}]")
    if mode != "seq-mean-token-sum-norm":
        return options, 1.0
    scale = info.get("loss_scale_factor")
    return options, float(mask.shape[-1] if scale is None else scale)


def _bounds(config: Any) -> dict[str, Any]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "epsilon_low": config.clip_ratio if low is None else low,
        "epsilon_high": config.clip_ratio if high is None else high,
    }


def _weighted(advantages_: Tensor, weights: Tensor | None) -> Tensor:
    """Every method's policy term is proportional to |A|."""
    return advantages_ if weights is None else advantages_ * weights


def _fractions(metrics: Any, lower: bool = False) -> dict[str, float]:
    """What verl logs, over the tokens of the micro-batch."""
    return {
        "actor/pg_clipfrac": float(metrics.clip_fraction_high + metrics.clip_fraction_low),
        "actor/ppo_kl": float(metrics.old_kl),
        "actor/pg_clipfrac_lower": float(metrics.clip_fraction_dual) if lower else 0.0,
    }


_Loss = Callable[..., tuple[Tensor, dict[str, Any]]]


def _policy_loss(compute: Callable[..., tuple[Any, dict[str, Any]]], mode: str | None = None) -> Callable[[Any], _Loss]:
    """verl's signature around `compute(logprobs, advantages, old, mask, config, aggregation=...)`.

    `mode` is an aggregation that the loss has whatever is asked for.
    """

    def build(original: Any) -> _Loss:
        @functools.wraps(original)
        def loss(
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = "token-mean",
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Any]]:
            options, divisor = _aggregation(mode or loss_agg_mode, config, response_mask)
            a = _weighted(advantages, rollout_is_weights)
            out, metrics = compute(log_prob, a, old_log_prob, response_mask.bool(), config, **options)
            return out.loss / divisor, metrics

        return loss

    return build


def _vanilla(logprobs: Tensor, a: Tensor, old: Tensor, mask: Tensor, config: Any, **options: Any) -> Any:
    dual = float(config.get("clip_ratio_c", 3.0))
    out = losses.ppo(logprobs, a, old, mask=mask, dual_clip=dual, **_bounds(config), **options)
    return out, _fractions(out.metrics, lower=True)


def _gspo(logprobs: Tensor, a: Tensor, old: Tensor, mask: Tensor, config: Any, **options: Any) -> Any:
    out = losses.gspo_token(logprobs, a, old, mask=mask, **_bounds(config), **options)
    return out, _fractions(out.metrics)


def _sapo(logprobs: Tensor, a: Tensor, old: Tensor, mask: Tensor, config: Any, **options: Any) -> Any:
    tau: dict[str, Any] = {"tau_positive": float(config.tau_pos), "tau_negative": float(config.tau_neg)}
    out = losses.sapo(logprobs, a, old, mask=mask, **tau, **options)
    return out, {**_fractions(out.metrics), "actor/pg_clipfrac": 0.0}


def _gpg(logprobs: Tensor, a: Tensor, old: Tensor, mask: Tensor, config: Any, **options: Any) -> Any:
    return losses.reinforce(logprobs, a, mask=mask, **options), {}


def _cispo(logprobs: Tensor, a: Tensor, old: Tensor, mask: Tensor, config: Any, **options: Any) -> Any:
    out = losses.cispo(logprobs, a, old, mask=mask, **_bounds(config), **options)
    return out, _fractions(out.metrics)


def _share(values: Tensor, mask: Tensor) -> float:
    return float((values & mask).sum() / mask.sum().clamp(min=1))


def _clip_cov(original: Any) -> _Loss:
    @functools.wraps(original)
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        options, divisor = _aggregation(loss_agg_mode, config, response_mask)
        mask, own, bounds = response_mask.bool(), config.policy_loss, _bounds(config)
        defaults = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
        fraction, low, high = (d if getattr(own, n) is None else getattr(own, n) for n, d in defaults.items())
        # of the advantages as they are, without weights
        kept = losses.clip_cov_tokens(
            log_prob.detach(),
            advantages,
            old_logprobs=old_log_prob,
            fraction=fraction,
            low=low,
            high=high,
            mask=mask,
            **bounds,
        )
        a = _weighted(advantages, rollout_is_weights)
        out = losses.clip_cov(log_prob, a, kept, old_log_prob, mask=mask, **bounds, **options)
        metrics = {"actor/pg_clipfrac": _share(~kept, mask), "actor/ppo_kl": float(out.metrics.old_kl)}
        return out.loss / divisor, metrics

    return loss


def _kl_cov(original: Any) -> _Loss:
    @functools.wraps(original)
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if rollout_is_weights is not None:
            warnings.warn("fastpo: kl_cov with rollout weights keeps verl's own loss", stacklevel=2)
            return original(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )
        options, divisor = _aggregation(loss_agg_mode, config, response_mask)
        mask, own = response_mask.bool(), config.policy_loss
        fraction = 2e-4 if own.kl_cov_ratio is None else own.kl_cov_ratio
        penalty = 1.0 if own.ppo_kl_coef is None else own.ppo_kl_coef
        chosen = losses.kl_cov_tokens(log_prob.detach(), advantages, fraction=fraction, mask=mask)
        out = losses.kl_cov(log_prob, advantages, chosen, old_log_prob, penalty=penalty, mask=mask, **options)
        distance = torch.where(mask, (log_prob.detach() - old_log_prob).abs(), 0).sum() / mask.sum().clamp(min=1)
        return out.loss / divisor, {"actor/ppo_kl": float(distance)}

    return loss


def _geo_mean(original: Any) -> _Loss:
    @functools.wraps(original)
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        mask, bounds = response_mask.bool(), _bounds(config)
        a = advantages
        if rollout_is_weights is not None:
            # the geometric mean over the sequence
            logs = torch.where(mask, torch.log(rollout_is_weights + 1e-10), 0).sum(-1) / mask.sum(-1).clamp(min=1)
            a = a * logs.exp().unsqueeze(-1)
        # over all rows, those without tokens too
        out = losses.gmpo(
            log_prob, a, old_log_prob, mask=mask, aggregation="seq_mean_token_mean", count_empty=True, **bounds
        )
        logratio = log_prob.detach() - old_log_prob
        outside = (logratio < -bounds["epsilon_low"]) | (logratio > bounds["epsilon_high"])
        metrics = {
            "actor/pg_clipfrac": _share(outside & (advantages > 0), mask),
            "actor/ppo_kl": float(out.metrics.old_kl),
            "actor/pg_clipfrac_lower": _share(outside & (advantages < 0), mask),
        }
        return out.loss, metrics

    return loss


_LOSSES: dict[str, tuple[str, Callable[[Any], _Loss]]] = {
    "vanilla": ("compute_policy_loss_vanilla", _policy_loss(_vanilla)),
    "gspo": ("compute_policy_loss_gspo", _policy_loss(_gspo)),
    "sapo": ("compute_policy_loss_sapo", _policy_loss(_sapo, "seq-mean-token-mean")),
    "gpg": ("compute_policy_loss_gpg", _policy_loss(_gpg)),
    "clip_cov": ("compute_policy_loss_clip_cov", _clip_cov),
    "kl_cov": ("compute_policy_loss_kl_cov", _kl_cov),
    "geo_mean": ("compute_policy_loss_geo_mean", _geo_mean),
    "cispo": ("compute_policy_loss_cispo", _policy_loss(_cispo)),
}


def _group_ids(index: Any, device: torch.device) -> Tensor:
    """(N,) int64 of verl's labels, which may be strings."""
    if isinstance(index, Tensor):
        return index.to(device=device, dtype=torch.int64)
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in index], device=device, dtype=torch.int64)


def _per_token(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One number per response at each of its tokens, as advantage and as return."""
    out = torch.where(mask.bool(), scores.unsqueeze(-1), 0)
    return out, out


def gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """`compute_gae_advantage_return`: whitened advantages, and returns."""
    mask = response_mask.bool()
    out = advantages.gae(token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=mask)
    return advantages.whiten(out.advantages, mask), out.returns


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """`compute_grpo_outcome_advantage`; a group of one keeps its score over 1 + epsilon."""
    scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
    scale: Any = "group" if norm_adv_by_std_in_grpo else "none"
    return _per_token(advantages.grpo(scores, ids, eps=epsilon, scale=scale, singleton="raw"), response_mask)


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_grpo_passk_outcome_advantage`, which reads norm_adv_by_std_in_grpo of the config alone."""
    if config is None:
        raise ValueError("config must be given: verl's AlgoConfig")
    scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
    normalize = bool(config.get("norm_adv_by_std_in_grpo", True))
    return _per_token(advantages.pass_at_k(scores, ids, normalize=normalize, eps=epsilon), response_mask)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_reinforce_plus_plus_baseline_outcome_advantage`."""
    scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
    lengths = response_mask.sum(-1)
    return _per_token(advantages.reinforce_baseline(scores, ids, lengths=lengths, singleton="raw"), response_mask)


def _rloo(singleton: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def rloo(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
        return _per_token(advantages.rloo(scores, ids, singleton=singleton), response_mask)

    return rloo


def opo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_opo_outcome_advantage`."""
    scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
    return _per_token(advantages.opo(scores, response_mask.sum(-1), ids, singleton="raw"), response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`compute_reinforce_plus_plus_outcome_advantage`."""
    if config is None:
        raise ValueError("config must be given: verl's AlgoConfig")
    mask = response_mask.bool()
    out = advantages.reinforce_plus_plus(token_level_rewards, gamma=float(config.gamma), mask=mask)
    return out.advantages, out.returns


def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """`compute_remax_outcome_advantage`."""
    out = advantages.remax(token_level_rewards, reward_baselines, mask=response_mask.bool())
    return out.advantages, out.returns


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`compute_gpg_outcome_advantage`, whose alpha is samples over rewards that are not 0, not samples that teach."""
    scores, ids = token_level_rewards.sum(-1), _group_ids(index, token_level_rewards.device)
    share = len(scores) / torch.count_nonzero(scores).clamp(min=1)
    return _per_token(share * advantages.dr_grpo(scores, ids, singleton="raw") / f_norm, response_mask)


_GROUPED = ("token_level_rewards", "response_mask", "index", "epsilon", "config", "kwargs")
_SCALED = ("token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config")
_ESTIMATORS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "gae": (
        "compute_gae_advantage_return",
        gae,
        ("token_level_rewards", "values", "response_mask", "gamma", "lam"),
    ),
    "grpo": ("compute_grpo_outcome_advantage", grpo, _SCALED),
    "grpo_vectorized": ("compute_grpo_vectorized_outcome_advantage", grpo, _SCALED),
    "grpo_passk": ("compute_grpo_passk_outcome_advantage", grpo_passk, (*_SCALED, "kwargs")),
    "reinforce_plus_plus_baseline": (
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        reinforce_plus_plus_baseline,
        _GROUPED,
    ),
    "rloo": ("compute_rloo_outcome_advantage", _rloo("raw"), _GROUPED),
    "rloo_vectorized": ("compute_rloo_vectorized_outcome_advantage", _rloo("zero"), _GROUPED),
    "opo": ("compute_opo_outcome_advantage", opo, _GROUPED),
    "reinforce_plus_plus": (
        "compute_reinforce_plus_plus_outcome_advantage",
        reinforce_plus_plus,
        ("token_level_rewards", "response_mask", "config", "kwargs"),
    ),
    "remax": (
        "compute_remax_outcome_advantage",
        remax,
        ("token_level_rewards", "reward_baselines", "response_mask", "config", "kwargs"),
    ),
    "gpg": (
        "compute_gpg_outcome_advantage",
        gpg,
        ("token_level_rewards", "response_mask", "index", "epsilon", "f_norm", "alpha", "config", "kwargs"),
    ),
}


# no id of a token: a label that is none is an error, as in verl
_NO_ID = -(2**62)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of that name; fp32 (fp64 for fp64), and the logits stay as they are."""
    return token_logprobs(logits, labels.long(), ignore_index=_NO_ID)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl's function of that name; fp32 (fp64 for fp64)."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_logprobs(logits, index, ignore_index=_NO_ID, stats=("entropy",)).entropy
    assert entropy is not None
    return entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """verl's function of that name; nothing is cut, as nothing of the logits' size is allocated."""
    return entropy_from_logits(logits)


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda _: function


def _swaps() -> list[Swap]:
    swaps = [Swap(_CORE, path, build, _LOSS) for path, build in _LOSSES.values()]
    swaps += [Swap(_CORE, path, _instead(ours), takes) for path, ours, takes in _ESTIMATORS.values()]
    return [
        *swaps,
        Swap(
            _FUNCTIONS, "logprobs_from_logits", _instead(logprobs_from_logits), ("logits", "labels", "inplace_backward")
        ),
        Swap(_FUNCTIONS, "entropy_from_logits", _instead(entropy_from_logits), ("logits",)),
        Swap(
            _FUNCTIONS,
            "entropy_from_logits_with_chunking",
            _instead(entropy_from_logits_with_chunking),
            ("logits", "chunk_size"),
        ),
    ]


class _Registered:
    """The replacements, and what the registries held before."""

    def __init__(self, version: str) -> None:
        core = importlib.import_module(_CORE)
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        entries = []
        for registry, names in (("POLICY_LOSS_REGISTRY", _LOSSES), ("ADV_ESTIMATOR_REGISTRY", _ESTIMATORS)):
            held = getattr(core, registry, None)
            if not isinstance(held, dict) or (missing := set(names) - set(held)):
                what = "" if not isinstance(held, dict) else f" with {', '.join(sorted(missing))}"
                raise ImportError(
                    f"verl {version} has no {_CORE}.{registry}{what}, which this version of fastpo replaces; nothing "
                    "was changed"
                )
            entries += [(held, name, row[0]) for name, row in names.items()]
        self._swaps = Swaps("verl", version, _swaps())
        for held, name, path in entries:
            self._before.append((held, name, held[name]))
            held[name] = getattr(core, path)

    def undo(self) -> None:
        for held, name, original in self._before:
            held[name] = original
        self._swaps.undo()


_active: _Registered | None = None


def register() -> None:
    """Let verl compute by fastpo, in this process. A second call has no effect.

    Raises:
        ImportError: verl is not installed, or one that has other names or signatures than those that are replaced
            (written for 0.9.1); the message names the version and the name, and nothing was changed.
    """
    global _active
    if _active is not None:
        return
    try:
        version = getattr(importlib.import_module("verl"), "__version__", "of unknown version")
        importlib.import_module(_CORE)
    except ModuleNotFoundError as error:
        raise ImportError(f"fastpo.integrations.verl needs verl, with what it imports: {error}") from error
    _active = _Registered(version)


def unregister() -> None:
    """verl as it was. Without effect if it is not replaced."""
    global _active
    if _active is not None:
        _active.undo()
        _active = None
