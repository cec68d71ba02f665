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
- the losses vanilla, gspo, sapo, gpg, clip_cov, kl_cov, geo_mean, cispo, dppo_tv, dppo_kl and dro, by `fastpo.losses`;
- `logprobs_from_logits`, `entropy_from_logits`, `entropy_from_logits_with_chunking` and
  `calculate_sum_pi_squared_from_logits`, all of `verl.utils.torch_functional`, by `fastpo.token_logprobs`;
- `FusedLinearForPPO`, the fused head of `impl_backend=torch`, by `fastpo.linear_logprobs`.

Of the registries' names these stay verl's: gdpo and bypass_mode, which call estimators and losses of above, then ours;
optimal_token_baseline and tir_optimal_token_baseline, sums over groups per token for which there is no kernel. So do
KL-Cov and DRO with rollout weights, which multiply their penalties too, with a warning, and the Triton head of
`impl_backend=triton`.

The numbers are verl's on tokens that count, with its conventions: the aggregations and their denominators over the
global batch, dual clip, groups of one sample, epsilons, GPG's share of rewards that are not 0. What differs:

- Tokens that do not count have the advantage and the return 0; verl leaves there what its recursions carried.
- Advantages of equal rewards are exactly 0, and a batch without a token has the loss 0.
- Log-probs and entropies are fp32 for bf16 and fp16 logits, and logits are never overwritten.
- Clip-Cov draws its tokens from another stream of random numbers.
- Log-ratios are bounded by 20, as in most of verl's losses; GSPO's there by 10, Clip-Cov's, KL-Cov's and GMPO's not at
  all. Tokens whose rollout weight is 0 are in no clip fraction.

Written and tested against verl 0.9.1; the tests of this repository have a stand-in of its shape where it is not
installed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import advantages, linear_logprobs, losses, token_logprobs
from fastpo.integrations._swaps import Swap, Swaps

_CORE = "verl.trainer.ppo.core_algos"
_FUNCTIONS = "verl.utils.torch_functional"
_FUSED = "verl.utils.experimental.torch_functional"
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


class _Given(types.SimpleNamespace):
    """The arguments of a call, by verl's names."""

    @property
    def counts(self) -> Tensor:
        """bool (B, T): which tokens count."""
        return self.response_mask.bool()

    @property
    def scores(self) -> Tensor:
        """(B,): the reward of each response."""
        return self.token_level_rewards.sum(-1)

    @property
    def ids(self) -> Tensor:
        """(B,) int64 of verl's labels, which may be strings."""
        device = self.token_level_rewards.device
        if isinstance(self.index, Tensor):
            return self.index.to(device=device, dtype=torch.int64)
        numbers: dict[Any, int] = {}
        labels = [numbers.setdefault(label, len(numbers)) for label in self.index]
        return torch.tensor(labels, device=device, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(B,): tokens of each response."""
        return self.response_mask.sum(-1)


def _given(original: Any) -> Callable[..., _Given]:
    """The arguments of a call of verl's function, its defaults included."""
    signature = inspect.signature(original)

    def given(*args: Any, **kwargs: Any) -> _Given:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if "config" in bound.arguments:
            _check_config(original, bound.arguments["config"])
        return _Given(**bound.arguments)

    return given


# what reads its configuration
_CONFIGURED = ("compute_grpo_passk_outcome_advantage", "compute_reinforce_plus_plus_outcome_advantage")


def _check_config(original: Any, config: Any) -> None:
    name = original.__name__
    if config is None and (name in _CONFIGURED or name.startswith("compute_policy_loss")):
        raise ValueError(f"config must be given: verl's configuration, which {name} reads")


def _aggregation(mode: str, config: Any, mask: Tensor) -> tuple[dict[str, Any], float]:
    """Our aggregation and its denominator, and a number by which the loss is divided after it."""
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
        total = total.to(mask.device) if isinstance(total, Tensor) else total
        options["num_items"] = total / ranks
    elif ranks > 1:
        raise ValueError(f"loss_agg_mode={mode!r} on {ranks} ranks needs global_batch_info[{name!r}]")
    if mode != "seq-mean-token-sum-norm":
        return options, 1.0
    scale = info.get("loss_scale_factor")
    return options, float(mask.shape[-1] if scale is None else scale)


class _Policy(NamedTuple):
    """What our losses take, of a call of verl's.

    Attributes:
        logprobs, old: (B, T).
        advantages: (B, T), without rollout weights.
        weighted: with them: every method's policy term is proportional to |A|.
        weights: (B, T), or None.
        mask: bool (B, T).
        config: verl's.
        options: the aggregation and its denominator.
    """

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    weighted: Tensor
    weights: Tensor | None
    mask: Tensor
    config: Any
    options: dict[str, Any]

    @property
    def bounds(self) -> dict[str, Any]:
        ours = {"epsilon_low": self.config.clip_ratio_low, "epsilon_high": self.config.clip_ratio_high}
        return {name: self.config.clip_ratio if bound is None else bound for name, bound in ours.items()}

    @property
    def logratio(self) -> Tensor:
        return self.logprobs.detach() - self.old

    def loss(self, method: Any, *more: Tensor, **options: Any) -> Any:
        """By one of `fastpo.losses`."""
        return method(self.logprobs, self.weighted, *more, self.old, mask=self.mask, **self.options, **options)

    def share(self, values: Tensor) -> float:
        """Of the tokens."""
        return self.mean((values & self.mask).float())

    def mean(self, values: Tensor) -> float:
        return float(torch.where(self.mask, values, 0).sum() / self.mask.sum().clamp(min=1))


def _fractions(metrics: Any, lower: bool = False) -> dict[str, float]:
    """What verl logs, over the tokens of the micro-batch."""
    return {
        "actor/pg_clipfrac": float(metrics.clip_fraction_high + metrics.clip_fraction_low),
        "actor/ppo_kl": float(metrics.old_kl),
        "actor/pg_clipfrac_lower": float(metrics.clip_fraction_dual) if lower else 0.0,
    }


_Result = tuple[Any, dict[str, float]]


def _vanilla(p: _Policy) -> _Result:
    out = p.loss(losses.ppo, dual_clip=float(p.config.get("clip_ratio_c", 3.0)), **p.bounds)
    return out, _fractions(out.metrics, lower=True)


def _gspo(p: _Policy) -> _Result:
    out = p.loss(losses.gspo_token, **p.bounds)
    return out, _fractions(out.metrics)


def _sapo(p: _Policy) -> _Result:
    out = p.loss(losses.sapo, tau_positive=float(p.config.tau_pos), tau_negative=float(p.config.tau_neg))
    return out, {**_fractions(out.metrics), "actor/pg_clipfrac": 0.0}


def _gpg(p: _Policy) -> _Result:
    return losses.reinforce(p.logprobs, p.weighted, mask=p.mask, **p.options), {}


def _cispo(p: _Policy) -> _Result:
    out = p.loss(losses.cispo, **p.bounds)
    return out, _fractions(out.metrics)


def _dppo(p: _Policy, valid: Tensor) -> _Result:
    """Log-probs weighted by the truncated ratio, of tokens that have not moved too far."""
    most = float(p.config.get("clip_ratio_c", 20.0))
    out = p.loss(losses.cispo, epsilon_low=1.0, epsilon_high=most - 1, policy_mask=valid)
    return out, {
        "actor/pg_clipfrac": p.share(~valid),
        "actor/ppo_kl": float(out.metrics.old_kl),
        "actor/pg_clipfrac_lower": p.share(valid & (p.logratio.exp() > most)),
    }


def _dppo_tv(p: _Policy) -> _Result:
    change = p.logprobs.detach().exp() - p.old.exp()
    low, high = p.bounds.values()
    return _dppo(p, torch.where(p.advantages > 0, change <= high, change >= -low))


def _dppo_kl(p: _Policy) -> _Result:
    new, old = p.logprobs.detach().exp(), p.old.exp()
    # of the two events, this token or another
    kl = -old * p.logratio + (1 - old) * torch.log((1 - old + 1e-8) / (1 - new + 1e-8))
    low, high = p.bounds.values()
    return _dppo(p, torch.where(p.advantages > 0, (kl <= high) | (new <= old), (kl <= low) | (new >= old)))


def _dro(p: _Policy) -> _Result:
    beta = p.config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be positive for loss_mode='dro', got {beta}")
    # the penalty is towards the policy that sampled
    out = p.loss(losses.reinforce, reference_logprobs=p.old, beta=float(beta), kl="k2")
    return out, {"actor/ppo_kl": p.mean(-p.logratio)}


def _clip_cov(p: _Policy) -> _Result:
    own = p.config.policy_loss
    defaults = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
    fraction, low, high = (d if getattr(own, n) is None else getattr(own, n) for n, d in defaults.items())
    # of the advantages as they are, without weights
    kept = losses.clip_cov_tokens(
        p.logprobs.detach(),
        p.advantages,
        old_logprobs=p.old,
        fraction=fraction,
        low=low,
        high=high,
        mask=p.mask,
        **p.bounds,
    )
    out = p.loss(losses.clip_cov, kept, **p.bounds)
    return out, {"actor/pg_clipfrac": p.share(~kept), "actor/ppo_kl": float(out.metrics.old_kl)}


def _kl_cov(p: _Policy) -> _Result:
    own = p.config.policy_loss
    fraction = 2e-4 if own.kl_cov_ratio is None else own.kl_cov_ratio
    penalty = 1.0 if own.ppo_kl_coef is None else own.ppo_kl_coef
    chosen = losses.kl_cov_tokens(p.logprobs.detach(), p.advantages, fraction=fraction, mask=p.mask)
    return p.loss(losses.kl_cov, chosen, penalty=penalty), {"actor/ppo_kl": p.mean(p.logratio.abs())}


def _geo_mean(p: _Policy) -> _Result:
    a = p.advantages
    if p.weights is not None:
        # the geometric mean over the sequence
        logs = torch.where(p.mask, torch.log(p.weights + 1e-10), 0).sum(-1) / p.mask.sum(-1).clamp(min=1)
        a = a * logs.exp().unsqueeze(-1)
    out = p._replace(weighted=a).loss(losses.gmpo, **p.bounds)
    low, high = p.bounds.values()
    outside = (p.logratio < -low) | (p.logratio > high)
    return out, {
        "actor/pg_clipfrac": p.share(outside & (p.advantages > 0)),
        "actor/ppo_kl": float(out.metrics.old_kl),
        "actor/pg_clipfrac_lower": p.share(outside & (p.advantages < 0)),
    }


# those without tokens too
_ROWS: dict[str, Any] = {"aggregation": "seq_mean_token_mean", "count_empty": True}


class _Loss(NamedTuple):
    """A policy loss of verl's.

    Attributes:
        compute: by ours.
        mode: the aggregation that it has whatever is asked for, or None; "rows" is the mean over all rows.
        takes_weights: whether rollout weights are weights of the advantages.
    """

    compute: Callable[[_Policy], _Result]
    mode: str | None = None
    takes_weights: bool = True

    def build(self, original: Any) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
        """What stands in the place of verl's."""
        given = _given(original)

        @functools.wraps(original)
        def loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
            g = given(*args, **kwargs)
            weights = g.rollout_is_weights
            if weights is not None and not self.takes_weights:
                warnings.warn(f"fastpo: {original.__name__} with rollout weights keeps verl's own loss", stacklevel=2)
                return original(*args, **kwargs)
            options, divisor = _ROWS, 1.0
            if self.mode != "rows":
                options, divisor = _aggregation(self.mode or g.loss_agg_mode, g.config, g.response_mask)
            weighted = g.advantages if weights is None else g.advantages * weights
            p = _Policy(g.log_prob, g.old_log_prob, g.advantages, weighted, weights, g.counts, g.config, options)
            out, metrics = self.compute(p)
            return out.loss / divisor, metrics

        return loss


_LOSSES = {
    "vanilla": _Loss(_vanilla),
    "gspo": _Loss(_gspo),
    "sapo": _Loss(_sapo, "seq-mean-token-mean"),
    "gpg": _Loss(_gpg),
    "clip_cov": _Loss(_clip_cov),
    "kl_cov": _Loss(_kl_cov, takes_weights=False),
    "geo_mean": _Loss(_geo_mean, "rows"),
    "cispo": _Loss(_cispo),
    "dppo_tv": _Loss(_dppo_tv),
    "dppo_kl": _Loss(_dppo_kl),
    "dro": _Loss(_dro, takes_weights=False),
}


def _whole(compute: Callable[[_Given], tuple[Tensor, Tensor]]) -> Callable[[Any], Callable[..., Any]]:
    """Around advantages and returns per token."""

    def build(original: Any) -> Callable[..., Any]:
        given = _given(original)

        @functools.wraps(original)
        def estimate(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return compute(given(*args, **kwargs))

        return estimate

    return build


def _outcome(compute: Callable[[_Given], Tensor]) -> Callable[[Any], Callable[..., Any]]:
    """Around one number per response, at each of its tokens as advantage and as return."""

    def spread(g: _Given) -> tuple[Tensor, Tensor]:
        out = torch.where(g.counts, compute(g).unsqueeze(-1), 0)
        return out, out

    return _whole(spread)


def _gae(g: _Given) -> tuple[Tensor, Tensor]:
    out = advantages.gae(g.token_level_rewards, g.values, gamma=float(g.gamma), lam=float(g.lam), mask=g.counts)
    return advantages.whiten(out.advantages, g.counts), out.returns


def _grpo(g: _Given) -> Tensor:
    """A group of one keeps its score over 1 + epsilon."""
    scale: Any = "group" if g.norm_adv_by_std_in_grpo else "none"
    return advantages.grpo(g.scores, g.ids, eps=g.epsilon, scale=scale, singleton="raw")


def _grpo_passk(g: _Given) -> Tensor:
    """Which reads norm_adv_by_std_in_grpo of the configuration alone."""
    normalize = bool(g.config.get("norm_adv_by_std_in_grpo", True))
    return advantages.pass_at_k(g.scores, g.ids, normalize=normalize, eps=g.epsilon)


def _reinforce_baseline(g: _Given) -> Tensor:
    return advantages.reinforce_baseline(g.scores, g.ids, lengths=g.lengths, singleton="raw")


def _reinforce_plus_plus(g: _Given) -> tuple[Tensor, Tensor]:
    out = advantages.reinforce_plus_plus(g.token_level_rewards, gamma=float(g.config.gamma), mask=g.counts)
    return out.advantages, out.returns


def _remax(g: _Given) -> tuple[Tensor, Tensor]:
    out = advantages.remax(g.token_level_rewards, g.reward_baselines, mask=g.counts)
    return out.advantages, out.returns


def _gpg_advantages(g: _Given) -> Tensor:
    """verl's alpha is samples over rewards that are not 0, not samples that teach."""
    share = len(g.scores) / torch.count_nonzero(g.scores).clamp(min=1)
    return share * advantages.dr_grpo(g.scores, g.ids, singleton="raw") / g.f_norm


class _Estimator(NamedTuple):
    """An estimator of verl's: where it is, what stands in its place, and which parameters it has."""

    path: str
    build: Callable[[Any], Callable[..., Any]]
    takes: tuple[str, ...]


_GROUPED = ("token_level_rewards", "response_mask", "index", "epsilon", "config", "kwargs")
_SCALED = ("token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config")
_ESTIMATORS = {
    "gae": _Estimator(
        "compute_gae_advantage_return",
        _whole(_gae),
        ("token_level_rewards", "values", "response_mask", "gamma", "lam"),
    ),
    "grpo": _Estimator("compute_grpo_outcome_advantage", _outcome(_grpo), _SCALED),
    "grpo_vectorized": _Estimator("compute_grpo_vectorized_outcome_advantage", _outcome(_grpo), _SCALED),
    "grpo_passk": _Estimator("compute_grpo_passk_outcome_advantage", _outcome(_grpo_passk), (*_SCALED, "kwargs")),
    "reinforce_plus_plus_baseline": _Estimator(
        "compute_reinforce_plus_plus_baseline_outcome_advantage", _outcome(_reinforce_baseline), _GROUPED
    ),
    "rloo": _Estimator(
        "compute_rloo_outcome_advantage",
        _outcome(lambda g: advantages.rloo(g.scores, g.ids, singleton="raw")),
        _GROUPED,
    ),
    "rloo_vectorized": _Estimator(
        "compute_rloo_vectorized_outcome_advantage",
        _outcome(lambda g: advantages.rloo(g.scores, g.ids, singleton="zero")),
        _GROUPED,
    ),
    "opo": _Estimator(
        "compute_opo_outcome_advantage",
        _outcome(lambda g: advantages.opo(g.scores, g.lengths, g.ids, singleton="raw")),
        _GROUPED,
    ),
    "reinforce_plus_plus": _Estimator(
        "compute_reinforce_plus_plus_outcome_advantage",
        _whole(_reinforce_plus_plus),
        ("token_level_rewards", "response_mask", "config", "kwargs"),
    ),
    "remax": _Estimator(
        "compute_remax_outcome_advantage",
        _whole(_remax),
        ("token_level_rewards", "reward_baselines", "response_mask", "config", "kwargs"),
    ),
    "gpg": _Estimator(
        "compute_gpg_outcome_advantage",
        _outcome(_gpg_advantages),
        ("token_level_rewards", "response_mask", "index", "epsilon", "f_norm", "alpha", "config", "kwargs"),
    ),
}


# no id of a token: a label that is none is an error, as in verl
_NO_ID = -(2**62)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of that name; fp32 (fp64 for fp64), and the logits stay as they are."""
    return token_logprobs(logits, labels.long(), ignore_index=_NO_ID)


def _statistic(logits: Tensor, name: Any) -> Tensor:
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return getattr(token_logprobs(logits, index, ignore_index=_NO_ID, stats=(name,)), name)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl's function of that name; fp32 (fp64 for fp64)."""
    return _statistic(logits, "entropy")


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """verl's function of that name; nothing is cut, as nothing of the logits' size is allocated."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """verl's function of that name; fp32 (fp64 for fp64), without gradient."""
    return _statistic(logits, "log_sum_p2").exp()


def _fused_head(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`FusedLinearForPPO.forward`: log-probs and entropies, fp32 (fp64 for fp64)."""
    found = linear_logprobs(
        hidden_states,
        vocab_weights,
        input_ids.long(),
        temperature=temperature,
        ignore_index=_NO_ID,
        stats=("entropy",),
    )
    assert found.entropy is not None
    return found.logprobs, found.entropy


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda _: function


def _path(loss: str) -> str:
    return f"compute_policy_loss_{loss}"


def _swaps() -> list[Swap]:
    functions = {
        logprobs_from_logits: ("logits", "labels", "inplace_backward"),
        entropy_from_logits: ("logits",),
        entropy_from_logits_with_chunking: ("logits", "chunk_size"),
        calculate_sum_pi_squared_from_logits: ("logits",),
    }
    head = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    return [
        *(Swap(_CORE, _path(name), loss.build, _LOSS) for name, loss in _LOSSES.items()),
        *(Swap(_CORE, path, build, takes) for path, build, takes in _ESTIMATORS.values()),
        *(Swap(_FUNCTIONS, ours.__name__, _instead(ours), takes) for ours, takes in functions.items()),
        Swap(_FUSED, "FusedLinearForPPO.forward", _instead(_fused_head), head, optional=True),
    ]


class _Registered:
    """The replacements, and what the registries held before."""

    def __init__(self, version: str) -> None:
        core = importlib.import_module(_CORE)
        # registry, name, what it held, what it holds since
        self._before: list[tuple[dict[str, Any], str, Any, Any]] = []
        entries = []
        paths = {"POLICY_LOSS_REGISTRY": {name: _path(name) for name in _LOSSES}}
        paths["ADV_ESTIMATOR_REGISTRY"] = {name: row.path for name, row in _ESTIMATORS.items()}
        for registry, names in paths.items():
            held = getattr(core, registry, None)
            if not isinstance(held, dict) or (missing := set(names) - set(held)):
                what = "" if not isinstance(held, dict) else f" with {', '.join(sorted(missing))}"
                raise ImportError(
                    f"verl {version} has no {_CORE}.{registry}{what}, which this version of fastpo replaces; nothing "
                    "was changed"
                )
            entries += [(held, *entry) for entry in names.items()]
        self._swaps = Swaps("verl", version, _swaps())
        for held, name, path in entries:
            self._before.append((held, name, held[name], getattr(core, path)))
            held[name] = getattr(core, path)

    def undo(self) -> None:
        for held, name, original, ours in self._before:
            if held.get(name) is ours:
                held[name] = original
            else:
                warnings.warn(f"verl's {name} was registered again since fastpo did, and stays so", stacklevel=3)
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
