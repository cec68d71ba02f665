"""Every method against the catalogue's closed forms of loss and gradient, evaluated by mpmath in 60 digits."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import mpmath as mp
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.reference.registry import objectives

EPS = torch.finfo(torch.float64).eps
mp.mp.dps = 60
HALF = mp.mpf("0.5")
Result = tuple[mp.mpf, ...]


def S(z: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-z))


def LS(z: mp.mpf) -> mp.mpf:
    return min(z, mp.mpf(0)) - mp.log1p(mp.exp(-abs(z)))


def dS(z: mp.mpf) -> mp.mpf:
    return S(z) * S(-z)


# x has a, b, h (log-ratios and margin), lw, ll, rw, rl, qw, ql (log-probs of policy, reference, previous iterate), nw,
# nl (lengths), and every input and hyper-parameter by name. A closed form gives the loss and its derivatives with
# respect to lw and ll (or to the only completion's log-prob).


def logistic(z: mp.mpf, dw: mp.mpf, dl: mp.mpf) -> Result:
    """-log sigmoid(z) for a z with these derivatives."""
    return -LS(z), -S(-z) * dw, -S(-z) * dl


def dpo(x) -> Result:
    return logistic(x.beta * x.h, x.beta, -x.beta)


def smoothed(x, e: mp.mpf) -> Result:
    z = x.beta * x.h
    slope = x.beta * (S(z) - 1 + e)
    return -(1 - e) * LS(z) - e * LS(-z), slope, -slope


def robust(x) -> Result:
    z, e = x.beta * x.h, x.label_smoothing
    slope = x.beta * (S(z) - (1 - e) / (1 - 2 * e))
    return (-(1 - e) * LS(z) + e * LS(-z)) / (1 - 2 * e), slope, -slope


def squared(error: mp.mpf, dw: mp.mpf, dl: mp.mpf) -> Result:
    return error**2, 2 * error * dw, 2 * error * dl


def hinge(x) -> Result:
    k = x.beta if x.beta * x.h < 1 else mp.mpf(0)
    return max(mp.mpf(0), 1 - x.beta * x.h), -k, k


def mcts(x) -> Result:
    return smoothed(x, min(HALF, x.rejected_visits / (max(mp.mpf(1), x.chosen_visits) + x.rejected_visits)))


def dno(x) -> Result:
    return smoothed(x, 1 - S(x.chosen_win_rate - x.rejected_win_rate))


def slic(x) -> Result:
    k = 1 if x.lw - x.ll < x.delta else 0
    return max(mp.mpf(0), x.delta - x.lw + x.ll) - x.lambda_ * x.lw, -k - x.lambda_, mp.mpf(k)


def rso_hinge(x) -> Result:
    k = x.beta if x.beta * (x.lw - x.ll) < 1 else mp.mpf(0)
    return max(mp.mpf(0), 1 - x.beta * (x.lw - x.ll)), -k, k


def sppo(x) -> Result:
    a, b = x.a - (x.chosen_win_rate - HALF) / x.beta, x.b - (x.rejected_win_rate - HALF) / x.beta
    return (a * a + b * b) / 2, a, b


def sppo_hard(x) -> Result:
    a, b = x.a - HALF / x.beta, x.b + HALF / x.beta
    return a * a + b * b, 2 * a, 2 * b


def inpo(x) -> Result:
    share = x.beta / x.eta
    error = (x.lw - x.ll) - share * (x.rw - x.rl) - (1 - share) * (x.qw - x.ql) - 1 / (2 * x.eta)
    return squared(error, mp.mpf(1), mp.mpf(-1))


def copg(x) -> Result:
    gap = x.chosen_reward - x.rejected_reward - x.beta * x.h
    return gap**2 / (2 * x.beta), -gap, gap


def p3o(joint: bool) -> Callable[..., Result]:
    def closed(x) -> Result:
        first, second = x.lw - x.qw, x.ll - x.ql
        gap = x.chosen_reward - x.rejected_reward - x.beta * ((x.qw - x.rw) - (x.ql - x.rl))
        both = mp.exp(min(max(first, -20), 20)) * mp.exp(min(max(second, -20), 20))
        if joint:
            # the lesser of the two, without gradient where the bound is it
            d, e = first - second, x.epsilon
            bounded = gap * both * min(max(d, -e), e)
            slope = -gap * both / 2 * (gap * both * d <= bounded)
            return -min(gap * both * d, bounded) / 2, slope, -slope
        total, slopes = mp.mpf(0), []
        for own, other, g in ((first, second, gap), (second, first, -gap)):
            r, w = mp.exp(min(max(own, -20), 20)), g * mp.exp(min(max(other, -20), 20))
            bounded = w * min(max(r, 1 - x.epsilon), 1 + x.epsilon)
            total -= min(w * r, bounded) / 2
            slopes.append(-w * r / 2 * (w * r <= bounded) * (abs(own) <= 20))
        return total, *slopes

    return closed


def xpo(x) -> Result:
    loss, dw, dl = dpo(x)
    if x.chosen_is_reference:
        return loss + x.alpha * x.lw, dw + x.alpha, dl
    return loss + x.alpha * x.ll, dw, dl + x.alpha


def rpo(x) -> Result:
    loss, dw, dl = dpo(x)
    return loss - x.eta * x.beta * x.lw, dw - x.eta * x.beta, dl


def rpo_average(x) -> Result:
    loss, dw, dl = dpo(x)
    return loss - x.eta * x.lw / x.nw, dw - x.eta / x.nw, dl


def iterative_rpo(x) -> Result:
    loss, dw, dl = dpo(x)
    return loss - x.alpha * x.lw / x.nw, dw - x.alpha / x.nw, dl


def f_dpo(g: Callable[..., mp.mpf], dg: Callable[..., mp.mpf]) -> Callable[..., Result]:
    def closed(x) -> Result:
        q = x.beta * S(-x.beta * (g(x, x.a) - g(x, x.b)))
        return -LS(x.beta * (g(x, x.a) - g(x, x.b))), -q * dg(x, x.a), q * dg(x, x.b)

    return closed


forward_kl = f_dpo(lambda _, u: -mp.exp(-u), lambda _, u: mp.exp(-u))
jsd = f_dpo(lambda _, u: mp.log(2) + LS(u), lambda _, u: S(-u))
alpha_divergence = f_dpo(lambda x, u: -mp.exp(-x.alpha * u) / x.alpha, lambda x, u: mp.exp(-x.alpha * u))
# TRL: (u^(alpha - 1) - 1) / (alpha - 1)
trl_alpha = f_dpo(lambda x, u: (mp.exp((x.alpha - 1) * u) - 1) / (x.alpha - 1), lambda x, u: mp.exp((x.alpha - 1) * u))


def chi_po(x) -> Result:
    z = x.beta * (mp.exp(x.a) + x.a - mp.exp(x.b) - x.b)
    inside = abs(z) < 2 * x.r_max
    z = max(-2 * x.r_max, min(2 * x.r_max, z))
    return logistic(z, x.beta * (mp.exp(x.a) + 1) * inside, -x.beta * (mp.exp(x.b) + 1) * inside)


def nca(x) -> Result:
    u, v = x.beta * x.a, x.beta * x.b
    loss = -LS(u) - LS(-u) / 2 - LS(-v) / 2
    return loss, x.beta * (-S(-u) + S(u) / 2), x.beta * S(v) / 2


def exo(x) -> Result:
    z, e = x.beta * x.h, x.label_smoothing
    loss = S(z) * (LS(z) - mp.log(1 - e)) + S(-z) * (LS(-z) - mp.log(e))
    slope = x.beta * dS(z) * (z - mp.log((1 - e) / e))
    return loss, slope, -slope


def apo_zero(x) -> Result:
    u, v = x.beta * x.a, x.beta * x.b
    return 1 - S(u) + S(v), -x.beta * dS(u), x.beta * dS(v)


def apo_down(x) -> Result:
    u, z = x.beta * x.a, x.beta * x.h
    return S(u) + 1 - S(z), x.beta * (dS(u) - dS(z)), x.beta * dS(z)


def bco_pair(x) -> Result:
    u, v = x.beta * x.a - x.delta, x.beta * x.b - x.delta
    return -LS(u) - LS(-v), -x.beta * S(-u), x.beta * S(v)


def odpo(f: Callable[..., mp.mpf]) -> Callable[..., Result]:
    return lambda x: logistic(x.beta * x.h - x.alpha * f(x.chosen_score, x.rejected_score), x.beta, -x.beta)


def discopop(x) -> Result:
    z = x.beta * x.h
    m, softplus = S(z / x.tau), -LS(z)
    slope = -(1 - m) * S(-z) - m * mp.exp(-z) + m * (1 - m) / x.tau * (mp.exp(-z) - softplus)
    return (1 - m) * softplus + m * mp.exp(-z), x.beta * slope, -x.beta * slope


def flex(x) -> Result:
    return logistic(x.beta * x.a - x.beta_rejected * x.b, x.beta, -x.beta_rejected)


def dpo_shift(x) -> Result:
    return logistic(x.beta * x.a - x.lambda_ * x.beta * x.b, x.beta, -x.lambda_ * x.beta)


def cal_dpo(x) -> Result:
    u, v, c = x.a - 1 / (2 * x.beta), x.b + 1 / (2 * x.beta), x.lambda_
    return -LS(x.h) + c * (u**2 + v**2), -S(-x.h) + 2 * c * u, S(-x.h) + 2 * c * v


def online_ipo(x) -> Result:
    p, c = x.win_probability, 1 / (2 * x.beta)
    slope = 2 * x.h - (2 * p - 1) / x.beta
    return p * (x.h - c) ** 2 + (1 - p) * (x.h + c) ** 2, slope, -slope


def rebel(x) -> Result:
    return squared(x.beta * x.h - (x.rw - x.rl), x.beta, -x.beta)


def sharpening_xpo(x) -> Result:
    loss, dw, dl = rebel(x)
    return x.alpha * x.ll + loss, dw, dl + x.alpha


def dpop(x) -> Result:
    below = x.a < 0
    z = x.beta * (x.h - x.lambda_ * max(mp.mpf(0), -x.a))
    return logistic(z, x.beta * (1 + x.lambda_ * below), -x.beta)


def beta_dpo(x) -> Result:
    loss, dw, dl = logistic(x.batch_beta * x.h, x.batch_beta, -x.batch_beta)
    return loss * x.keep, dw * x.keep, dl * x.keep


def alpha_dpo(x) -> Result:
    lw, ll = x.lw / x.nw, x.ll / x.nl
    gap = (x.a / x.nw - x.b / x.nl - x.gap_mean) / x.gap_std
    return logistic(x.beta * (lw - ll - x.alpha * gap) - x.gamma, x.beta / x.nw, -x.beta / x.nl)


def simpo(x) -> Result:
    return logistic(x.beta * (x.lw / x.nw - x.ll / x.nl) - x.gamma, x.beta / x.nw, -x.beta / x.nl)


def alpha_po(x) -> Result:
    lw, ll = x.lw / x.nw, x.ll / x.nl
    rw, rl = (1 - mp.exp(-x.alpha * lw)) / x.alpha, (1 - mp.exp(-x.alpha * ll)) / x.alpha
    slopes = x.beta * mp.exp(-x.alpha * lw) / x.nw, -x.beta * mp.exp(-x.alpha * ll) / x.nl
    return logistic(x.beta * (rw - rl) - x.gamma, *slopes)


def cpo(x) -> Result:
    loss, dw, dl = logistic(x.beta * (x.lw - x.ll), x.beta, -x.beta)
    return loss - x.alpha * x.lw, dw - x.alpha, dl


def orpo(x) -> Result:
    lw, ll = x.lw / x.nw, x.ll / x.nl
    odds = (lw - ll) - (mp.log(1 - mp.exp(lw)) - mp.log(1 - mp.exp(ll)))
    dw, dl = -x.lambda_ * S(-odds) / (1 - mp.exp(lw)), x.lambda_ * S(-odds) / (1 - mp.exp(ll))
    return -lw - x.lambda_ * LS(odds), (dw - 1) / x.nw, dl / x.nl


def simper(x) -> Result:
    pw, pl = mp.exp(x.lw / x.nw), mp.exp(x.ll / x.nl)
    return pl - pw, -pw / x.nw, pl / x.nl


def rrhf(x) -> Result:
    gap = x.ll / x.nl - x.lw / x.nw
    k = 1 if gap > 0 else 0
    return max(mp.mpf(0), gap) - x.alpha * x.lw, -k / x.nw - x.alpha, k / x.nl


def r_dpo(x) -> Result:
    return logistic(x.beta * x.h + x.alpha * (x.nw - x.nl), x.beta, -x.beta)


def bradley_terry(x) -> Result:
    return logistic(x.lw - x.ll - x.margin, mp.mpf(1), mp.mpf(-1))


def autoregressive_reward(x) -> Result:
    loss, dw, dl = logistic(x.beta * (x.lw - x.ll) - x.gamma, x.beta, -x.beta)
    other, dw_other, dl_other = logistic(x.gamma - x.beta * (x.lw - x.ll), -x.beta, x.beta)
    e = x.label_smoothing
    return (1 - e) * loss + e * other, (1 - e) * dw + e * dw_other, (1 - e) * dl + e * dl_other


def kto(x, kl: mp.mpf | None = None) -> Result:
    z0 = x.kl if kl is None else kl
    u = x.beta * (x.a - z0)
    if x.labels:
        return x.lambda_desirable * (1 - S(u)), -x.lambda_desirable * x.beta * dS(u)
    return x.lambda_undesirable * (1 - S(-u)), x.lambda_undesirable * x.beta * dS(-u)


def apo_zero_unpaired(x) -> Result:
    u = x.beta * x.a
    return (1 - S(u), -x.beta * dS(u)) if x.labels else (S(u), x.beta * dS(u))


def bco(x) -> Result:
    u = x.beta * x.a - x.delta
    if x.labels:
        return -LS(u), -x.beta * S(-u)
    return -x.density_ratio * LS(-u), x.beta * x.density_ratio * S(u)


def npo(x) -> Result:
    return -2 / x.beta * LS(-x.beta * x.a), 2 * S(x.beta * x.a)


def nash(x) -> Result:
    advantage = x.win_probability - HALF - x.beta * x.a
    return -advantage * x.lw, -advantage


def nash_mp(x) -> Result:
    advantage = x.win_probability - HALF - x.beta * x.a - x.beta / x.eta * (x.lw - x.qw)
    return -advantage * x.lw, -advantage


def averaged(closed: Callable[..., Result]) -> Callable[..., Result]:
    """The same on log-ratios per token."""

    def on_averages(x) -> Result:
        y = SimpleNamespace(**{**vars(x), "a": x.a / x.nw, "b": x.b / x.nl, "h": x.a / x.nw - x.b / x.nl})
        loss, dw, dl = closed(y)
        return loss, dw / x.nw, dl / x.nl

    return on_averages


def ipo(x) -> Result:
    return squared(x.h - 1 / (2 * x.beta), mp.mpf(1), mp.mpf(-1))


# (method, options) -> closed form
CLOSED: dict[tuple[str, tuple], Callable[..., Result]] = {
    **{(name, ()): dpo for name in ("dpo", "spin", "online_dpo", "dno_prct", "rso_sigmoid")},
    ("cdpo", ()): lambda x: smoothed(x, x.label_smoothing),
    ("robust_dpo", ()): robust,
    ("ipo", (None,)): ipo,
    ("ipo", ("trl",)): averaged(ipo),
    ("hinge", ()): hinge,
    ("dpo_norm", ()): averaged(dpo),
    ("bradley_terry", ()): bradley_terry,
    ("autoregressive_reward", ()): autoregressive_reward,
    ("dno", ()): dno,
    ("mcts_dpo", ()): mcts,
    ("slic", ()): slic,
    ("rso_hinge", ()): rso_hinge,
    ("sppo", ()): sppo,
    ("sppo_hard", ()): sppo_hard,
    ("inpo", ()): inpo,
    ("copg", ()): copg,
    ("p3o", ("separate",)): p3o(joint=False),
    ("p3o", ("joint",)): p3o(joint=True),
    ("xpo", ()): xpo,
    ("rpo", ("cumulative",)): rpo,
    ("rpo", ("average",)): rpo_average,
    ("iterative_rpo", ()): iterative_rpo,
    **{("f_dpo", ("reverse_kl", c)): dpo for c in (None, "trl")},
    **{("f_dpo", ("forward_kl", c)): forward_kl for c in (None, "trl")},
    **{("f_dpo", ("jsd", c)): jsd for c in (None, "trl")},
    ("f_dpo", ("alpha", None)): alpha_divergence,
    ("f_dpo", ("alpha", "trl")): trl_alpha,
    ("chi_po", ()): chi_po,
    ("nca_pair", ()): nca,
    ("exo_pair", ()): exo,
    ("apo_zero", ()): apo_zero,
    ("apo_down", ()): apo_down,
    ("bco_pair", ()): bco_pair,
    ("odpo", ("log",)): odpo(lambda s, t: mp.log(s - t)),
    ("odpo", ("identity",)): odpo(lambda s, t: s - t),
    ("odpo", ("log_ratio",)): odpo(lambda s, t: mp.log(s / t)),
    ("discopop", ()): discopop,
    ("flex_dpo", ()): flex,
    ("dpo_shift", ()): dpo_shift,
    ("cal_dpo", ()): cal_dpo,
    ("online_ipo", ()): online_ipo,
    ("ipo_md", ()): online_ipo,
    ("sharpening_rebel", ()): rebel,
    ("sharpening_xpo", ()): sharpening_xpo,
    ("dpop", ()): dpop,
    ("beta_dpo", ()): beta_dpo,
    ("alpha_dpo", ()): alpha_dpo,
    ("simpo", ()): simpo,
    ("alpha_po", ()): alpha_po,
    ("cpo", ()): cpo,
    ("orpo", ()): orpo,
    ("simper", ()): simper,
    ("rrhf", ()): rrhf,
    ("r_dpo", ()): r_dpo,
    ("kto", ()): kto,
    ("apo_zero_unpaired", ()): apo_zero_unpaired,
    ("bco", ()): bco,
    ("npo", ()): npo,
    ("nash_md", ("sequence",)): nash,
    ("nash_ema", ("sequence",)): nash,
    ("nash_mp", ("sequence",)): nash_mp,
}
# their statistics come from tokens or from the batch: tests/losses/test_statistics.py
ELSEWHERE = {"aot", "aot_unpaired", "wpo", "mallows_po", "tdpo", "ld_dpo", "sampo"}
# the gradient is not that of the value
STOPPED = {"alpha_dpo", "nash_md", "nash_ema", "nash_mp", "p3o"}
# the papers', or what the catalogue gives where they have none; a changed default would change results without a word
DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.0},
    "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.05},
    "spin": {"beta": 0.1},
    "online_dpo": {"beta": 0.1},
    "dno_prct": {"beta": 0.1},
    "rso_sigmoid": {"beta": 0.05},
    "dpo_norm": {"beta": 5.0},
    "bradley_terry": {"margin": 0.0},
    "autoregressive_reward": {"beta": 0.05, "gamma": 0.0, "label_smoothing": 0.0},
    "dno": {"beta": 0.1},
    "mcts_dpo": {"beta": 0.1},
    "slic": {"delta": 1.0, "lambda_": 0.5},
    "rso_hinge": {"beta": 0.05},
    "sppo": {"beta": 0.001},
    "sppo_hard": {"beta": 0.001},
    "inpo": {"beta": 0.0025, "eta": 0.0075},
    "copg": {"beta": 0.1},
    "p3o": {"beta": 0.1, "epsilon": 0.2},
    "xpo": {"beta": 0.1, "alpha": 1e-5},
    "rpo": {"beta": 0.01, "eta": 0.005},
    "iterative_rpo": {"beta": 0.1, "alpha": 1.0},
    "f_dpo": {"beta": 0.1, "alpha": 0.5},
    "chi_po": {"beta": 0.1, "r_max": float("inf")},
    "nca_pair": {"beta": 0.01},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "bco_pair": {"beta": 0.1},
    "odpo": {"beta": 0.1, "alpha": 1.0},
    "aot": {"beta": 0.01, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.01, "label_smoothing": 0.0},
    "discopop": {"beta": 0.05, "tau": 0.05},
    "flex_dpo": {"beta": 0.1, "beta_rejected": 0.08},
    "dpo_shift": {"beta": 0.1, "lambda_": 0.75},
    "cal_dpo": {"beta": 0.001, "lambda_": 0.5},
    "online_ipo": {"beta": 1.0},
    "ipo_md": {"beta": 1.0},
    "sharpening_rebel": {"beta": 0.1},
    "sharpening_xpo": {"beta": 0.1, "alpha": 1e-5},
    "dpop": {"beta": 0.3, "lambda_": 50.0},
    "beta_dpo": {"beta": 0.1},
    "wpo": {"beta": 0.01, "max_weight": 1.0},
    "mallows_po": {"beta": 0.1, "dispersion": 0.29},
    "alpha_dpo": {"beta": 10.0, "alpha": 0.1, "gamma": 3.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "alpha_po": {"beta": 2.5, "alpha": 0.25, "gamma": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1.0},
    "orpo": {"lambda_": 0.1},
    "simper": {},
    "rrhf": {"alpha": 1.0},
    "r_dpo": {"beta": 0.1, "alpha": 0.05},
    "tdpo": {"beta": 0.1, "alpha": 0.5},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "sampo": {"beta": 0.1},
    "kto": {"beta": 0.1, "lambda_desirable": 1.0, "lambda_undesirable": 1.0},
    "apo_zero_unpaired": {"beta": 0.1},
    "bco": {"beta": 0.1},
    "npo": {"beta": 0.1},
    "nash_md": {"beta": 0.008},
    "nash_ema": {"beta": 0.008},
    "nash_mp": {"beta": 0.1, "eta": 1.0},
}
# away from kinks, of both signs, and wide enough to leave the linear range
POINTS = 40


def hyper_of(name: str) -> list[dict[str, float]]:
    """The defaults, and numbers inside the domains at which nothing cancels."""
    other = {
        "beta": 0.7,
        "label_smoothing": 0.2,
        "alpha": 0.3,
        "gamma": -0.4,
        "delta": 2.5,
        "eta": 1.1,
        "tau": 0.4,
        "lambda_": 0.6,
        "beta_rejected": 0.25,
        "margin": 0.75,
        "r_max": 1.5,
        "lambda_desirable": 1.5,
        "lambda_undesirable": 0.7,
        "epsilon": 0.35,
    }
    changed = {key: abs(other[key]) if name == "alpha_dpo" else other[key] for key in DEFAULTS[name]}
    return [DEFAULTS[name], changed]


def points(name: str, row) -> list[dict[str, float]]:
    """Numbers of every stream and input, by the argument's name."""
    generator = random.Random(name)
    out = []
    for i in range(POINTS):
        spread = (0.5, 3.0, 12.0)[i % 3]
        point: dict[str, float] = {}
        for side in row.sides:
            for model in row.models:
                at = f"{model}_{side}" if side else model
                point[at] = -generator.uniform(0.1, 3 * spread)
            point[f"{side}_lengths"] = generator.randint(1, 9)
        for given in row.inputs:
            if given.boolean:
                point[given.name] = generator.random() < 0.5
            elif given.domain.high == 1.0:
                point[given.name] = generator.random()
            else:
                point[given.name] = generator.uniform(0.1, 3.0)
        if "chosen_score" in point:
            point["chosen_score"] += 3.0
        for given in row.inputs:
            if given.shared:
                point[given.name] = 0.625
        out.append(point)
    return out


def seen(row, point: dict[str, float], hyper: dict[str, float]) -> SimpleNamespace:
    """What closed forms are told."""
    x = {key: mp.mpf(value) for key, value in {**point, **hyper}.items()}
    letters = {row.scores: "l", "reference": "r", "previous": "q"}
    for place, side in zip("wl", row.sides, strict=False):
        for model in row.models:
            x[letters[model] + place] = x[f"{model}_{side}" if side else model]
        x["n" + place] = x[f"{side}_lengths"]
        x["ab"["wl".index(place)]] = x["l" + place] - x.get("r" + place, mp.mpf(0))
    if len(row.sides) == 2:
        x["h"] = x["a"] - x["b"]
    return SimpleNamespace(**x)


def evaluate(row, options: tuple, given: list[dict[str, float]], hyper: dict[str, float], backend: str) -> list[Tensor]:
    """Loss and gradients at the points, through the public function."""
    chosen = dict(zip(row.options, options, strict=True))
    streams = [f"{model}_{side}" if side else model for model in row.models for side in row.sides]
    tensors = {name: torch.tensor([p[name] for p in given], dtype=torch.float64) for name in streams}
    for i in row.inputs:
        values = torch.tensor([p[i.name] for p in given], dtype=torch.bool if i.boolean else torch.float64)
        tensors[i.name] = values[0] if i.shared else values
    taken = row if not row.options else fastpo.reference.objective(row.variants[options].row)
    if taken.lengths in ("average", "count") or (options == ("trl",) and row.length_norm):
        for side in row.sides:
            tensors[f"{side}_lengths"] = torch.tensor([p[f"{side}_lengths"] for p in given])
    leaves = [tensors[name].requires_grad_() for name in streams[: len(row.sides)]]
    with fastpo.use_backend(backend):
        out = getattr(losses, row.name)(**tensors, **hyper, **chosen, reduction="none")
    return [out.loss.detach(), *torch.autograd.grad(out.loss.sum(), leaves)]


by_method = pytest.mark.parametrize(("name", "options"), list(CLOSED), ids=lambda x: str(x).strip("(),'"))


def test_every_method_is_here():
    assert {name for name, _ in CLOSED} | ELSEWHERE == {row.name for row in objectives()} == set(DEFAULTS)
    for row in objectives():
        assert dict(row.defaults) == DEFAULTS[row.name], row.name
        assert {key for name, key in CLOSED if name == row.name} <= set(row.variants or [()])


@by_method
def test_value_and_gradient(name, options):
    """Both backends in fp64: a few roundings of the terms, whose size is that of the loss, of its slopes times what
    they multiply, and of the squares and targets that cancel in it."""
    row = fastpo.reference.objective(name)
    given = points(name, row)
    for hyper in hyper_of(name):
        xs = [seen(row, point, hyper) for point in given]
        exact = [CLOSED[name, options](x) for x in xs]
        for backend in ("native", "reference"):
            found = evaluate(row, options, given, hyper, backend)
            for i, (x, want) in enumerate(zip(xs, exact, strict=True)):
                inputs = [v for v in vars(x).values()]
                largest = max(mp.mpf(1), *map(abs, want), *(abs(s * v) for s in want[1:] for v in inputs))
                target = 1 / (2 * x.beta) if hasattr(x, "beta") and "beta" in hyper else mp.mpf(0)
                largest = max(largest, abs(want[1]) * target)
                if name == "p3o":
                    # constant ratios, exponentials of differences of log-probs, show in no slope
                    largest *= max(mp.mpf(1), *map(abs, inputs))
                for value, truth in zip(found, want, strict=True):
                    assert abs(mp.mpf(value[i].item()) - truth) <= 32 * EPS * largest, (backend, hyper, given[i])


@pytest.mark.parametrize(
    ("name", "options"),
    # where there is a stop-gradient, the gradient is not the derivative of the value, by definition
    [key for key in CLOSED if key[0] not in STOPPED],
    ids=lambda x: str(x).strip("(),'"),
)
def test_closed_gradient_is_the_derivative(name, options):
    """The catalogue's gradient belongs to the catalogue's loss."""
    row = fastpo.reference.objective(name)
    sides = [f"{row.scores}_{side}" if side else row.scores for side in row.sides]
    for point in points(name, row)[:3]:
        hyper = hyper_of(name)[1]
        want = CLOSED[name, options](seen(row, point, hyper))
        for side, slope in zip(sides, want[1:], strict=True):

            def loss(value: mp.mpf) -> mp.mpf:
                return CLOSED[name, options](seen(row, {**point, side: value}, hyper))[0]  # noqa: B023

            assert abs(mp.diff(loss, mp.mpf(point[side])) - slope) < mp.mpf("1e-18") * (1 + abs(slope))
