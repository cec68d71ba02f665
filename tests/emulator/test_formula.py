"""A user's formula as the device runs it: the emitted C++ in the kernel of objective, over the emulator, through the
public function; and by NVRTC for every architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch

import fastpo
from fastpo.kernels import objective as objective_op
from fastpo.kernels.cuda import nvrtc
from fastpo.kernels.cuda import objective as launch
from fastpo.losses.formula import Formula
from tests.emulator.harness import Emulator, build, in_place_of_cpu
from tests.kernels.test_objective import Side, make, random

FORMULAS = [
    fastpo.formula("softplus(-beta*(w-l))", beta=0.3),
    # every function and operator, a reference, no beta
    fastpo.formula(
        "where(w < l, square(w - l) / 7, relu(1 - c*w)) + minimum(w, l) * tanh(c * w) - maximum(l, 0.5) ** 2 / 9"
        "+ log1p(exp(-abs(l))) * sigmoid(w) + expm1(clip(w, -1, 1)) - log(1 + w*w) + sqrt(l*l + c)"
        "- log_sigmoid(w - l) + log1mexp(-abs(w) - c) + 0.01 * (policy_w - reference_l) * policy_l",
        c=0.6,
    ),
    fastpo.formula("log_sigmoid(gamma - beta * (policy_w - policy_l)) * -1", beta=2.0, gamma=0.5),
]
by_formula = pytest.mark.parametrize("loss", FORMULAS, ids=range(len(FORMULAS)))


@pytest.fixture
def emulated(loss: Formula, monkeypatch) -> Iterator[Emulator]:
    """The kernel with this formula, in place of the reference on CPU tensors."""
    name = "formula-" + hashlib.sha256(loss.source.encode()).hexdigest()[:8]
    emulator = Emulator(build(name, {"FASTPO_USER_FORMULA": loss.source}))

    def forward(source, *arguments):
        assert source == loss.source
        return launch.forward(emulator, 0, *arguments)

    def kernel_of(row, *_):
        objective_op._USER_ROWS[loss.source] = row
        return loss.source

    monkeypatch.setattr(objective_op, "_kernel_of", kernel_of)
    backward = objective_op.launched_by(emulator)["objective_backward"]
    with in_place_of_cpu({"formula_objective": forward, "objective_backward": backward}):
        yield emulator


def call(loss: Formula, sides: tuple[Side, Side], **options):
    references = [s.reference for s in sides] if loss.row.reference_model else []
    masks = {f"{n}_mask": s.mask for n, s in zip(("chosen", "rejected"), sides, strict=True)}
    return loss(*(s.policy for s in sides), *references, **masks, **options)


@by_formula
class TestEmulated:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("layout", "length_norm"), [("summed", False), ("padded masked", False), ("padded masked", True)]
    )
    def test_as_in_torch(self, emulated, loss, dtype, layout, length_norm, monkeypatch):
        # log-ratios of order 1
        sides = [make(layout, 63, tokens, dtype, 3 * tokens, length_norm) for tokens in (5, 4)]
        sides = [s._replace(policy=s.policy / 8, reference=s.reference / 8) for s in sides]

        def evaluate(dtype: torch.dtype) -> list[torch.Tensor]:
            given = [
                s._replace(policy=s.policy.to(dtype).requires_grad_(), reference=s.reference.to(dtype)) for s in sides
            ]
            out = call(loss, given, reduction="none", length_norm=length_norm)
            upstream = random(63, seed=3).to(out.loss.dtype)
            grads = torch.autograd.grad(out.loss, [s.policy for s in given], upstream)
            return [out.loss.detach(), out.chosen_rewards, out.rejected_rewards, *grads]

        ours = evaluate(dtype)
        assert emulated.launched[0] == ("objective_f64" if dtype == torch.float64 else "objective_f32")
        monkeypatch.setattr(objective_op, "_kernel_of", lambda *_: None)
        # about thirty operations on numbers of order ten, each rounded; the gradient to its own dtype at the end
        eps = 30 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for i, (value, truth) in enumerate(zip(ours, evaluate(torch.float64), strict=True)):
            error = ((value.double() - truth).abs() / truth.abs().clamp(min=10)).max()
            assert error <= eps + torch.finfo(value.dtype).eps, (i, error)

    def test_gradcheck(self, emulated, loss):
        inputs = [
            (random(6, seed=i).double()).requires_grad_(i < 2) for i in range(4 if loss.row.reference_model else 2)
        ]
        assert torch.autograd.gradcheck(lambda *t: loss(*t, reduction="none").loss, inputs)
        assert torch.autograd.gradgradcheck(lambda *t: loss(*t, reduction="none").loss, inputs)

    def test_compiled(self, emulated, loss):
        torch._dynamo.reset()
        inputs = [random(6, seed=i).requires_grad_(i < 2) for i in range(4 if loss.row.reference_model else 2)]
        compiled = torch.compile(lambda *t: loss(*t).loss, fullgraph=True, backend="aot_eager")
        results = [(f, *torch.autograd.grad(f, inputs[:2])) for f in (loss(*inputs).loss, compiled(*inputs))]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_spills(architecture):
    log: list[str] = []
    source = nvrtc.flatten(nvrtc.source_folder() / "cuda" / "objective.cuh")
    nvrtc.compile_source(source, architecture, {"FASTPO_USER_FORMULA": FORMULAS[1].source}, log=log)
    assert log[0].count("0 bytes spill stores, 0 bytes spill loads") == 4, log[0]
