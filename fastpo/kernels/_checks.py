"""Argument checks shared by the public functions. Each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
COMPLEX = (torch.complex64, torch.complex128)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A strided tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {value.layout}")
    return value


def complex_array(name: str, value: object, *, real: bool = False) -> Tensor:
    """A complex tensor (..., K), or an array of another library as one that shares its memory; real ones if told so."""
    if not isinstance(value, Tensor):
        if hasattr(value, "__dlpack__"):
            value = torch.from_dlpack(value)
        elif hasattr(value, "__cuda_array_interface__"):
            value = torch.as_tensor(value, device="cuda")
    found = tensor(name, value, (*COMPLEX, torch.float32, torch.float64) if real else COMPLEX)
    if found.dim() == 0:
        raise ValueError(f"{name} has no dimension, expected one at least")
    # what is conjugated, or negated as an imaginary part, is so in memory
    return found.resolve_conj().resolve_neg()


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of complex numbers, which a compiler does not see through `dtype.to_real()`."""
    return torch.float64 if dtype in (torch.complex128, torch.float64) else torch.float32


def broadcast(**tensors: Tensor) -> None:
    """Leading dimensions, all but the last, that broadcast."""
    try:
        torch.broadcast_shapes(*(t.shape[:-1] for t in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"the leading dimensions of {shapes} do not broadcast") from None


def no_growth(name: str, value: Tensor, meaning: str) -> None:
    """Warn of real parts that are positive by more than rounding, where values may be looked at."""
    if not readable(value) or value.numel() == 0:
        return
    real = value.detach().real
    if real.max() > 0 and (real > torch.finfo(value.dtype).eps * value.detach().abs()).any():
        # of who called the public function, which a filter's "once per location" then means
        warnings.warn(f"{name} has a positive real part: {meaning}", RuntimeWarning, stacklevel=3)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} on {other.device}: they must be on one device")


def shape(name: str, value: Tensor, expected: tuple[int, ...] | torch.Size, because: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}: {because}")


def targets(value: Tensor, rows: torch.Size, of: str) -> None:
    """Ids of shape (...) or (..., K) for rows of shape (...)."""
    if value.shape != rows and (value.dim() != len(rows) + 1 or value.shape[:-1] != rows):
        raise ValueError(f"targets has shape {tuple(value.shape)}, expected {tuple(rows)} or {(*rows, 'K')} for {of}")


def temperature(
    value: object, rows: torch.Size, other_name: str, other: Tensor, *, differentiable: bool = False
) -> None:
    """A positive number, or a tensor of one per row."""
    if isinstance(value, Tensor):
        tensor("temperature", value, FLOATS)
        same_device("temperature", value, other_name, other)
        shape("temperature", value, rows, "one temperature per token")
        if value.requires_grad and not differentiable:
            raise ValueError("temperature requires grad, but no gradient flows to it: pass temperature.detach()")
    elif not 0 < number("temperature", value) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value}")


def logit_scale(value: object) -> None:
    if not 0 < number("logit_scale", value) < math.inf:
        raise ValueError(f"logit_scale must be positive and finite, got {value}")


def softcap(value: object) -> None:
    if value is not None and not 0 < number("softcap", value) < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {value}")


def memory_budget(value: object) -> None:
    """A number of bytes, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_budget must be a number of bytes, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"memory_budget must not be negative, got {value}")


def is_dtensor(value: object) -> bool:
    # without an import of torch.distributed
    return isinstance(value, Tensor) and hasattr(value, "placements")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "", sharded: bool = False) -> None:
    """Hidden states (..., H) and a head (V, H), (V,) of their dtype; of a sharded one these are local."""
    names = [prefix + name for name in ("hidden", "weight", "bias")]
    tensor(names[0], hidden, FLOATS)
    if hidden.dim() == 0:
        raise ValueError(f"{names[0]} must have shape (..., H), got a 0-dimensional tensor")
    size = hidden.shape[-1]
    beside(names[1], weight, names[0], hidden)
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ValueError(
            f"{names[1]} has shape {tuple(weight.shape)}, expected (V, {size}) for {names[0]} of shape "
            f"{tuple(hidden.shape)}; an empty or flat weight is a shard of FSDP or ZeRO that has to be gathered first: "
            "compute the log-probs inside the forward of the module that was wrapped, or under "
            "deepspeed.zero.GatheredParameters"
        )
    if weight.shape[0] == 0 and not sharded:
        raise ValueError(f"{names[1]} has shape {tuple(weight.shape)}: the vocabulary (first dimension) is empty")
    if bias is not None:
        beside(names[2], bias, names[0], hidden)
        shape(names[2], bias, weight.shape[:1], f"one number per row of {names[1]}")


def beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor of the device and dtype of another."""
    tensor(name, value, FLOATS)
    same_device(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, {other_name} {other.dtype}: they must be of one dtype")


def ignore_index(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")


def statistics(asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [s for s in asked if s not in known]
    if unknown:
        raise ValueError(f"stats may hold {', '.join(known)}; got {unknown[0]!r}")


def allowed(value: object, rows: torch.Size, vocabulary: int, other_name: str, other: Tensor) -> None:
    """Packed sets of tokens: one for all rows, or one per row."""
    if value is None:
        return
    words = tensor("allowed", value, (torch.int32,))
    same_device("allowed", words, other_name, other)
    count = -(-vocabulary // 32)
    if words.shape != (count,) and words.shape != (*rows, count):
        raise ValueError(
            f"allowed has shape {tuple(words.shape)}, expected {(count,)} or {(*rows, count)}: one bit for each of "
            f"{vocabulary} tokens, for all rows or for each"
        )


def some_allowed(asked: Tensor, some: Tensor) -> None:
    """A set that is not empty, where `some`, for every row that is asked about, where values may be looked at."""
    if not readable(asked):
        return
    empty = (asked & ~some).reshape(-1)
    if empty.any():
        raise ValueError(f"allowed holds no token for row {int(empty.nonzero()[0])}, which has a target")


def values(targets: Tensor, temperature: object, ignore_index: int, vocabulary: int) -> None:
    """Targets in range and temperatures positive, where values may be looked at."""
    if not readable(targets):
        return
    bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise IndexError(
            f"targets{where} is {targets[tuple(where)].item()}, out of range for a vocabulary of {vocabulary} "
            f"(ignore_index is {ignore_index})"
        )
    temperatures(temperature)


def temperatures(value: object) -> None:
    """Temperatures of one per row positive, where values may be looked at."""
    if isinstance(value, Tensor) and readable(value) and not ((value > 0) & value.isfinite()).all():
        raise ValueError("temperature must be positive and finite for every token")


def cu_seqlens(name: str, value: object, other_name: str, other: Tensor) -> None:
    """Boundaries of packed sequences, int32 (B + 1,)."""
    boundaries = tensor(name, value, (torch.int32,))
    same_device(name, boundaries, other_name, other)
    if boundaries.dim() != 1 or boundaries.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(boundaries.shape)}, expected (B + 1,)")


def rising(name: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """Boundaries in order, where values may be looked at."""
    if cu_seqlens is None or not readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to at most {tokens}, the number of tokens")


def readable(value: Tensor) -> bool:
    """Whether the values of a tensor may be looked at: on the CPU; on other devices, where reading waits for all work
    queued there, only with FASTPO_DEBUG=1; never while a graph is traced or captured, nor of tensors without any."""
    if torch.compiler.is_compiling() or isinstance(value, FakeTensor):
        return False
    return value.device.type == "cpu" or (
        os.environ.get("FASTPO_DEBUG") == "1"
        and not (value.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def number(name: str, value: object) -> float:
    """A Python number; tensors are refused, since reading one would synchronise with its device."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def hyper_parameters(method: str, given: Mapping[str, object], domains: Mapping[str, object]) -> dict[str, float]:
    """The hyper-parameters as floats, each inside the domain of its registry row."""
    values = {name: number(name, value) for name, value in given.items()}
    for name, value in values.items():
        if value not in domains[name]:  # type: ignore[operator]
            raise ValueError(f"{name} must be in {domains[name]} for {method}, got {value:g}")
    return values
