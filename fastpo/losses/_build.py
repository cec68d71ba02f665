"""Public loss functions, built from registry rows: signature, defaults and docstring come from the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.objective import PairwiseOutput, pairwise
from fastpo.reference.pairwise import Side
from fastpo.reference.registry import Objective, objectives

_PAIRWISE_ARGUMENTS = """\
    policy_chosen, policy_rejected: log-probs of the completions under the policy, fp32, bf16, fp16 or fp64:
        summed per sequence (B,); or per token, padded (B, T), or packed (N,) with cu_seqlens. Chosen and
        rejected may differ in T and N.
{reference}    chosen_mask, rejected_mask: bool, of the shape of the token log-probs, True where a token counts. What
        stands elsewhere has no influence, NaN included.
    chosen_cu_seqlens, rejected_cu_seqlens: int32 (B + 1,), boundaries of the packed sequences.
{length}    reduction: "mean", "sum" or "none".
    num_items: denominator of the mean instead of B (a number or 0-dimensional tensor): the number of pairs in
        the whole batch, so that micro-batches and ranks add up to one gradient.
{hyper}"""

_REFERENCE_ARGUMENT = """\
    reference_chosen, reference_rejected: the same under the reference model; constants.
"""

_LENGTH_ARGUMENT = """\
    length_norm: use per-token averages instead of sums; a sequence without tokens counts as one token long.
    chosen_lengths, rejected_lengths: int (B,), numbers of tokens; only with length_norm=True and summed input.
"""

_PAIRWISE_RETURNS = """\
    PairwiseOutput(loss, chosen_rewards, rejected_rewards), fp32 (fp64 for fp64 input). A sequence without
    tokens has log-prob 0. The sum over an empty batch is 0.
"""

_PAIRWISE_RAISES = """\
    TypeError: a wrong type or dtype.
    ValueError: shapes or devices do not match, a hyper-parameter is outside its domain, or the mean of an
        empty batch is asked for without num_items. The message names the argument.
"""


def signature(row: Objective) -> str:
    """The parameters of a row's public function, annotated, as source text."""
    policies = [f"{model}_{side}: Tensor" for model in row.models for side in ("chosen", "rejected")]
    layouts = ["mask", "cu_seqlens"] + ["lengths"] * row.length_norm
    keywords = [f"{name}: float = {default}" for name, default in row.defaults.items()]
    keywords += [f"{side}_{layout}: Tensor | None = None" for layout in layouts for side in ("chosen", "rejected")]
    keywords += ["length_norm: bool = False"] * row.length_norm
    keywords.append('reduction: Literal["mean", "sum", "none"] = "mean"')
    keywords.append("num_items: float | Tensor | None = None")
    return ", ".join([*policies, "*", *keywords])


def _docstring(row: Objective) -> str:
    first, _, rest = row.doc.partition("\n")
    hyper = "\n".join(f"    {name}: in {row.domains[name]}." for name in row.defaults)
    arguments = _PAIRWISE_ARGUMENTS.format(
        reference=_REFERENCE_ARGUMENT if row.reference_model else "",
        length=_LENGTH_ARGUMENT if row.length_norm else "",
        hyper=hyper,
    )
    names = "; ".join(f"{library}: {name}" for library, name in row.aliases.items())
    source = f"Source: {row.title}, {row.paper}, {row.equation}." + (f" Elsewhere: {names}." if names else "")
    parts = [first, rest.strip(), source, f"Args:\n{arguments}"]
    parts += [f"Returns:\n{_PAIRWISE_RETURNS}", f"Raises:\n{_PAIRWISE_RAISES}"]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


# names that the function needs are closure cells: torch.compile looks globals up in the module of that name
_TEMPLATE = """\
from __future__ import annotations
def build(_pairwise, _row, _Side):
    def {name}({signature}) -> PairwiseOutput:
        return _pairwise(
            _row, {chosen}, {rejected}, {{{hyper}}}, length_norm={length_norm}, reduction=reduction, num_items=num_items
        )
    return {name}
"""


def build_pairwise(row: Objective) -> Callable[..., PairwiseOutput]:
    """The public function of one pairwise row, compiled from a template so that Python itself binds arguments."""

    def side(name: str) -> str:
        reference = f"reference_{name}" if row.reference_model else None
        lengths = f"{name}_lengths" if row.length_norm else None
        return f"_Side(policy_{name}, {reference}, {name}_mask, {name}_cu_seqlens, {lengths})"

    source = _TEMPLATE.format(
        name=row.name,
        signature=signature(row),
        chosen=side("chosen"),
        rejected=side("rejected"),
        hyper=", ".join(f"{name!r}: {name}" for name in row.defaults),
        length_norm="length_norm" if row.length_norm else False,
    )
    scope: dict[str, Any] = {"__name__": "fastpo.losses"}
    exec(source, scope)
    loss = scope["build"](pairwise, row, Side)
    loss.__qualname__ = row.name
    loss.__doc__ = _docstring(row)
    return loss


_STUB_HEADER = """\
# Written by `python -m fastpo.losses`: the signatures that fastpo/losses/_build.py makes from the registry.
from typing import Literal

from torch import Tensor

from fastpo.kernels.objective import PairwiseOutput as PairwiseOutput

"""


def stub() -> str:
    """The type stub of `fastpo.losses`, for editors and type checkers."""
    lines = [f"def {row.name}({signature(row)}) -> PairwiseOutput: ..." for row in objectives("pairwise")]
    return _STUB_HEADER + "\n".join(lines) + "\n"
