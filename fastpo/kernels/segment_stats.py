"""`segment_stats`: statistics of ragged segments of numbers, and the members normalised by them, in three passes.

A segment is a row, a sequence between boundaries, or the members of a group wherever they stand: `group_members` puts
those in an order, by counting. Sums are in double, and the mean is corrected by its own deviations, so that a constant
segment, and nothing else, has members of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastpo.kernels import _checks, _native
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import segment_stats as _launch
from fastpo.reference import segments as reference
from fastpo.reference.segments import MODES, Mode, SegmentStats

Singleton = Literal["zero", "raw"]
SINGLETONS: tuple[Singleton, ...] = ("zero", "raw")
# what is asked of the op, as bits
_STATISTICS, _NORMALIZED, _INFORMATIVE = 1, 2, 4

# what is not `wanted` comes back empty; statistics are fp64
torch.library.define(
    "fastpo::segment_stats",
    "(Tensor values, Tensor? weights, Tensor? mask, Tensor? order, Tensor? boundaries, int mode, int ddof, float eps, "
    "bool skip_nan, bool raw_singletons, int wanted) -> (Tensor statistics, Tensor normalized, Tensor informative)",
)
# with groups = -1 there are as many segments as members, empty ones last, so that no shape depends on the ids
torch.library.define("fastpo::group_members", "(Tensor ids, int groups) -> (Tensor order, Tensor boundaries)")


@torch.library.register_fake("fastpo::segment_stats")
def _fake(
    values: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    boundaries: Tensor | None,
    mode: int,
    ddof: int,
    eps: float,
    skip_nan: bool,
    raw_singletons: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = values.shape[0] if boundaries is None else boundaries.shape[0] - 1
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (
        values.new_empty((6, segments) if wanted & _STATISTICS else (0,), dtype=torch.float64),
        values.new_empty(values.shape if wanted & _NORMALIZED else (0,), dtype=dtype),
        values.new_empty(values.shape if wanted & _INFORMATIVE else (0,), dtype=torch.bool),
    )


@torch.library.register_fake("fastpo::group_members")
def _fake_members(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    segments = ids.shape[0] if groups < 0 else groups
    return ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty((segments + 1,), dtype=torch.int64)


@torch.library.impl("fastpo::group_members", "cuda")
def _members_on_device(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sorting is torch's on a device: counting would need atomics or a scan of its own."""
    return reference.group_members(ids, groups)


def launched_by(launcher: nvrtc.Launcher) -> dict[str, Callable[..., Any]]:
    """Implementations of the op that launch the kernel of csrc/cuda from Python."""
    return {"segment_stats": lambda *arguments: _launch.forward(launcher, *arguments)}


_LIBRARY = nvrtc.serve("segment_stats", launched_by)


def _check(
    values: object, group_ids: Tensor | None, num_groups: int | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    tensor = _checks.tensor("values", values, _checks.FLOATS).detach()
    if group_ids is not None:
        _checks.tensor("group_ids", group_ids, _checks.INTEGERS)
        _checks.same_device("group_ids", group_ids, "values", tensor)
        if cu_seqlens is not None:
            raise ValueError("group_ids and cu_seqlens both say what a segment is: give one of them")
        if tensor.dim() != 1:
            raise ValueError(f"values has shape {tuple(tensor.shape)}, expected (N,) with group_ids")
        _checks.shape("group_ids", group_ids, tensor.shape, "one id per value")
    elif cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "values", tensor)
        if tensor.dim() != 1:
            raise ValueError(f"values has shape {tuple(tensor.shape)}, expected (N,) with cu_seqlens")
    elif tensor.dim() != 2:
        raise ValueError(
            f"values has shape {tuple(tensor.shape)}, expected (S, N), or (N,) with group_ids or cu_seqlens"
        )
    if num_groups is not None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise TypeError(f"num_groups must be an int, got {type(num_groups).__name__}")
        if group_ids is None or num_groups < 0:
            raise ValueError("num_groups is the number of ids that group_ids may have, and at least 0")
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.same_device("mask", mask, "values", tensor)
        _checks.shape("mask", mask, tensor.shape, "it must match values")
    return tensor


def _ddof(ddof: object) -> None:
    if isinstance(ddof, bool) or not isinstance(ddof, int):
        raise TypeError(f"ddof must be an int, got {type(ddof).__name__}")
    if ddof < 0:
        raise ValueError(f"ddof must be at least 0, got {ddof}")


def _evaluate(
    values: Tensor,
    group_ids: Tensor | None,
    num_groups: int | None,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    mode: Mode,
    ddof: int,
    eps: float,
    skip_nan: bool,
    raw_singletons: bool,
    wanted: int,
) -> tuple[SegmentStats | None, Tensor, Tensor]:
    native = _native.serves("segment_stats", values.device, values.dtype)
    if not native or values.device.type != "cpu":
        _checks.rising("cu_seqlens", cu_seqlens, values.shape[0])
    order, boundaries = None, None if cu_seqlens is None else cu_seqlens.long()
    if group_ids is not None:
        groups = -1 if num_groups is None else num_groups
        if (not native or values.device.type != "cpu") and num_groups is not None and _checks.readable(group_ids):
            bad = ((group_ids < 0) | (group_ids >= num_groups)).nonzero()
            if len(bad):
                at = int(bad[0])
                raise IndexError(f"group_ids[{at}] is {group_ids[at].item()}, out of range for num_groups={num_groups}")
        members = torch.ops.fastpo.group_members if native else reference.group_members
        order, boundaries = _native.call(members, group_ids, groups)
    arguments = (values, weights, mask, order, boundaries)
    rest = (ddof, eps, skip_nan, raw_singletons)
    if not native:
        return reference.segment_stats(*arguments, mode, *rest)
    rows, normalized, informative = _native.call(
        torch.ops.fastpo.segment_stats, *arguments, MODES.index(mode), *rest, wanted
    )
    return SegmentStats(*rows.unbind(0)) if wanted & _STATISTICS else None, normalized, informative


def statistics(
    values: Tensor,
    group_ids: Tensor | None = None,
    *,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    skip_nan: bool = False,
) -> SegmentStats:
    """`segment_stats` in fp64."""
    tensor = _check(values, group_ids, num_groups, mask, cu_seqlens)
    if not _native.serves("segment_stats", tensor.device, tensor.dtype):
        tensor = tensor.double()
    if group_ids is not None and num_groups is None:
        raise ValueError("num_groups must be given with group_ids: it is the length of the results")
    _ddof(ddof)
    arguments = (tensor, group_ids, num_groups, cu_seqlens, None, mask, "center", ddof, 0.0, bool(skip_nan), False)
    stats, _, _ = _evaluate(*arguments, _STATISTICS)  # type: ignore[arg-type]
    assert stats is not None
    return stats


def segment_stats(
    values: Tensor,
    group_ids: Tensor | None = None,
    *,
    num_groups: int | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    skip_nan: bool = False,
) -> SegmentStats:
    """Count, sum, mean, variance, minimum and maximum of each segment. No gradient flows through them.

    Args:
        values: (S, N), whose segments are the rows; (N,) packed with `cu_seqlens`; or (N,) with `group_ids`.
        group_ids: int64 or int32 (N,) in [0, num_groups), the group of each value; members need not be adjacent.
        num_groups: how many groups there are; with `group_ids` it must be given.
        mask: bool, of the shape of values, True where a value counts; what the others hold has no influence.
        cu_seqlens: int32 (S + 1,), the boundaries of packed segments.
        ddof: the variance is over count - ddof: 1 for the unbiased one, 0 for that of the values themselves.
        skip_nan: a NaN does not count. Otherwise it makes its segment's statistics NaN.

    Returns:
        `SegmentStats`, (S,) each, fp32 (fp64 for fp64 values), from sums in double. A constant segment has exactly its
        value as mean and the variance 0; one with no more members than ddof has the variance 0; an empty one has count,
        sum, mean and variance 0, minimum inf and maximum -inf.

    Raises:
        TypeError: an argument is no tensor of the dtypes above.
        ValueError: shapes or devices differ, `num_groups` is missing, `ddof` is negative, or `cu_seqlens` does not
            rise from 0 to at most N.
        IndexError: a group id is out of range.

    Source: T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance (1983), eq. 1.7.
    """
    stats = statistics(
        values,
        group_ids,
        num_groups=num_groups,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ddof=ddof,
        skip_nan=skip_nan,
    )
    return SegmentStats(*(t.to(torch.promote_types(values.dtype, torch.float32)) for t in stats))


def normalized(
    values: Tensor,
    group_ids: Tensor | None = None,
    *,
    mode: Mode,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    eps: float = 0.0,
    singleton: Singleton = "zero",
    informative: bool = False,
) -> tuple[Tensor, Tensor]:
    """`group_normalize`, and, if asked for, which members count in a segment that is not constant."""
    tensor = _check(values, group_ids, None, mask, cu_seqlens)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if singleton not in SINGLETONS:
        raise ValueError(f"singleton must be one of {', '.join(SINGLETONS)}; got {singleton!r}")
    _ddof(ddof)
    if not 0 <= _checks.number("eps", eps) < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if weights is not None:
        weights = _checks.tensor("weights", weights, _checks.FLOATS + _checks.INTEGERS).detach()
        _checks.same_device("weights", weights, "values", tensor)
        _checks.shape("weights", weights, tensor.shape, "one weight per value")
        if not weights.dtype.is_floating_point:
            weights = weights.double()
        if _checks.readable(weights) and not (weights >= 0).all():
            raise ValueError("weights must be at least 0")
    wanted = _NORMALIZED | (_INFORMATIVE if informative else 0)
    _, out, varied = _evaluate(
        tensor,
        group_ids,
        None,
        cu_seqlens,
        weights,
        mask,
        mode,
        ddof,
        float(eps),
        True,
        singleton == "raw",
        wanted,
    )
    return out, varied


def group_normalize(
    values: Tensor,
    group_ids: Tensor | None = None,
    *,
    mode: Mode = "standardize",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ddof: int = 1,
    eps: float = 0.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """Each value relative to its group: less the mean, standardised, less the mean of the others, or its lead.

    A group of equal values gives exactly 0 whatever the dtype and eps: there the mean of fp32 numbers is off by an ulp,
    so that libraries that divide by std + eps give every member the same advantage of up to 1. A NaN is a value that
    could not be had: it does not count, and gives 0. No gradient flows through the result.

    Args:
        values: (groups, members); (N,) with `group_ids`; or (N,) packed with `cu_seqlens`.
        group_ids: int64 or int32 (N,), any integers, equal for the members of a group, which need not be adjacent.
        mode: "center", x - mean; "standardize", that over (std + eps); "leave_one_out", x - mean of the others;
            "lead", max - second for the only best and 0 for the others; "standardized_lead", that over (std + eps).
        weights: floats or integers of the shape of values, at least 0: the mean that is taken off is weighted by them.
            A group without any weight gives 0.
        mask: bool, of the shape of values, True where a value counts; what the others hold has no influence.
        cu_seqlens: int32 (S + 1,), the boundaries of packed groups.
        ddof: the variance is over count - ddof. A group with no more members than that gives 0 where it is used.
        eps: added to the standard deviation, at least 0.
        singleton: what the only member of a group becomes: "zero", or "raw", itself (over 1 + eps where standardised).

    Returns:
        of the shape of values, fp32 (fp64 for fp64 values); 0 for what does not count.

    Raises:
        TypeError: an argument is no tensor or number of the types above.
        ValueError: shapes or devices differ, or an option is outside its domain.

    Source: DeepSeekMath (2402.03300) eq. 3 and its kin; `fastpo.advantages` has them by name.
    """
    out, _ = normalized(
        values,
        group_ids,
        mode=mode,
        weights=weights,
        mask=mask,
        cu_seqlens=cu_seqlens,
        ddof=ddof,
        eps=eps,
        singleton=singleton,
    )
    return out
