"""`make gpu-check`'s benchmark: fastpo against eager torch, torch.compile and its peers on one GPU.

Writes one JSON and one PNG under results/, named after the GPU, with driver, commit and date. All providers of a case
take turns in one process; a call is timed by events on the stream, behind a kernel that keeps the GPU busy until the
host has queued the call, and behind a write that empties the second-level cache. Providers whose result is wrong are
not timed. `--device cpu --small` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import commit
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.bench import state_space
from fastpo.bench.processes import columns

HERE = Path(__file__).parent
ROUNDS = 15
Outputs = Sequence[Tensor]


@dataclass
class Provider:
    """One way to do a case's work. `run` returns outputs, compared with eager's up to `tolerance`, or, of a floor,
    nothing of meaning."""

    name: str
    run: Callable[[], Outputs]
    floor: bool = False
    shorter: bool = False  # has no result for the last position


@dataclass
class Case:
    name: str
    providers: list[Provider]
    bytes: int  # what has to move: inputs once, outputs of their size once; 0 where arithmetic is what takes time
    target: tuple[str, float] | None = None  # fastpo's time is at most that many times this provider's
    extra: int | None = None  # bytes that fastpo may take beside its results
    tolerance: float = 2e-2
    missing: dict[str, str] = field(default_factory=dict)


class Timer:
    """Times calls on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        # larger than any second-level cache
        self.flush = torch.empty(256 << 20 if self.cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Outputs]) -> float:
        """Seconds of one call."""
        self.flush.zero_()
        if not self.cuda:
            start_time = time.perf_counter()
            run()
            return time.perf_counter() - start_time
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # about a millisecond, in which the host gets ahead
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def gradients(outputs: Outputs, inputs: Sequence[Tensor]) -> Outputs:
    """The outputs and the gradients of their sum."""
    return [*outputs, *torch.autograd.grad([o.sum() for o in outputs if o.requires_grad], inputs)]


def eager_logprobs(logits: Tensor, targets: Tensor, entropy: bool) -> Outputs:
    logprobs = torch.log_softmax(logits.float(), -1)
    taken = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return [taken, -(logprobs.exp() * logprobs).sum(-1)] if entropy else [taken]


def fastpo_logprobs(logits: Tensor, targets: Tensor, entropy: bool, inplace: bool = False) -> Outputs:
    if not entropy:
        return [fastpo.token_logprobs(logits, targets, inplace_backward=inplace)]
    out = fastpo.token_logprobs(logits, targets, stats=("entropy",), inplace_backward=inplace)
    assert out.entropy is not None
    return [out.logprobs, out.entropy]


def trl_logprobs() -> Callable[[Tensor, Tensor, bool], Outputs]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(logits: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        taken = selective_log_softmax(logits, targets)
        return [taken, entropy_from_logits(logits)] if entropy else [taken]

    return run


def trl_fused() -> Callable[[Tensor, Tensor, bool], Outputs]:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda logits, targets, entropy: selective_log_softmax_and_entropy(logits, targets)[: 1 + entropy]


def liger_logprobs() -> Callable[[Tensor, Tensor, bool], Outputs]:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def run(logits: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        if entropy or logits.requires_grad:
            raise NotImplementedError("no entropy and no gradient")
        # it leaves the last position out
        return [fused_selective_log_softmax(logits, targets[:, :-1])]

    return run


def flash_logprobs() -> Callable[[Tensor, Tensor, bool], Outputs]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def run(logits: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        if entropy:
            raise NotImplementedError("no entropy")
        flat = cross_entropy_loss(logits.flatten(0, -2), targets.flatten())[0]
        return [-flat.view(targets.shape)]

    return run


LOGPROB_PEERS: dict[str, Callable[[], Callable[[Tensor, Tensor, bool], Outputs]]] = {
    "TRL": trl_logprobs,
    "TRL fused": trl_fused,
    "Liger": liger_logprobs,
    "flash-attn": flash_logprobs,
}


def token_logprobs_case(
    device: torch.device, shape: tuple[int, ...], vocab: int, *, entropy: bool, backward: bool, inplace: bool = False
) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(*shape, vocab, generator=generator, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocab, shape, generator=generator, device=device)
    size = logits.numel() * logits.element_size()
    logits.requires_grad_(backward)

    def timed(function: Callable[[Tensor, Tensor, bool], Outputs]) -> Callable[[], Outputs]:
        if not backward:
            return lambda: function(logits, targets, entropy)
        return lambda: gradients(function(logits, targets, entropy), [logits])

    def overwriting() -> Outputs:
        # what a head's output is: not a leaf, and of no more use afterwards
        copy = logits.detach().requires_grad_()
        outputs = fastpo_logprobs(copy * 1, targets, entropy, True)
        return gradients(outputs, [copy])

    providers = [Provider("fastpo", timed(fastpo_logprobs))]
    if inplace:
        providers.append(Provider("fastpo, in place, and a copy", overwriting))
    providers += [
        Provider("eager", timed(eager_logprobs)),
        Provider("compile", timed(torch.compile(eager_logprobs, fullgraph=True, dynamic=False))),
    ]
    missing = {}
    for name, build in LOGPROB_PEERS.items():
        try:
            providers.append(Provider(name, timed(build()), shorter=name == "Liger"))
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    target = logits.detach().new_empty(logits.shape)
    if backward:
        providers.append(Provider("floor", lambda: [read(logits.detach()), target.copy_(logits.detach())], floor=True))
    else:
        providers.append(Provider("floor", lambda: [read(logits)], floor=True))
    what = "forward" + " + entropy" * entropy + " + backward" * backward
    return Case(
        f"token_logprobs {' x '.join(map(str, shape))} x {vocab} bf16, {what}",
        providers,
        size * (3 if backward else 1),
        ("floor", 1 / (0.8 if backward else 0.85)),
        missing=missing,
    )


Head = Callable[[Tensor, Tensor, Tensor, bool], Outputs]


def eager_head(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Outputs:
    return eager_logprobs(F.linear(hidden, weight), targets, entropy)


def fastpo_head(budget: int) -> Head:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        if not entropy:
            return [fastpo.linear_logprobs(hidden, weight, targets, memory_budget=budget)]
        out = fastpo.linear_logprobs(hidden, weight, targets, memory_budget=budget, stats=("entropy",))
        assert out.entropy is not None
        return [out.logprobs, out.entropy]

    return run


def of_losses(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    """A peer that gives one cross-entropy per row and nothing else."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        if entropy:
            raise NotImplementedError("no entropy")
        return [-function(hidden, weight, targets)]

    return run


def core_head(chunked: bool) -> Head:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return of_losses(lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="none", options=options))


def trl_head() -> Head:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        wanted = ("entropy",) * entropy
        # the number of columns is that of its trainers
        out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, wanted)
        return out[: 1 + entropy]

    return run


def liger_fused_head() -> Head:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return of_losses(lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y, reduction="none"))


def liger_scaled_head() -> Head:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Outputs:
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, return_entropy=entropy)
        return [-out[0], out[1]] if entropy else [-out]

    return run


def liger_chunked_head() -> Head:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return of_losses(lambda h, w, y: -LigerFusedLinearPPOBase.chunk_forward(h[None], w, y[None])[0])


def cce_head(impl: str) -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return of_losses(lambda h, w, y: linear_cross_entropy(h, w, y, reduction="none", impl=impl))


def verl_head() -> Head:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets, entropy: linear_cross_entropy(hidden, weight, targets, 1.0, "none")[
        : 1 + entropy
    ]


HEAD_PEERS: dict[str, Callable[[], Head]] = {
    "torch core": lambda: core_head(False),
    "torch core, chunked": lambda: core_head(True),
    "TRL": trl_head,
    "Liger, fused": liger_fused_head,
    "Liger, scaled": liger_scaled_head,
    "Liger, chunked": liger_chunked_head,
    "cut-cross-entropy": lambda: cce_head("cce"),
    "cut-cross-entropy, exact": lambda: cce_head("cce_exact"),
    "verl": verl_head,
}


def linear_logprobs_case(
    device: torch.device, rows: int, size: int, vocab: int, *, entropy: bool, backward: bool, kept: bool = False
) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(n, size, generator=generator, device=device).to(torch.bfloat16) for n in (rows, vocab)
    )
    weight /= size**0.5
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    leaves = [t.requires_grad_() for t in (hidden, weight)] if backward else []

    def timed(function: Head) -> Callable[[], Outputs]:
        def forward() -> Outputs:
            return function(hidden, weight, targets, entropy)

        return (lambda: gradients(forward(), leaves)) if backward else forward

    providers = [
        Provider("fastpo", timed(fastpo_head(1 << 50 if kept else 0))),
        Provider("eager", timed(eager_head)),
        Provider("compile", timed(torch.compile(eager_head, fullgraph=True, dynamic=False))),
    ]
    missing = {}
    for name, build in HEAD_PEERS.items():
        try:
            providers.append(Provider(name, timed(build())))
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    again = backward and not kept
    h, w = hidden.detach(), weight.detach()
    logits = h.new_zeros(rows, vocab)
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)

    def products() -> Outputs:
        for _ in range(1 + again):
            torch.mm(h, w.t(), out=logits)
        if backward:
            torch.mm(logits, w, out=d_hidden)
            torch.mm(logits.t(), h, out=d_weight)
        return []

    providers.append(Provider("products", products, floor=True))
    what = "forward" + " + entropy" * entropy + " + backward" * backward
    asked = 1.15 if not backward else 1.25 if kept else 1.2
    return Case(
        f"linear_logprobs {rows} x {size} x {vocab} bf16, {what}" + ", logits kept" * kept,
        providers,
        0,
        ("products", asked),
        (6 if kept else 1) << 30 if backward else None,
        missing=missing,
    )


def read(x: Tensor) -> Tensor:
    """Reads every byte once and writes next to nothing: torch's sum of rows, of the same bytes as fp32 numbers."""
    words = x.detach().flatten()
    words = words[: words.numel() // 2048 * 2048].view(torch.float32)
    return words.view(-1, 1024).sum(-1)


def eager_kl(logits: Tensor, reference: Tensor) -> Outputs:
    policy, other = (torch.log_softmax(t.float(), -1) for t in (logits, reference))
    return [(other.exp() * (other - policy)).sum(-1)]


def trl_kl() -> Callable[[Tensor, Tensor], Outputs]:
    from trl.experimental.gkd import GKDTrainer

    def run(logits: Tensor, reference: Tensor) -> Outputs:
        terms = GKDTrainer.generalized_jsd_loss(logits.float(), reference.float(), beta=0, reduction="none")
        return [terms.sum(-1)]

    return run


def liger_kl() -> Callable[[Tensor, Tensor], Outputs]:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="none", log_target=True)

    def run(logits: Tensor, reference: Tensor) -> Outputs:
        # of log-probs, which are the user's to make
        policy, other = (torch.log_softmax(t.float(), -1).flatten(0, -2) for t in (logits, reference))
        return [loss(policy, other).sum(-1).view(logits.shape[:-1])]

    return run


def vocab_divergence_case(device: torch.device, shape: tuple[int, ...], vocab: int, *, backward: bool) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(*shape, vocab, generator=generator, device=device, dtype=torch.bfloat16)
    reference = logits + torch.randn(*shape, vocab, generator=generator, device=device, dtype=torch.bfloat16)
    size = logits.numel() * logits.element_size()
    logits.requires_grad_(backward)

    def timed(function: Callable[[Tensor, Tensor], Outputs]) -> Callable[[], Outputs]:
        if not backward:
            return lambda: function(logits, reference)
        return lambda: gradients(function(logits, reference), [logits])

    providers = [
        Provider("fastpo", timed(lambda x, y: [fastpo.token_kl(x, y)])),
        Provider("eager", timed(eager_kl)),
        Provider("compile", timed(torch.compile(eager_kl, fullgraph=True, dynamic=False))),
    ]
    missing = {}
    for name, build in {"TRL": trl_kl, "Liger": liger_kl}.items():
        try:
            providers.append(Provider(name, timed(build())))
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    target = logits.detach().new_empty(logits.shape)

    def floor() -> Outputs:
        found = [read(logits), read(reference)]
        return [*found, read(reference), target.copy_(logits.detach())] if backward else found

    providers.append(Provider("floor", floor, floor=True))
    return Case(
        f"token_kl {' x '.join(map(str, shape))} x {vocab} bf16, forward" + " + backward" * backward,
        providers,
        size * (5 if backward else 2),
        ("floor", 1 / 0.8),
        missing=missing,
    )


def eager_head_kl(hidden: Tensor, weight: Tensor, *reference: Tensor) -> Outputs:
    with torch.no_grad():
        other = F.linear(*reference)
    return eager_kl(F.linear(hidden, weight), other)


def trl_head_kl() -> Callable[..., Outputs]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(hidden: Tensor, weight: Tensor, *reference: Tensor) -> Outputs:
        return [ChunkedDivergenceFunction.apply(hidden, weight, None, *reference, None, 0.0)[0]]

    return run


def linear_divergence_case(device: torch.device, rows: int, size: int, vocab: int, *, kept: bool) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, size, generator=generator, device=device, dtype=torch.bfloat16)

    tensors = [normal(rows), normal(vocab) / size**0.5]
    # a reference that is as far away as a log-prob is large: the peers' bf16 logits are rounded
    tensors += [t + t.abs().mean() * normal(len(t)) for t in tensors]
    leaves = [t.requires_grad_() for t in tensors[:2]]

    def timed(function: Callable[..., Outputs]) -> Callable[[], Outputs]:
        return lambda: gradients(function(*tensors), leaves)

    budget = 1 << 50 if kept else 0
    providers = [
        Provider("fastpo", timed(lambda *given: [fastpo.linear_divergence(*given, memory_budget=budget)])),
        Provider("eager", timed(eager_head_kl)),
        Provider("compile", timed(torch.compile(eager_head_kl, fullgraph=True, dynamic=False))),
    ]
    missing = {}
    try:
        providers.append(Provider("TRL", timed(trl_head_kl())))
    except ImportError as error:
        missing["TRL"] = f"not installed: {error}"
    h, w = (t.detach() for t in leaves)
    logits = h.new_zeros(rows, vocab)
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)

    def products() -> Outputs:
        # of both models, once or twice
        for _ in range(2 if kept else 4):
            torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=d_hidden)
        torch.mm(logits.t(), h, out=d_weight)
        return []

    providers.append(Provider("products", products, floor=True))
    return Case(
        f"linear_divergence KL {rows} x {size} x {vocab} bf16, forward + backward" + ", logits kept" * kept,
        providers,
        0,
        ("products", 1.3),
        None if kept else 4 << 30,
        missing=missing,
    )


def eager_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, mask: Tensor | None
) -> Tensor:
    def total(t: Tensor) -> Tensor:
        return t if t.dim() == 1 else (t if mask is None else t * mask).sum(-1)

    margin = (total(chosen) - total(ref_chosen)) - (total(rejected) - total(ref_rejected))
    return -F.logsigmoid(0.1 * margin).mean()


def objective_case(device: torch.device, rows: int, tokens: int, *, backward: bool) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, tokens) if tokens else (rows,)
    inputs = [-torch.rand(shape, generator=generator, device=device) for _ in range(4)]
    mask = torch.rand(shape, generator=generator, device=device) < 0.8 if tokens else None
    leaves = [t.requires_grad_() for t in inputs[:2]] if backward else []
    masks = {} if mask is None else {"chosen_mask": mask, "rejected_mask": mask}

    def timed(function: Callable[[], Tensor]) -> Callable[[], Outputs]:
        return (lambda: gradients([function()], leaves)) if backward else (lambda: [function()])

    compiled = torch.compile(eager_dpo, fullgraph=True, dynamic=False)
    read_tensors = [*inputs, *([mask] if mask is not None else [])]
    copies = [torch.empty_like(t) for t in read_tensors]

    def copy() -> Outputs:
        torch._foreach_copy_(copies, [t.detach() for t in read_tensors])
        return copies

    size = sum(t.numel() * t.element_size() for t in read_tensors)
    return Case(
        f"objective dpo {rows} x {tokens or 1}, forward" + " + backward" * backward,
        [
            Provider("fastpo", timed(lambda: losses.dpo(*inputs, **masks).loss)),
            Provider("eager", timed(lambda: eager_dpo(*inputs, mask))),
            Provider("compile", timed(lambda: compiled(*inputs, mask))),
            Provider("copy", copy, floor=True),
        ],
        size,
        ("copy", 2.0) if not backward else None,
        tolerance=1e-4,
    )


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def keops_cauchy() -> Product:
    from pykeops.torch import Genred

    numerator = "z * ComplexReal(v) - Real2Complex(Sum(v * w))"
    formula = f"ComplexDivide({numerator}, ComplexMult(z - w, z - Conj(w)))"
    reduction = Genred(formula, ["v = Vj(2)", "z = Vi(2)", "w = Vj(2)"], reduction_op="Sum", axis=1)

    def run(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return torch.view_as_complex(2 * reduction(*(torch.view_as_real(t).contiguous() for t in (v, z[None], w))))

    return run


def keops_vandermonde(length: int) -> Product:
    from pykeops.torch import Genred

    formula = "ComplexMult(v, ComplexExp(ComplexMult(x, l)))"
    reduction = Genred(formula, ["v = Vj(2)", "x = Vj(2)", "l = Vi(2)"], reduction_op="Sum", axis=1)

    def run(v: Tensor, _: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(length).to(x)[None]
        return 2 * reduction(*(torch.view_as_real(t).contiguous() for t in (v, x, steps)))[..., 0]

    return run


def state_space_case(
    device: torch.device, product: str, channels: int, poles: int, length: int, *, backward: bool
) -> Case:
    """The convolution kernels of S4 and S4D layers, as `fastpo.bench.state_space` makes them."""
    generator = torch.Generator(device).manual_seed(0)
    steps = torch.logspace(-3, -1, channels, dtype=torch.float64, device=device)[:, None]
    w = (steps * (-0.5 + 1j * torch.pi * torch.arange(poles, device=device))).to(torch.complex64)
    v = torch.randn(channels, poles, dtype=torch.complex64, generator=generator, device=device)
    halves = torch.arange(length, dtype=torch.float64, device=device) / (2 * length)
    z = (2j * torch.tan(torch.pi * halves)).to(torch.complex64)
    leaves = [t.requires_grad_(backward) for t in (v, w)]
    is_cauchy = product == "cauchy"
    upstream = torch.randn(channels, length, dtype=torch.complex64, generator=generator, device=device)
    upstream = upstream if is_cauchy else upstream.real.contiguous()

    def timed(function: Product) -> Callable[[], Outputs]:
        def run() -> Outputs:
            out = function(v, z, w)
            grads = torch.autograd.grad(out, leaves, upstream) if backward else ()
            return [torch.view_as_real(t) if t.is_complex() else t for t in (out, *grads)]

        return run

    own, plain, keops = (
        (fastpo.cauchy, state_space.cauchy, keops_cauchy)
        if is_cauchy
        else (
            lambda v, z, w: fastpo.vandermonde(v, w, length),
            lambda v, z, w: state_space.vandermonde(v, w, length),
            lambda: keops_vandermonde(length),
        )
    )
    providers = [Provider("fastpo", timed(own)), Provider("eager", timed(plain))]
    missing = {}
    try:
        providers.append(Provider("pykeops", timed(keops())))
    except Exception as error:  # without a compiler it fails in its own ways
        missing["pykeops"] = f"not to be had: {error}"
    moved = [t.detach() for t in (v, w, *([z] if is_cauchy else []), upstream)] * (1 + backward)
    copies = [torch.empty_like(t) for t in moved]

    def copy() -> Outputs:
        torch._foreach_copy_(copies, moved)
        return copies

    # what has to be moved is next to nothing: the floor says how far the arithmetic is from it
    providers.append(Provider("copy", copy, floor=True))
    return Case(
        f"{product} {channels} x {poles} x {length} complex64, forward" + " + backward" * backward,
        providers,
        0,
        missing=missing,
        extra=(upstream.nbytes + 4 * v.nbytes) if backward else None,
    )


def cases(device: torch.device, small: bool) -> list[Callable[[], Case]]:
    rows, vocab = (8192, 151_936) if not small else (8, 1000)
    found: list[Callable[[], Case]] = []
    for entropy, backward in ((False, False), (True, False), (False, True), (True, True)):
        found.append(
            lambda e=entropy, b=backward: token_logprobs_case(
                device, (8, rows // 8), vocab, entropy=e, backward=b, inplace=b
            )
        )
    # few rows: split over several programs; and a vocabulary whose rows start anywhere
    found.append(lambda: token_logprobs_case(device, (1, 16), vocab, entropy=True, backward=False))
    found.append(lambda: token_logprobs_case(device, (8, rows // 8), vocab // 3 + 2, entropy=True, backward=True))
    for backward in (False, True):
        found.append(lambda b=backward: vocab_divergence_case(device, (4, rows // 8), vocab, backward=b))
    head = (8192, 4096, 131_072) if not small else (16, 32, 1000)
    for entropy, backward, kept in ((True, False, False), (False, True, False), (False, True, True)):
        found.append(
            lambda e=entropy, b=backward, k=kept: linear_logprobs_case(device, *head, entropy=e, backward=b, kept=k)
        )
    for kept in (False, True):
        found.append(lambda k=kept: linear_divergence_case(device, *head, kept=k))
    for pairs, tokens in ((64, 4096), (512, 512), (1_000_000, 0)) if not small else ((4, 50), (30, 0)):
        for backward in (False, True):
            found.append(lambda p=pairs, t=tokens, b=backward: objective_case(device, p, t, backward=b))
    # a layer's, and few channels of a long sequence
    for sizes in ((256, 32, 2048), (16, 64, 65_536)) if not small else ((4, 8, 300),):
        for product in state_space.PRODUCTS:
            for backward in (False, True):
                found.append(lambda n=product, s=sizes, b=backward: state_space_case(device, n, *s, backward=b))
    return found


def right(outputs: Outputs, truth: Outputs, tolerance: float) -> str | None:
    """None, or by how much the outputs differ, part by part to keep memory small."""
    for got, want in zip(outputs, truth, strict=True):
        worst, typical = 0.0, []
        scale = want.detach().abs().max().clamp(min=1e-6).float()
        parts = (t.detach().reshape(-1).split(1 << 26) for t in (got, want))
        for a, b in zip(*parts, strict=True):
            error = (a.float() - b.float()).abs()
            worst = max(worst, (error.max() / scale).nan_to_num(nan=1e9).item())
            # most of a gradient is small beside its entries at the targets: what is typical counts by itself
            typical.append((error / b.float().abs().clamp(min=1e-20))[::997].nan_to_num(nan=1e9))
        middle = torch.cat(typical).median().item()
        if max(worst, middle) > tolerance:
            return f"differs from eager by {worst:.1e} of the largest, typically by {middle:.1e} of an entry"
    return None


def measure(case: Case, timer: Timer) -> dict[str, Any]:
    """Check all providers, then time them in turns."""
    rows: dict[str, dict[str, Any]] = {name: {"status": reason} for name, reason in case.missing.items()}
    try:
        truth = [t.detach().clone() for t in next(p for p in case.providers if p.name == "eager").run()]
    except torch.cuda.OutOfMemoryError as error:
        return {"case": case.name, "bytes": case.bytes, "providers": {}, "target": None, "skipped": str(error)}
    ready = []
    for p in case.providers:
        try:
            outputs = p.run()
            problem = (
                None if p.floor else right(outputs, [t[:, :-1] for t in truth] if p.shorter else truth, case.tolerance)
            )
        except Exception as error:
            problem = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        outputs = []
        rows[p.name] = {"status": problem or "ok", "times": []}
        if problem is None:
            ready.append(p)
    del truth
    for p in ready:
        if timer.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = p.run()
            rows[p.name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            rows[p.name]["result_bytes"] = sum(o.nbytes for o in outputs)
            outputs = []
    order = list(ready)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for p in order:
            rows[p.name]["times"].append(timer(p.run))
    for row in rows.values():
        times = row.pop("times", [])
        if times:
            row["seconds"] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    own = rows["fastpo"]["seconds"]["median"] if "seconds" in rows["fastpo"] else None
    met = None
    if case.target and own and "seconds" in rows.get(case.target[0], {}):
        ratio = own / rows[case.target[0]]["seconds"]["median"]
        met = {"against": case.target[0], "asked": case.target[1], "measured": ratio, "met": ratio <= case.target[1]}
    memory = None
    if case.extra and "peak_bytes" in rows["fastpo"]:
        extra = rows["fastpo"]["peak_bytes"] - rows["fastpo"]["result_bytes"]
        memory = {"asked": case.extra, "measured": extra, "met": extra <= case.extra}
    return {"case": case.name, "bytes": case.bytes, "providers": rows, "target": met, "memory": memory}


def table(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"{result['case']}: skipped, {result['skipped']}"
    own = result["providers"]["fastpo"].get("seconds", {}).get("median")
    lines = []
    for name, row in result["providers"].items():
        if "seconds" not in row:
            continue
        s = row["seconds"]
        ratio = "" if name == "fastpo" or not own else f"{s['median'] / own:.2f}x"
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""
        spread = f"{s['min'] * 1e3:.3f} .. {s['max'] * 1e3:.3f}"
        rate = f"{result['bytes'] / s['median'] / 1e9:.0f}" if result["bytes"] else ""
        lines.append([name, f"{s['median'] * 1e3:.3f}", spread, rate, ratio, peak])
    text = columns([result["case"], "ms", "min .. max", "GB/s", "fastpo is", "peak MiB"], lines)
    text += "".join(f"\n  {n}: {r['status']}" for n, r in result["providers"].items() if r["status"] != "ok")
    if result["target"]:
        t = result["target"]
        text += f"\n  asked: at most {t['asked']:.2f} times {t['against']}; measured {t['measured']:.2f}"
    if result["memory"]:
        asked, measured = (result["memory"][key] / 2**20 for key in ("asked", "measured"))
        text += f"\n  asked: at most {asked:.0f} MiB beside the results; measured {measured:.0f}"
    return text


def rates(device: torch.device, timer: Timer, small: bool) -> dict[str, float]:
    """Copy bandwidth, read and written bytes together, read bandwidth, and the rate of a bf16 GEMM."""
    n = (1 << 20 if small else 1 << 30) // 2
    source, target = (torch.randn(n // 1024, 1024, device=device).to(torch.bfloat16) for _ in range(2))
    side = 128 if small else 8192
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))

    def best(run: Callable[[], Any]) -> float:
        return min(timer(lambda: [run()]) for _ in range(10))

    return {
        "copy_gb_per_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
        "read_gb_per_s": source.nbytes / best(lambda: read(source)) / 1e9,
        "gemm_tflop_per_s": 2 * side**3 / best(lambda: a @ b) / 1e12,
    }


def environment(device: torch.device) -> dict[str, Any]:
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
    packages = {}
    for name in ("triton", "cupy-cuda13x", "trl", "liger-kernel", "flash-attn", "cut-cross-entropy", "verl"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": packages,
        "git_commit": commit(),
        "fastpo": str(fastpo.info()),
    }


def plot(results: Sequence[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """How many times as fast as each provider fastpo is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(
        dict.fromkeys(n for r in results for n, p in r["providers"].items() if "seconds" in p and n != "fastpo")
    )
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.9 * len(results)), layout="constrained")
    height = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        at, speeds = [], []
        for position, result in enumerate(results):
            rows = result["providers"]
            if "seconds" in rows.get(name, {}) and "seconds" in rows["fastpo"]:
                at.append(position + (i - (len(names) - 1) / 2) * height)
                speeds.append(rows[name]["seconds"]["median"] / rows["fastpo"]["seconds"]["median"])
        bars = axes.barh(at, speeds, height * 0.9, label=name)
        axes.bar_label(bars, fmt="%.2fx", fontsize=7, padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(results)), [r["case"].replace(", ", "\n") for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("fastpo is x times as fast (medians)")
    axes.legend(fontsize=8)
    axes.set_title(f"{where['gpu']}, torch {where['torch']}, commit {where['git_commit']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    timer, where = Timer(device), environment(device)
    where["rates"] = rates(device, timer, args.small)
    print(f"{where['gpu']}, driver {where['driver']}, torch {where['torch']}, commit {where['git_commit']}")
    print(", ".join(f"{name} {value:.0f}" for name, value in where["rates"].items()), end="\n\n", flush=True)
    results = []
    for build in cases(device, args.small):
        # never the reference in the kernels' name
        with fastpo.use_backend("native"):
            results.append(measure(build(), timer))
        print(table(results[-1]), end="\n\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()
    name = re.sub(r"\W+", "-", where["gpu"]).strip("-").lower()
    report = args.output / f"gpu-{name}.json"
    report.write_text(json.dumps({"environment": where, "cases": results}, indent=2) + "\n")
    try:
        plot(results, where, report.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"written: {report}")
    wrong = [r["case"] for r in results if r["providers"].get("fastpo", {"status": "ok"})["status"] != "ok"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
