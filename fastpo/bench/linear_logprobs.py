"""The benchmark of `fastpo.linear_logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.bench.harness import Expected, Problem, Provider, Run, UnavailableError, compiled, with_backward
from fastpo.bench.token_logprobs import terms
from fastpo.kernels.linear_logprobs import linear_logprobs
from fastpo.reference import vocabulary

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-probs (...) of hidden (..., H), weight (V, H) and targets (...); 0 where a target is `IGNORED`."""

IGNORED = -100
# bytes of logits that may be kept: none, and all
BUDGETS = {"fastpo": 0, "fastpo_kept": 1 << 50}
LABELS = {"fastpo": "fastpo, logits computed again", "fastpo_kept": "fastpo, logits kept"}
# tokens of a sequence, whose first part is the prompt
_SEQUENCE = 128
# what TRL's trainers pass
_TRL_COLUMNS = 32_768
# elements of the logits that the exact results are made of at a time
_BLOCK = 1 << 24
# elements of the logits up to which results are checked
_CHECKED = 1 << 28


@dataclass(frozen=True)
class LinearLogprobsCase:
    """Log-probs of one target per row from normal hidden states and a head's weight, whose logits are normal.

    The share `prompt` of the rows has no target. A frozen head needs no gradient, only the hidden states do.
    """

    PROVIDERS: ClassVar[tuple[str, ...]] = (
        "fastpo",
        "fastpo_kept",
        "fastpo_float32",
        "eager",
        "compile",
        "core",
        "core_chunked",
        "core_gathered",
        "trl",
        "trl_gathered",
        "cce",
        "products",
        "products_kept",
    )

    rows: int = 1024
    hidden: int = 576
    vocab: int = 49_152
    dtype: str = "float32"
    prompt: float = 0.5
    frozen: bool = False
    backward: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        what = "forward" + " + backward" * self.backward + " to hidden alone" * (self.backward and self.frozen)
        return (
            f"linear_logprobs {self.rows} x {self.hidden} x {self.vocab} {self.dtype}, {self.prompt:.0%} prompt, {what}"
        )

    def build(self) -> Problem:
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.rows, self.hidden, generator=generator).to(dtype)
        weight = torch.randn(self.vocab, self.hidden, generator=generator).div_(self.hidden**0.5).to(dtype)
        targets = torch.randint(self.vocab, (self.rows,), generator=generator)
        targets[prompts(self.rows, self.prompt)] = IGNORED
        upstream = torch.randn(self.rows, generator=generator).to(torch.promote_types(dtype, torch.float32))
        learning = self.backward and not self.frozen
        hidden.requires_grad_(self.backward)
        weight.requires_grad_(learning)
        rows = (targets != IGNORED).nonzero()[:, 0]

        def timed(head: Head, hidden: Tensor = hidden, weight: Tensor = weight) -> Run:
            def forward() -> list[Tensor]:
                return [head(hidden, weight, targets)]

            leaves = [hidden, weight] if learning else [hidden]
            return with_backward(forward, leaves, [upstream]) if self.backward else forward

        def upcast() -> Run:
            wide = [t.detach().float().requires_grad_(t.requires_grad) for t in (hidden, weight)]
            return timed(fastpo_head("fastpo"), *wide)

        def alone(logits: int) -> Run:
            return products(hidden.detach()[rows], weight.detach(), logits, self.backward, learning)

        providers = [
            Provider("fastpo", LABELS["fastpo"] if learning else "fastpo", lambda: timed(fastpo_head("fastpo"))),
            Provider("eager", "eager torch", lambda: timed(eager)),
            Provider("compile", "torch.compile of eager", lambda: timed(compiled(eager))),
            Provider("core", "F.linear_cross_entropy", lambda: timed(core(chunked=False))),
            Provider("core_chunked", "F.linear_cross_entropy in chunks", lambda: timed(core(chunked=True))),
            Provider("trl", "TRL's ChunkedLogProbFunction", lambda: timed(trl())),
            Provider("cce", "cut-cross-entropy's torch_compile", lambda: timed(cce())),
        ]
        if len(rows) < self.rows:
            label = "F.linear_cross_entropy on gathered rows"
            providers.insert(5, Provider("core_gathered", label, lambda: timed(gathered(core(chunked=False), rows))))
            label = "TRL's ChunkedLogProbFunction on gathered rows"
            providers.append(Provider("trl_gathered", label, lambda: timed(gathered(trl(), rows))))
        if dtype in (torch.bfloat16, torch.float16):
            # the same values at twice the bytes
            providers.insert(1, Provider("fastpo_float32", "fastpo on the inputs as float32", upcast))
        # a frozen head's logits are neither kept nor computed again
        number = 1 + learning
        every = number + self.backward + learning
        label = f"floor: its {every} matrix product{'s' * (every > 1)}"
        providers.append(Provider("products", label, lambda: alone(number), floor=True))
        if learning:
            providers.insert(
                1, Provider("fastpo_kept", LABELS["fastpo_kept"], lambda: timed(fastpo_head("fastpo_kept")))
            )
            label = "floor: the 3 matrix products with kept logits"
            providers.append(Provider("products_kept", label, lambda: alone(1), floor=True))
        large = self.rows * self.vocab > _CHECKED
        return Problem(
            providers,
            expected=None if large else lambda: self._expected(hidden, weight, targets, upstream),
            bytes=0,
            bar=("products",),
        )

    def _expected(self, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> dict[str, Expected]:
        found = exact(hidden, weight, targets, upstream if self.backward else None)
        rounding = found.rounding(hidden.dtype)
        expected = {"logprobs": Expected(found.logprobs, 1.0, *rounding)}
        return expected | gradients(found.hidden, None if self.frozen else found.weight, rounding)


def prompts(rows: int, share: float) -> Tensor:
    """Which rows have no target: the first ones of every sequence."""
    length = min(rows, _SEQUENCE)
    return torch.arange(rows) % length < share * length


def fastpo_head(name: str) -> Head:
    """fastpo, with or without kept logits."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets, memory_budget=BUDGETS[name])

    return head


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What people write; bf16 and fp16 logits in fp32."""
    logits = F.linear(hidden, weight)
    logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    taken = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return taken * (targets != IGNORED)


def core(*, chunked: bool) -> Head:
    """torch's own function, of log-probs per row."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError("torch has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=options)

    return head


def trl() -> Head:
    """What TRL's trainers do with a mask."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        raise UnavailableError(f"TRL's ChunkedLogProbFunction cannot be imported: {error}") from error

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ids = targets.clamp(min=0)
        found = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, _TRL_COLUMNS, None, 1.0, ())
        return found[0] * (targets != IGNORED)

    return head


def cce() -> Head:
    """Cut Cross-Entropy where there is no Triton; it gathers the rows that have targets by itself."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"cut-cross-entropy cannot be imported: {error}") from error

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = linear_cross_entropy(
            hidden, weight, targets, ignore_index=IGNORED, reduction="none", impl="torch_compile"
        )
        return -found

    return head


def gathered(head: Head, rows: Tensor) -> Head:
    """The head on the rows that have targets, which the caller knows."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = head(hidden.index_select(0, rows), weight, targets.index_select(0, rows))
        return found.new_zeros(len(targets)).index_copy(0, rows, found)

    return run


def products(hidden: Tensor, weight: Tensor, logits: int, d_hidden: bool, d_weight: bool) -> Run:
    """The matrix products alone, into memory that is there: logits as often as said, and the gradients."""
    out = hidden.new_zeros(len(hidden), len(weight))
    gradients = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> list[Tensor]:
        for _ in range(logits):
            torch.mm(hidden, weight.t(), out=out)
        if d_hidden:
            torch.mm(out, weight, out=gradients[0])
        if d_weight:
            torch.mm(out.t(), hidden, out=gradients[1])
        return []

    return run


class Exact(NamedTuple):
    """In fp64: log-probs, and of the hidden states' and the weight's gradients the value and Σ |terms|.

    `logit` and `logprob` are the largest magnitudes of any token's.
    """

    logprobs: Tensor
    logit: float
    logprob: float
    hidden: tuple[Tensor, Tensor] | None
    weight: tuple[Tensor, Tensor] | None

    def rounding(self, dtype: torch.dtype) -> tuple[float, float]:
        """How large the numbers are that an implementation rounds, and to which epsilon.

        It rounds x - max and logsumexp, which are as large as the log-probs; with bf16 and fp16 matrices torch's CPU
        rounds the logits to that dtype, which is far more. In a gradient that error is a relative one of p.
        """
        eps = torch.finfo(dtype).eps
        narrow = dtype in (torch.bfloat16, torch.float16)
        return self.logit if narrow else self.logprob, eps


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None) -> Exact:
    """The reference in fp64, by some rows at a time; without `upstream` there are no gradients.

    Rows may have several dimensions.
    """
    shape, size = hidden.shape, hidden.shape[-1]
    hidden, ids = hidden.detach().reshape(-1, size), targets.reshape(-1)
    wide, sizes = weight.detach().double(), weight.detach().float().abs()
    logprobs = torch.zeros(len(ids), dtype=torch.float64)
    logit = logprob = 1.0
    d_hidden, hidden_terms = torch.zeros(hidden.shape, dtype=torch.float64), torch.zeros(hidden.shape)
    d_weight, weight_terms = (t.new_zeros(t.shape if upstream is not None else 0) for t in (wide, sizes))
    for rows in (ids != IGNORED).nonzero()[:, 0].split(max(1, _BLOCK // len(weight))):
        h = hidden[rows].double()
        logits = (h @ wide.t()).requires_grad_(upstream is not None)
        taken = vocabulary.token_logprobs(logits, ids[rows]).logprobs
        logprobs[rows] = taken.detach()
        every = logits.detach().log_softmax(-1)
        logit = max(logit, logits.detach().abs().max().item())
        logprob = max(logprob, every.abs().max().item())
        if upstream is None:
            continue
        g = upstream.reshape(-1)[rows].double()
        (d,) = torch.autograd.grad(taken, logits, g)
        size_of_terms = terms(every, ids[rows], {"logprobs": g}).float()
        d_hidden[rows], hidden_terms[rows] = d @ wide, size_of_terms @ sizes
        d_weight.addmm_(d.t(), h)
        weight_terms.addmm_(size_of_terms.t(), h.float().abs())
    logprobs = logprobs.view(targets.shape)
    if upstream is None:
        return Exact(logprobs, logit, logprob, None, None)
    by_hidden = d_hidden.view(shape), hidden_terms.view(shape)
    return Exact(logprobs, logit, logprob, by_hidden, (d_weight, weight_terms))


def gradients(
    hidden: tuple[Tensor, Tensor] | None, weight: tuple[Tensor, Tensor] | None, rounding: tuple[float, float]
) -> dict[str, Expected]:
    """The gradients that were made, each with Σ |terms|, in the order in which a run returns them."""
    expected = {}
    for name, gradient in (("hidden_gradient", hidden), ("weight_gradient", weight)):
        if gradient is not None:
            value, size = gradient
            expected[name] = Expected(value, size.clamp_min(torch.finfo(torch.float32).tiny), *rounding)
    return expected
