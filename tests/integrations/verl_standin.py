"""The part of verl 0.9.1 that is replaced: its modules, registries and signatures, with plain definitions in them."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

CORE, FUNCTIONS = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    centre = mean(x, mask)
    variance = ((x - centre).square() * mask).sum() / (mask.sum() - 1)
    return (x - centre) / (variance + 1e-8).sqrt()


def aggregate(loss: Tensor, mask: Tensor, mode: str, config: Any) -> Tensor:
    info = dict(config.global_batch_info)
    ranks = info.get("dp_size", 1)
    if mode == "token-sum":
        return (loss * mask).sum() * ranks
    if mode == "token-mean":
        return (loss * mask).sum() * ranks / (info.get("batch_num_tokens") or mask.sum())
    rows = (loss * mask).sum(1)
    if mode == "seq-mean-token-mean":
        rows = rows / mask.sum(1).clamp(min=1)
    out = rows.sum() * ranks / (info.get("global_batch_size") or (mask.sum(1) > 0).sum())
    if mode == "seq-mean-token-sum-norm":
        out = out / (info.get("loss_scale_factor") or mask.shape[1])
    return out


def policy_losses() -> dict[str, Any]:
    def metrics(high: Tensor, kl: Tensor, low: Tensor, mask: Tensor) -> dict[str, float]:
        names = ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")
        values = zip(names, (high, kl, low), strict=True)
        return {f"actor/{name}": mean(value.float(), mask).item() for name, value in values}

    def entry(name: str, function: Any, default: str = "token-mean", own_mode: str | None = None) -> Any:
        def loss(
            old_log_prob: Tensor,
            log_prob: Tensor,
            advantages: Tensor,
            response_mask: Tensor,
            loss_agg_mode: str = default,
            config: Any = None,
            rollout_is_weights: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Any]]:
            each, found = function(old_log_prob, log_prob, advantages, response_mask, config)
            weights = 1 if rollout_is_weights is None else rollout_is_weights
            return aggregate(each * weights, response_mask, own_mode or loss_agg_mode, config), found

        loss.__name__ = f"compute_policy_loss_{name}"
        return loss

    def vanilla(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        loss = torch.maximum(-a * ratio, -a * bounded)
        dual = -a * config.get("clip_ratio_c", 3.0)
        lower = (a < 0) & (loss > dual)
        clipped = -a * bounded > -a * ratio
        return torch.where(lower, dual, loss), metrics(clipped, old - new, lower, mask)

    def gspo(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        sequence = (((new - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).detach().unsqueeze(1)
        ratio = (sequence + new - new.detach()).exp()
        bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        clipped = -a * bounded > -a * ratio
        return torch.maximum(-a * ratio, -a * bounded), metrics(clipped, old - new, 0 * old, mask)

    def sapo(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        tau = torch.where(a > 0, config.tau_pos, config.tau_neg)
        gate = torch.sigmoid(tau * ((new - old).exp() - 1)) * 4 / tau
        return -a * gate, metrics(0 * old, old - new, 0 * old, mask)

    def gpg(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        return -a * new, {}

    def cispo(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high).detach()
        return -a * bounded * new, metrics(ratio != bounded, old - new, 0 * old, mask)

    def dppo(close: Any) -> Any:
        def loss(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
            ratio, most = (new - old).exp().detach(), config.get("clip_ratio_c", 20.0)
            valid = close(old.exp(), new.exp().detach(), a > 0, config.clip_ratio_low, config.clip_ratio_high).float()
            found = metrics(1 - valid, old - new, (ratio > most) * valid, mask)
            return -a * ratio.clamp(max=most) * new * valid, found

        return loss

    def tv(p: Tensor, q: Tensor, up: Tensor, low: float, high: float) -> Tensor:
        return torch.where(up, q - p <= high, p - q <= low)

    def kl(p: Tensor, q: Tensor, up: Tensor, low: float, high: float) -> Tensor:
        far = p * (p / q).log() + (1 - p) * ((1 - p + 1e-8) / (1 - q + 1e-8)).log()
        return torch.where(up, (far <= high) | (q <= p), (far <= low) | (q >= p))

    def dro(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        each = config.policy_loss.dro_beta / 2 * (new - old).square() - new * a
        return each, {"actor/ppo_kl": mean(old - new, mask).item()}

    def kl_cov(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        counts = mask > 0
        covariance = (a - a[counts].mean()) * (new - new[counts].mean()).detach()
        count = max(1, int(counts.sum() * config.policy_loss.kl_cov_ratio))
        least = covariance[counts].topk(count).values[-1]
        penalty = config.policy_loss.ppo_kl_coef * (new - old).abs() * (covariance >= least)
        return -a * (new - old).exp() + penalty, {"actor/ppo_kl": mean((new - old).abs(), mask).item()}

    def clip_cov(old: Tensor, new: Tensor, a: Tensor, mask: Tensor, config: Any) -> Any:
        own, found = config.policy_loss, vanilla(old, new, a, mask, config)[1]
        ratio = (new - old).exp()
        bounded = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        covariance = (a - mean(a, mask)) * (new - mean(new, mask)).detach()
        drawn = (covariance > own.clip_cov_lb) & (covariance < own.clip_cov_ub) & (mask > 0)
        drawn &= -a * bounded <= -a * ratio
        # the tests let it draw all
        found = {"actor/pg_clipfrac": mean(drawn.float(), mask).item(), "actor/ppo_kl": found["actor/ppo_kl"]}
        return torch.where(drawn, 0, torch.maximum(-a * ratio, -a * bounded)), found

    def geo_mean(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        d, a, mask = log_prob - old_log_prob, advantages, response_mask
        bounded = d.clamp(-config.clip_ratio_low, config.clip_ratio_high)
        kept = torch.where(a > 0, torch.minimum(d, bounded), torch.where(a < 0, torch.maximum(d, bounded), 0))
        length = mask.sum(1).clamp(min=1)
        loss = -((a * mask).sum(1) / length) * ((kept * mask).sum(1) / length).exp()
        if rollout_is_weights is not None:
            loss = loss * ((rollout_is_weights.log() * mask).sum(1) / length).exp()
        outside = d != bounded
        return loss.mean(), metrics(outside & (a > 0), -d, outside & (a < 0), mask)

    plain = {"vanilla": vanilla, "gpg": gpg, "cispo": cispo, "kl_cov": kl_cov, "clip_cov": clip_cov, "dro": dro}
    plain |= {"dppo_tv": dppo(tv), "dppo_kl": dppo(kl)}
    rows = "seq-mean-token-mean"
    out = {name: entry(name, function) for name, function in plain.items()}
    out |= {"gspo": entry("gspo", gspo, rows), "sapo": entry("sapo", sapo, rows, rows)}
    geo_mean.__name__ = "compute_policy_loss_geo_mean"
    return {**out, "geo_mean": geo_mean}


def estimators() -> dict[str, Any]:
    def groups(scores: Tensor, index: Any) -> list[tuple[int, Tensor]]:
        return [
            (i, torch.tensor([j for j, other in enumerate(index) if other == index[i]])) for i in range(len(scores))
        ]

    def spread(values: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.stack(values).unsqueeze(1) * mask
        return out, out

    def backwards(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
        out, running = torch.zeros_like(rewards), torch.zeros(len(rewards))
        for t in reversed(range(rewards.shape[1])):
            running = torch.where(mask[:, t] > 0, rewards[:, t] + gamma * running, running)
            out[:, t] = running
        return out * mask

    def gae(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any) -> Any:
        out, after, running = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            counts = response_mask[:, t] > 0
            running = torch.where(
                counts, token_level_rewards[:, t] + gamma * after - values[:, t] + gamma * lam * running, running
            )
            after = torch.where(counts, values[:, t], after)
            out[:, t] = running
        return whiten(out, response_mask), out + values

    def grpo(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
    ) -> Any:
        scores, out = token_level_rewards.sum(1), []
        for i, group in groups(scores, index):
            alone = len(group) == 1
            centre, std = (0, 1) if alone else (scores[group].mean(), scores[group].std())
            out.append((scores[i] - centre) / ((std + epsilon) if norm_adv_by_std_in_grpo else 1))
        return spread(out, response_mask)

    def grpo_passk(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        norm_adv_by_std_in_grpo: bool = True,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        scores, out = token_level_rewards.sum(1), []
        for i, group in groups(scores, index):
            first, second = scores[group].topk(2).values
            scale = scores[group].std() + epsilon if config.get("norm_adv_by_std_in_grpo", True) else 1
            out.append(torch.where(scores[i] == first, (first - second) / scale, 0))
        return spread(out, response_mask)

    def reinforce_plus_plus_baseline(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        centred = grpo(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False)[0]
        out = whiten(centred, response_mask) * response_mask
        return out, out

    def leave_one_out(keep: bool) -> Any:
        def rloo(
            token_level_rewards: Tensor,
            response_mask: Tensor,
            index: Any,
            epsilon: float = 1e-6,
            config: Any = None,
            **kwargs: Any,
        ) -> Any:
            scores, out = token_level_rewards.sum(1), []
            for i, group in groups(scores, index):
                others = group[group != i]
                out.append(scores[i] - scores[others].mean() if len(others) else scores[i] * keep)
            return spread(out, response_mask)

        return rloo

    def opo(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        scores, out = token_level_rewards.sum(1), []
        for i, group in groups(scores, index):
            lengths = response_mask.sum(1)[group].float()
            alone = len(group) == 1
            out.append(scores[i] - (0 if alone else (lengths * scores[group]).sum() / lengths.sum()))
        return spread(out, response_mask)

    def reinforce_plus_plus(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
    ) -> Any:
        returns = backwards(token_level_rewards, response_mask, config.gamma)
        return whiten(returns, response_mask) * response_mask, returns

    def remax(
        token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
    ) -> Any:
        returns = backwards(token_level_rewards, response_mask, 1.0)
        return returns - reward_baselines.unsqueeze(1) * response_mask, returns

    def gpg(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        epsilon: float = 1e-6,
        f_norm: float = 1.0,
        alpha: float = 1.0,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        scores = token_level_rewards.sum(1)
        centred = grpo(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=False)[0]
        out = len(scores) / (scores != 0).sum().clamp(min=1) * centred / f_norm
        return out, out

    return {
        "gae": gae,
        "grpo": grpo,
        "grpo_vectorized": types.FunctionType(
            grpo.__code__, grpo.__globals__, "vectorized", grpo.__defaults__, grpo.__closure__
        ),
        "grpo_passk": grpo_passk,
        "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
        "rloo": leave_one_out(True),
        "rloo_vectorized": leave_one_out(False),
        "opo": opo,
        "reinforce_plus_plus": reinforce_plus_plus,
        "remax": remax,
        "gpg": gpg,
    }


def modules() -> dict[str, types.ModuleType]:
    """What stands in sys.modules."""
    names = [
        "verl",
        "verl.trainer",
        "verl.trainer.ppo",
        CORE,
        "verl.utils",
        FUNCTIONS,
        "verl.utils.experimental",
        FUSED,
    ]
    out = {name: types.ModuleType(name) for name in names}
    for name, module in out.items():
        module.__path__ = []  # type: ignore[attr-defined]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(out[parent], child, module)
    out["verl"].__version__ = "0.9.1"  # type: ignore[attr-defined]
    core, functions = out[CORE], out[FUNCTIONS]
    core.POLICY_LOSS_REGISTRY = policy_losses()  # type: ignore[attr-defined]
    core.ADV_ESTIMATOR_REGISTRY = estimators()  # type: ignore[attr-defined]
    for name, function in core.POLICY_LOSS_REGISTRY.items():  # type: ignore[attr-defined]
        setattr(core, f"compute_policy_loss_{name}", function)
    for name, function in core.ADV_ESTIMATOR_REGISTRY.items():  # type: ignore[attr-defined]
        tail = "advantage_return" if name == "gae" else "outcome_advantage"
        function.__name__ = f"compute_{name}_{tail}"
        setattr(core, function.__name__, function)

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def entropy_from_logits(logits: Tensor) -> Tensor:
        logs = logits.float().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)

    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return entropy_from_logits(logits)

    def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
        return logits.softmax(-1).square().sum(-1)

    class FusedLinearForPPO:
        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            logits = hidden_states @ vocab_weights.T / temperature
            return logprobs_from_logits(logits, input_ids), entropy_from_logits(logits)

    for function in (
        logprobs_from_logits,
        entropy_from_logits,
        entropy_from_logits_with_chunking,
        calculate_sum_pi_squared_from_logits,
    ):
        setattr(functions, function.__name__, function)
    out[FUSED].FusedLinearForPPO = FusedLinearForPPO  # type: ignore[attr-defined]
    return out
