"""Public objectives on lists, built from the rows of `fastpo.reference.listwise`, as `_policy` builds its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpo.kernels.listwise import ListwiseOutput, evaluate
from fastpo.losses._build import _literal, _quoted
from fastpo.reference.listwise import DISCOUNTS, ListObjective, list_objectives

_FIRST = """\
    {name}: {about};
        fp32, bf16, fp16 or fp64: padded (B, K), or packed (N,) with cu_seqlens. A list has at most 1,024 items.
"""
_OPTIONS = {
    "loss": """\
    loss: {values}; see above.
""",
    "average_pairs": """\
    average_pairs: the mean over the pairs of a list instead of their sum, which grows with K².
""",
    "discount": """\
    discount: the logarithm in Δ; "log2" is the usual one of DCG, and multiplies all by log 2.
""",
}
_LAYOUT = """\
    mask: bool, of the shape of {name}, True where an item counts. What stands elsewhere has no influence, NaN included.
    cu_seqlens: int32 (B + 1,), boundaries of the packed lists.
    reduction: "mean" over the lists, "sum" or "none".
    num_items: denominator of the mean instead of B (a number or 0-dimensional tensor): the number of lists in the
        whole batch, so that micro-batches and ranks add up to one gradient.
"""
_RETURNS = """\
    ListwiseOutput(loss, rewards), fp32 (fp64 for fp64 input). A list without items has loss 0. An infinite or NaN score
        or target of an item that counts makes loss and gradient of its list NaN.
"""
_RAISES = """\
    TypeError: a wrong type or dtype.
    ValueError: shapes or devices do not match, a number is outside its domain, a list is longer than 1,024, or the mean
        of an empty batch is asked for without num_items. The message names the argument.
"""


def options(row: ListObjective) -> dict[str, Any]:
    """The options of a row that are no numbers, with their defaults."""
    found: dict[str, Any] = {}
    if len(row.kinds) > 1:
        found["loss"] = next(iter(row.kinds))
    if row.average_pairs is not None:
        found["average_pairs"] = row.average_pairs
    if row.discounts:
        found["discount"] = next(iter(DISCOUNTS))
    return found


def signature(row: ListObjective) -> str:
    """The parameters of a row's public function, annotated, as source text."""
    parts = [f"{name}: Tensor{' | None' * (name in row.optional)}" for name in row.tensors]
    parts.append("*")
    parts += [f"{n}: float" + ("" if d is None else f" = {_literal(d)}") for n, d in row.defaults.items()]
    known = {"loss": row.kinds, "discount": DISCOUNTS}
    for name, default in options(row).items():
        if isinstance(default, bool):
            parts.append(f"{name}: bool = {default}")
        else:
            parts.append(f"{name}: Literal[{', '.join(map(_quoted, known[name]))}] = {_quoted(default)}")
    parts += ["mask: Tensor | None = None", "cu_seqlens: Tensor | None = None"]
    parts.append('reduction: Literal["mean", "sum", "none"] = "mean"')
    parts.append("num_items: float | Tensor | None = None")
    return ", ".join(parts)


def _docstring(row: ListObjective) -> str:
    first, _, rest = row.about.partition("\n")
    (name, about), *others = row.tensors.items()
    arguments = _FIRST.format(name=name, about=about)
    arguments += "".join(f"    {other}: {text}.\n" for other, text in others)
    arguments += "".join(f"    {hyper}: in {domain}.\n" for hyper, domain in row.domains.items())
    values = ", ".join(map(_quoted, row.kinds))
    arguments += "".join(_OPTIONS[option].format(values=values) for option in options(row))
    names = "; ".join(f"{library}: {alias}" for library, alias in row.aliases.items())
    source = f"Source: {row.title}, {row.paper}, {row.equation}." + (f" Elsewhere: {names}." if names else "")
    parts = [first, rest.strip(), source, f"Args:\n{arguments}{_LAYOUT.format(name=name)}"]
    parts += [f"Returns:\n{_RETURNS}", f"Raises:\n{_RAISES}"]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


# names that the function needs are closure cells: torch.compile looks globals up in the module of that name
_TEMPLATE = """\
from __future__ import annotations
def build(_evaluate, _row):
    def {name}({signature}) -> ListwiseOutput:
        return _evaluate(_row, ({tensors},), mask, cu_seqlens, reduction, num_items, ({hyper}), ({options}))
    return {name}
"""


def build(row: ListObjective) -> Callable[..., ListwiseOutput]:
    """The public function of a row, compiled from a template so that Python itself binds arguments."""
    source = _TEMPLATE.format(
        name=row.name,
        signature=signature(row),
        tensors=", ".join(row.tensors),
        hyper="".join(f"{name}, " for name in row.defaults),
        options="".join(f"{name}, " for name in options(row)),
    )
    scope: dict[str, Any] = {"__name__": "fastpo.losses"}
    exec(source, scope)
    loss = scope["build"](evaluate, row)
    loss.__qualname__ = row.name
    loss.__doc__ = _docstring(row)
    return loss


def stub() -> str:
    """The lines of the type stub."""
    lines = [f"def {row.name}({signature(row)}) -> {ListwiseOutput.__name__}: ..." for row in list_objectives()]
    return "\n".join(lines) + "\n"
