"""Public loss functions, built from registry rows: signature, defaults and docstring come from the row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from fastpo.kernels.objective import Output, PairwiseOutput, PolicyOutput, UnpairedOutput, evaluate
from fastpo.reference.registry import Input, Objective, objectives
from fastpo.reference.sequence import Side

_OUTPUTS: dict[str, type[Output]] = {"pairwise": PairwiseOutput, "unpaired": UnpairedOutput, "policy": PolicyOutput}

_LAYOUT = """\
    {masks}: bool, of the shape of the token log-probs, True where a token counts. What stands elsewhere has no
        influence, NaN included.
    {boundaries}: int32 (B + 1,), boundaries of the packed sequences.
"""

_POLICY = {
    "pairwise": """\
    policy_chosen, policy_rejected: log-probs of the completions under the policy, fp32, bf16, fp16 or fp64:
        summed per sequence (B,); or per token, padded (B, T), or packed (N,) with cu_seqlens. Chosen and
        rejected may differ in T and N.
""",
    "unpaired": """\
    policy: log-probs of the completions under the policy, fp32, bf16, fp16 or fp64: summed per sequence (B,); or per
        token, padded (B, T), or packed (N,) with cu_seqlens.
""",
}
_POLICY["policy"] = _POLICY["unpaired"]
_SCORES = """\
    reward_chosen, reward_rejected: the model's scores of the completions (B,), fp32, bf16, fp16 or fp64.
"""

_REDUCTION = """\
    reduction: "mean", "sum" or "none".
    num_items: denominator of the mean instead of B (a number or 0-dimensional tensor): the number of rows in
        the whole batch, so that micro-batches and ranks add up to one gradient.
"""

_GROUP = """\
    process_group: ranks whose pairs are one batch, True for the default group; each may have another number of pairs.
        Each rank's loss is that of its own pairs: the sum of all ranks' losses over one num_items is the loss of the
        batch, and its gradient theirs.
"""

_OPTIONS = {
    "length_norm": """\
    length_norm: use per-token averages instead of sums; a sequence without tokens counts as one token long.
""",
    "convention": """\
    convention: None for the paper's definition, "trl" for TRL's.
""",
}

_LENGTHS = """\
    {names}: int (B,), numbers of tokens; only with {when}summed input.
"""

_RETURNS = {
    "pairwise": """\
    PairwiseOutput(loss, chosen_rewards, rejected_rewards), fp32 (fp64 for fp64 input). A sequence without
    tokens has log-prob 0. The sum over an empty batch is 0.
""",
    "unpaired": """\
    UnpairedOutput(loss, rewards), fp32 (fp64 for fp64 input). A sequence without tokens has log-prob 0. The sum over
    an empty batch is 0.
""",
    "policy": """\
    PolicyOutput(loss, penalties), fp32 (fp64 for fp64 input). A sequence without tokens has log-prob 0. The sum over
    an empty batch is 0.
""",
}

_RAISES = """\
    TypeError: a wrong type or dtype.
    ValueError: shapes or devices do not match, a hyper-parameter or an input is outside its domain,
        or the mean of an empty batch is asked for without num_items. The message names the argument.
"""


def _named(row: Objective, what: str) -> list[str]:
    """The arguments of a layout, one per side."""
    return [f"{side}_{what}" if side else what for side in row.sides]


def _models(row: Objective) -> list[str]:
    return [f"{model}_{side}" if side else model for model in row.models for side in row.sides]


def _outputs(row: Objective) -> str:
    return _OUTPUTS[row.kind].__name__


def signature(row: Objective) -> str:
    """The parameters of a row's public function, annotated, as source text."""
    tensors = [f"{name}: Tensor" for name in (*_models(row), *(i.name for i in row.inputs))]
    types = {name: "float | Tensor" if name in row.per_row else "float" for name in row.defaults}
    keywords = [f"{name}: {types[name]} = {_literal(default)}" for name, default in row.defaults.items()]
    for name, values in row.options.items():
        keywords.append(f"{name}: Literal[{', '.join(map(_quoted, values))}] = {_quoted(values[0])}")
    for layout in ("mask", "cu_seqlens", *["lengths"] * (row.lengths != "none")):
        keywords += [f"{name}: Tensor | None = None" for name in _named(row, layout)]
    keywords += ["length_norm: bool = False"] * row.length_norm
    keywords.append('reduction: Literal["mean", "sum", "none"] = "mean"')
    keywords.append("num_items: float | Tensor | None = None")
    keywords += ["process_group: ProcessGroup | bool | None = None"] * row.coupled
    return ", ".join([*tensors, "*", *keywords])


def _literal(value: float) -> str:
    return 'float("inf")' if value == float("inf") else repr(value)


def _quoted(value: str | None) -> str:
    return "None" if value is None else f'"{value}"'


def _input(given: Input) -> str:
    kind = "bool" if given.boolean else "a number"
    shape = "per token" if given.side is not None else "per row, (B,)" + ", or one for all, ()" * given.shared
    domain = "" if given.boolean or given.side is not None else f" in {given.domain}"
    constant = "differentiable" if given.gradient else "constant"
    return f"    {given.name}: {given.about}; {kind}{domain} {shape}; {constant}.\n"


def _docstring(row: Objective) -> str:
    first, _, rest = row.doc.partition("\n")
    arguments = _SCORES if row.scores == "reward" else _POLICY[row.kind]
    for model, phrase in (("reference", "the reference model"), ("previous", "the previous iterate")):
        if model in row.models:
            names = ", ".join(f"{model}_{side}" if side else model for side in row.sides)
            arguments += f"    {names}: the same under {phrase}; constants.\n"
    arguments += "".join(_input(given) for given in row.inputs)
    for name, domain in row.domains.items():
        arguments += f"    {name}: in {domain}." + " One number, or (B,)." * (name in row.per_row) + "\n"
    for name, values in row.options.items():
        arguments += _OPTIONS.get(name) or f"    {name}: one of {', '.join(map(_quoted, values))}; see above.\n"
    arguments += _LAYOUT.format(masks=", ".join(_named(row, "mask")), boundaries=", ".join(_named(row, "cu_seqlens")))
    if row.length_norm:
        arguments += _OPTIONS["length_norm"]
    if row.lengths != "none":
        when = "length_norm=True and " if row.length_norm else ""
        arguments += _LENGTHS.format(names=", ".join(_named(row, "lengths")), when=when)
    names = "; ".join(f"{library}: {name}" for library, name in row.aliases.items())
    source = f"Source: {row.title}, {row.paper}, {row.equation}." + (f" Elsewhere: {names}." if names else "")
    parts = [first, rest.strip(), source, f"Args:\n{arguments}{_REDUCTION}{_GROUP * row.coupled}"]
    parts += [f"Returns:\n{_RETURNS[row.kind]}", f"Raises:\n{_RAISES}"]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


# names that the function needs are closure cells: torch.compile looks globals up in the module of that name
_TEMPLATE = """\
from __future__ import annotations
def build(_evaluate, _row, _Side, _Output):
    def {name}({signature}) -> {output}:
        return _Output(*_evaluate(
            _row, ({sides},), {{{hyper}}}, {{{inputs}}}, options={{{options}}}, length_norm={length_norm},
            reduction=reduction, num_items=num_items{process_group}
        ))
    return {name}
"""


def build(row: Objective) -> Callable[..., Any]:
    """The public function of a row, compiled from a template so that Python itself binds arguments."""

    def side(name: str) -> str:
        models = {model: f"{model}_{name}" if name else model for model in row.models}
        layout = {what: f"{name}_{what}" if name else what for what in ("mask", "cu_seqlens", "lengths")}
        lengths = None if row.lengths == "none" else layout["lengths"]
        streams = models[row.scores], models.get("reference"), layout["mask"], layout["cu_seqlens"], lengths
        return f"_Side({', '.join(map(str, streams))}, {models.get('previous')})"

    def mapping(names: Iterable[str]) -> str:
        return ", ".join(f"{name!r}: {name}" for name in names)

    source = _TEMPLATE.format(
        name=row.name,
        signature=signature(row),
        output=_outputs(row),
        sides=", ".join(map(side, row.sides)),
        hyper=mapping(row.defaults),
        inputs=mapping(i.name for i in row.inputs),
        options=mapping(row.options),
        length_norm="length_norm" if row.length_norm else False,
        process_group=", process_group=process_group" if row.coupled else "",
    )
    scope: dict[str, Any] = {"__name__": "fastpo.losses"}
    exec(source, scope)
    loss = scope["build"](evaluate, row, Side, _OUTPUTS[row.kind])
    loss.__qualname__ = row.name
    loss.__doc__ = _docstring(row)
    return loss


# one function per row of the registry, wherever it is called from
built = functools.cache(build)


_STUB_HEADER = """\
# Written by `python -m fastpo.losses`: the signatures that fastpo/losses/_build.py makes from the registry.
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from fastpo.kernels.listwise import ListwiseOutput as ListwiseOutput
from fastpo.kernels.objective import PairwiseOutput as PairwiseOutput
from fastpo.kernels.objective import PolicyOutput as PolicyOutput
from fastpo.kernels.objective import UnpairedOutput as UnpairedOutput
from fastpo.kernels.policy import PolicyGradientOutput as PolicyGradientOutput
from fastpo.kernels.policy import PolicyMetrics as PolicyMetrics
from fastpo.kernels.policy import kl_reward as kl_reward
from fastpo.losses.composed import diffusion_dpo as diffusion_dpo
from fastpo.losses.composed import hypo as hypo
from fastpo.losses.composed import mixture as mixture
from fastpo.losses.contrastive import rank_gen as rank_gen
from fastpo.losses.demonstrations import DemonstrationOutput as DemonstrationOutput
from fastpo.losses.demonstrations import implicit_reward_sft as implicit_reward_sft
from fastpo.losses.demonstrations import implicit_values as implicit_values
from fastpo.losses.diffusion import ElboNodes as ElboNodes
from fastpo.losses.diffusion import Noised as Noised
from fastpo.losses.diffusion import diffu_grpo as diffu_grpo
from fastpo.losses.diffusion import diffu_grpo_tokens as diffu_grpo_tokens
from fastpo.losses.diffusion import diffusion_gdpo as diffusion_gdpo
from fastpo.losses.diffusion import elbo as elbo
from fastpo.losses.diffusion import elbo_nodes as elbo_nodes
from fastpo.losses.diffusion import noise_tokens as noise_tokens
from fastpo.losses.filters import clip_cov_tokens as clip_cov_tokens
from fastpo.losses.filters import entropy_mask as entropy_mask
from fastpo.losses.filters import kl_cov_tokens as kl_cov_tokens
from fastpo.losses.filters import mean_rollout_weight as mean_rollout_weight
from fastpo.losses.filters import mixed_groups as mixed_groups
from fastpo.losses.filters import overlong_mask as overlong_mask
from fastpo.losses.filters import rejection_mask as rejection_mask
from fastpo.losses.filters import tppo_masks as tppo_masks
from fastpo.losses.flows import FlowOutput as FlowOutput
from fastpo.losses.flows import detailed_balance as detailed_balance
from fastpo.losses.flows import fl_detailed_balance as fl_detailed_balance
from fastpo.losses.flows import fl_subtrajectory_balance as fl_subtrajectory_balance
from fastpo.losses.flows import subtrajectory_balance as subtrajectory_balance
from fastpo.losses.flows import trajectory_balance as trajectory_balance
from fastpo.losses.likelihood import AwrOutput as AwrOutput
from fastpo.losses.likelihood import LikelihoodOutput as LikelihoodOutput
from fastpo.losses.likelihood import RegretOutput as RegretOutput
from fastpo.losses.likelihood import awr as awr
from fastpo.losses.likelihood import chain_of_hindsight as chain_of_hindsight
from fastpo.losses.likelihood import regret_loss as regret_loss
from fastpo.losses.likelihood import rwr as rwr
from fastpo.losses.likelihood import sequence_unlikelihood as sequence_unlikelihood
from fastpo.losses.likelihood import sft as sft
from fastpo.losses.likelihood import token_unlikelihood as token_unlikelihood
from fastpo.losses.likelihood import unlikelihood as unlikelihood
from fastpo.losses.matching import MatchingMetrics as MatchingMetrics
from fastpo.losses.matching import MatchingOutput as MatchingOutput
from fastpo.losses.matching import PartitionEstimate as PartitionEstimate
from fastpo.losses.matching import RewardBaseline as RewardBaseline
from fastpo.losses.matching import dpg as dpg
from fastpo.losses.matching import f_dpg as f_dpg
from fastpo.losses.matching import gdc as gdc
from fastpo.losses.matching import gdc_plus_plus as gdc_plus_plus
from fastpo.losses.ranking import RankingMetrics as RankingMetrics
from fastpo.losses.ranking import ranking_metrics as ranking_metrics
from fastpo.losses.statistics import BetaDPOStatistics as BetaDPOStatistics
from fastpo.losses.statistics import Moments as Moments
from fastpo.losses.statistics import alpha_dpo_statistics as alpha_dpo_statistics
from fastpo.losses.statistics import bco_delta as bco_delta
from fastpo.losses.statistics import beta_dpo_statistics as beta_dpo_statistics
from fastpo.losses.statistics import kto_kl as kto_kl
from fastpo.losses.statistics import sampo_sample as sampo_sample
from fastpo.losses.weights import adverse_turns as adverse_turns
from fastpo.losses.weights import conditional_tokens as conditional_tokens
from fastpo.losses.weights import document_filter as document_filter
from fastpo.losses.weights import forgetful_mask as forgetful_mask
from fastpo.losses.weights import previous_tokens as previous_tokens
from fastpo.losses.weights import repeated_ngrams as repeated_ngrams
from fastpo.losses.weights import tl_key_tokens as tl_key_tokens
from fastpo.losses.weights import tl_token_weights as tl_token_weights
from fastpo.reference.policy import RolloutCorrection as RolloutCorrection

"""


def stub() -> str:
    """The type stub of `fastpo.losses`, for editors and type checkers."""
    lines = [f"def {row.name}({signature(row)}) -> {_outputs(row)}: ..." for row in objectives()]
    return _STUB_HEADER + "\n".join(lines) + "\n"
