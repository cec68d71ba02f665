"""Public policy objectives, built from the rows of `fastpo.reference.policy`, as `_build` does from the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.policy import PolicyGradientOutput, evaluate
from fastpo.losses._build import _literal
from fastpo.reference.policy import AGGREGATIONS, Batch, PolicyObjective, policies

_TENSORS = """\
    logprobs: log-probs of the sampled tokens under the policy, fp32, bf16, fp16 or fp64: padded (B, T), or packed (N,)
        with cu_seqlens; differentiable.
    advantages: constants, one per sequence (B,), or per token, in the shape of logprobs.
"""
_OLD = """\
    old_logprobs: the same tokens under the policy at the begin of the update; constants. None: that is the policy
        itself, and the ratio is 1.
"""
_MORE = """\
    reference_logprobs: under the reference model, for the penalty; constants. Given with beta=0 it is only measured.
    rollout_logprobs: under the engine that sampled the tokens; constants.
    entropy: of the policy at each token; differentiable.
"""
_VALUES = """\
    values: of the critic, fp32, bf16, fp16 or fp64: padded (B, T), or packed (N,) with cu_seqlens; differentiable.
    returns: constants, in the shape of values, or one per sequence (B,).
    old_values: the values at the begin of the update; constants.
"""
_SELECTED = """\
    selected: bool, in the shape of logprobs: {}.
"""
_KEYWORDS = """\
    beta: weight of the penalty, the sum's KL(π, π_ref) by `kl`; at least 0.
    kl, kl_gradient: "k1", "k2" or "k3": d, d²/2, e^-d - 1 + d of the log-ratio d to the reference; the value, and
        whose gradient is taken, the same unless given. On data of the policy, k1's gradient is 0 on average, k2's that
        of KL(π, π_ref), k3's that of KL(π_ref, π). `kl_reward` puts it into the reward.
    kl_corrected: multiply it by the method's ratio, with its gradient: exact for KL(π, π_ref) off-policy.
    entropy_coefficient: of the bonus, which is subtracted.
    correction: a `RolloutCorrection`: weights of the policy term by old / rollout.
    off_policy_threshold: tokens with A < 0 have no policy term in sequences whose mean of rollout (else old) minus
        policy log-probs is above it.
"""
_POLICY_MASK = """\
    policy_mask: bool, in the shape of logprobs: the tokens that have a policy term, as from `entropy_mask`; the others
        keep their penalty and their place in the denominators.
"""
_LAYOUT = """\
    mask: bool, in that shape, True where a token counts. What stands elsewhere has no influence, NaN included.
    cu_seqlens: int32 (B + 1,), boundaries of the packed sequences. (B,) tensors are then per sequence, also if B = N.
    aggregation: "token_mean": over all tokens; "seq_mean_token_mean": over sequences of the mean over tokens;
        "seq_mean_token_sum": of the sum; "const_norm": the sum over B · max_length. Sequences without tokens are not
        counted, but in "const_norm".
    max_length: of "const_norm".
    count_empty: count sequences without tokens, as TRL does.
    reduction: "mean", or "none" for the losses of the sequences, before the denominator.
    num_items: the denominator instead of the batch's own (a number or 0-dimensional tensor): tokens for "token_mean",
        else sequences of the whole batch, so that micro-batches and ranks add up to one gradient.
"""
_RETURNS = """\
    PolicyGradientOutput(loss, metrics), fp32 (fp64 for fp64 input). A batch without tokens has loss 0.
"""
_RAISES = """\
    TypeError: a wrong type or dtype.
    ValueError: shapes or devices do not match, a number is outside its domain, something that an argument needs is
        missing, or the mean over no sequences is asked for without num_items. The message names the argument.
"""


def signature(row: PolicyObjective) -> str:
    """The parameters of a row's public function, annotated, as source text."""
    optional = "{}: Tensor | None = None"
    if row.values:
        parts = ["values: Tensor", "returns: Tensor", "old_values: Tensor"]
    else:
        parts = ["logprobs: Tensor", "advantages: Tensor", *["selected: Tensor"] * bool(row.selected)]
        parts += [optional.format(f"{name}_logprobs") for name in ("old", "reference", "rollout")]
        parts.append(optional.format("entropy"))
    parts.append("*")
    parts += [f"{name}: float = {_literal(default)}" for name, default in row.defaults.items()]
    if not row.values:
        parts.append(f"beta: float = {row.beta!r}")
        parts.append('kl: Literal["k1", "k2", "k3"] = "k3"')
        parts.append('kl_gradient: Literal["k1", "k2", "k3"] | None = None')
        parts.append("kl_corrected: bool = False")
        parts.append("entropy_coefficient: float = 0.0")
        parts.append("correction: RolloutCorrection | None = None")
        parts.append("off_policy_threshold: float | None = None")
        parts += [optional.format("policy_mask")] * (not row.selected)
    parts += [optional.format(name) for name in ("mask", "cu_seqlens")]
    known = ", ".join(f'"{name}"' for name in AGGREGATIONS)
    parts.append(f'aggregation: Literal[{known}] = "{row.aggregation}"')
    parts += ["max_length: int | None = None", "count_empty: bool = False"]
    parts.append('reduction: Literal["mean", "none"] = "mean"')
    parts.append("num_items: float | Tensor | None = None")
    return ", ".join(parts)


def _docstring(row: PolicyObjective) -> str:
    first, _, rest = row.doc.partition("\n")
    arguments = _VALUES
    if not row.values:
        arguments = _TENSORS + _SELECTED.format(row.selected) * bool(row.selected) + _OLD + _MORE
    arguments += "".join(f"    {name}: in {domain}.\n" for name, domain in row.domains.items())
    if not row.values:
        arguments += _KEYWORDS + _POLICY_MASK * (not row.selected)
    names = "; ".join(f"{library}: {name}" for library, name in row.aliases.items())
    source = f"Source: {row.title}, {row.paper}, {row.equation}." + (f" Elsewhere: {names}." if names else "")
    parts = [first, rest.strip(), source, f"Args:\n{arguments}{_LAYOUT}", f"Returns:\n{_RETURNS}"]
    return "\n\n".join(part.rstrip() for part in [*parts, f"Raises:\n{_RAISES}"] if part) + "\n"


# names that the function needs are closure cells: torch.compile looks globals up in the module of that name
_TEMPLATE = """\
from __future__ import annotations
def build(_evaluate, _row, _Batch):
    def {name}({signature}) -> PolicyGradientOutput:
        return _evaluate(_row, _Batch({batch}), {{{hyper}}}, {keywords})
    return {name}
"""


def build(row: PolicyObjective) -> Callable[..., Any]:
    """The public function of a row, compiled from a template so that Python itself binds arguments."""
    keywords = ["aggregation", "max_length", "count_empty", "reduction", "num_items"]
    if row.values:
        batch = "values, returns, old_values, None, None, None, mask, None, cu_seqlens"
    else:
        selected = "selected" if row.selected else "policy_mask"
        models = "old_logprobs, reference_logprobs, rollout_logprobs, entropy"
        batch = f"logprobs, advantages, {models}, mask, {selected}, cu_seqlens"
        keywords += ["beta", "kl", "kl_gradient", "kl_corrected", "entropy_coefficient", "correction"]
        keywords.append("off_policy_threshold")
    source = _TEMPLATE.format(
        name=row.name,
        signature=signature(row),
        batch=batch,
        hyper=", ".join(f"{name!r}: {name}" for name in row.defaults),
        keywords=", ".join(f"{name}={name}" for name in keywords),
    )
    scope: dict[str, Any] = {"__name__": "fastpo.losses"}
    exec(source, scope)
    loss = scope["build"](evaluate, row, Batch)
    loss.__qualname__ = row.name
    loss.__doc__ = _docstring(row)
    return loss


def stub() -> str:
    """The lines of the type stub."""
    lines = [f"def {row.name}({signature(row)}) -> {PolicyGradientOutput.__name__}: ..." for row in policies()]
    return "\n".join(lines) + "\n"
