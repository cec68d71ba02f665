"""The CUDA kernels of objective, emulated.

Over the CPU kernel's own cases as the compiled library launches them; and as Python launches them, where the emulator
knows which memory a launch may touch. Both launches are then compared with each other.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import pytest
import torch
import torch.nn.functional as F

from fastpo.kernels import _native
from fastpo.kernels.cuda import objective as launch
from fastpo.reference.registry import objective
from tests.emulator.harness import Compiled, assert_structs, compiled_launch, few_blocks
from tests.kernels import test_objective as cases
from tests.kernels.test_objective import LAYOUTS, compare, evaluate, make, random, strided
from tests.losses import test_methods as methods


class TestValues(Compiled, cases.TestValues): ...


class TestStrides(Compiled, cases.TestStrides): ...


class TestMasked(Compiled, cases.TestMasked): ...


class TestExtremeRows(Compiled, cases.TestExtremeRows): ...


class TestAutograd(Compiled, cases.TestAutograd): ...


class TestNumItems(Compiled, cases.TestNumItems): ...


class TestDeterminism(Compiled, cases.TestDeterminism): ...


class TestProperties(Compiled, cases.TestProperties): ...


class TestOps(Compiled):
    test_opcheck = cases.TestOps.test_opcheck

    def test_op_refuses_what_the_public_function_never_passes(self):
        cases.TestBadInput().test_op_refuses_what_the_public_function_never_passes()

    def test_every_method(self):
        for case, dtype in itertools.product(methods.CASES, (torch.float32, torch.float64)):
            for layout in methods.layouts(case):
                methods.compare(case, layout, 63, dtype)

    def test_the_emulator_ran(self, ops):
        """What these tests see is not the CPU kernel: there, bad boundaries raise; here they give NaN."""
        one, boundaries = torch.zeros(6), torch.tensor([0, 9, 6], dtype=torch.int32)
        streams, nothing = [one] * 4, [None, None]
        arguments = (0, streams, nothing, [boundaries] * 2, nothing, [], [0.1] * len(_native.CPU.hyper_parameters))
        loss, _, _ = torch.ops.fastpo.objective(*arguments, 0, False, 1.0)
        assert loss.isnan().all()


ROW = objective("ipo")
# around the borders of a team's vectors, of a warp's and of a block's row, and of the rows per block
SHAPES = [(1, 0), (1, 1), (3, 2), (9, 31), (7, 33), (3, 257), (2, 1023), (2, 1024), (2, 1025), (3, 2500)]
SHAPES += [(70, 5), (300, 1)]


class TestLaunchFromPython:
    """No access outside the tensors, at no shape, in no order of the threads."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_shapes(self, checked, dtype, layout):
        for i, (rows, tokens) in enumerate(SHAPES):
            pairs = (make(layout, rows, tokens, dtype, 10), make(layout, rows, max(0, tokens - i % 3), dtype, 21))
            compare(ROW, pairs, reduction=("mean", "sum", "none")[i % 3])
        kernel = "objective_f64" if dtype == torch.float64 else "objective_f32"
        assert set(checked.launched) == {kernel, "objective_sum", "objective_spread"} - (
            {"objective_spread"} if layout == "summed" and dtype != torch.bfloat16 else set()
        )

    @pytest.mark.parametrize("name", ["every other", "unaligned", "narrowed", "rows apart", "transposed"])
    def test_views(self, checked, name):
        for dtype, layout in itertools.product((torch.float32, torch.float16), LAYOUTS):
            pairs = make(layout, 5, 37, dtype, 10, length_norm=True), make(layout, 5, 41, dtype, 21, length_norm=True)
            compare(ROW, tuple(strided(side, name) for side in pairs), length_norm=True)

    def test_more_rows_than_blocks(self, checked, monkeypatch):
        """Blocks go on to further rows: shown with few blocks, as the real limit takes millions of rows."""
        rows, tokens = 700, 3

        pairs = make("padded masked", rows, tokens, torch.float32, 1), make("packed", rows, tokens, torch.float32, 2)
        singles = make("summed", rows, 1, torch.float32, 1), make("summed", rows, 1, torch.float32, 2)
        monkeypatch.setattr(launch, "objective_shape", few_blocks(launch.objective_shape))
        monkeypatch.setattr(launch, "spread_shape", few_blocks(launch.spread_shape))
        compare(ROW, pairs)
        compare(ROW, singles)

    @pytest.mark.parametrize(
        "bad", [[0, 9, 6], [0, -1, 6], [3, 2, 6], [2, 4, 6], [0, 4, 2_000_000_000], [-5, 0, 6], [0, 3, -2]]
    )
    def test_bad_boundaries_read_nothing(self, checked, bad):
        """A device cannot raise: the rows concerned are NaN, and nothing outside the tensor is touched."""
        values, boundaries = torch.ones(6), torch.tensor(bad, dtype=torch.int32)
        nothing = [None, None]
        arguments = ([values] * 4, nothing, [boundaries] * 2)
        hyper = [0.1] * len(_native.CPU.hyper_parameters)
        loss, slopes, _ = torch.ops.fastpo.objective(0, *arguments, nothing, [], hyper, 0, False, 1.0)
        inside = [0 <= a <= b <= 6 and (i > 0 or a == 0) for i, (a, b) in enumerate(itertools.pairwise(bad))]
        assert loss.isnan().tolist() == [not ok for ok in inside]
        grads = torch.ops.fastpo.objective_backward(torch.ones(2), slopes, [values] * 2, *arguments[1:], 3)
        held = torch.zeros(6, dtype=torch.bool)
        for ok, (a, b) in zip(inside, itertools.pairwise(bad), strict=True):
            held[a:b] |= ok
        assert all((g[~held] == 0).all() and g.isfinite().all() for g in grads)

    def test_masked_tokens_of_a_nan_row(self, checked):
        """Selected, not multiplied: their gradient is 0 whatever the row's is."""
        values, mask = torch.ones(3, 40), torch.arange(120).view(3, 40) % 3 == 0
        slopes = torch.full((1, 3), torch.nan)
        (grad,) = torch.ops.fastpo.objective_backward(torch.tensor(1.0), slopes, [values], [mask], [None], 1)
        assert (grad[~mask] == 0).all() and grad[mask].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounding_of_gradients(self, checked, dtype):
        """As torch rounds: every exponent, ties, subnormals, overflow, both zeros, infinities, NaN of any payload."""
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator)
        # many of them halfway between two numbers of 8 or 11 bits, or one bit off
        low = torch.tensor([0x0000, 0x8000, 0x7FFF, 0x8001, 0x1000, 0x0FFF, 0x1001])
        bits[::2] = bits[::2] & ~0xFFFF | low[torch.randint(len(low), (10_000,), generator=generator)]
        special = [0x7F800000, -0x800000, 0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0, -(2**31), 0x477FEFFF, 0x477FF000]
        bits[: len(special)] = torch.tensor(special)
        slopes = bits.to(torch.int32).view(torch.float32)
        values = torch.zeros(len(slopes), 1, dtype=dtype)
        (grad,) = torch.ops.fastpo.objective_backward(torch.tensor(1.0), slopes[None], [values], [None], [None], 1)
        want = slopes.to(dtype)
        assert torch.equal(grad[:, 0].isnan(), want.isnan())
        here = ~want.isnan()
        assert torch.equal(grad[here, 0].view(torch.int16), want[here].view(torch.int16))

    def test_more_blocks_than_the_sum_has_threads(self, checked):
        rows = 256 * 700 + 3
        chosen, zero = random(rows, seed=1), torch.zeros(rows)
        arguments = ([chosen, zero, zero, zero], *[[None, None]] * 3, [], [0.1] * len(_native.CPU.hyper_parameters))
        loss, _, _ = torch.ops.fastpo.objective(0, *arguments, 0, True, float(rows))
        assert loss.item() == pytest.approx(-F.logsigmoid(0.1 * chosen.double()).mean().item(), rel=1e-6)

    @pytest.mark.parametrize("length_norm", [False, True])
    def test_equals_the_compiled_launch(self, checked, ops, length_norm):
        for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.float64, torch.bfloat16)):
            pairs = make(layout, 40, 50, dtype, 3, length_norm), make(layout, 40, 44, dtype, 6, length_norm)
            for reduction in ("mean", "none"):
                ours = evaluate(ROW, pairs, length_norm=length_norm, reduction=reduction)
                with compiled_launch(ops):
                    theirs = evaluate(ROW, pairs, length_norm=length_norm, reduction=reduction)
                assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Memory that takes room only where it is touched, page by page."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Captured:
    """A `Launcher` that keeps the arguments."""

    def __init__(self):
        self.arguments: dict[str, list[ctypes.Structure]] = {}

    def launch(self, kernel, blocks, threads, arguments, *, reads, writes):
        self.arguments[kernel] = arguments


class TestLargeTensors:
    """Offsets past 2^31: the block with the last rows alone is run, on memory that is mapped but hardly touched."""

    @pytest.fixture
    def small(self) -> dict[str, list[ctypes.Structure]]:
        captured, two, nothing = Captured(), torch.zeros(2, 2, dtype=torch.float16), [None, None]
        hyper = [0.5] * len(_native.CPU.hyper_parameters)
        dpo = _native.CPU.formulas["dpo"]
        launch.forward(captured, dpo, [two] * 4, nothing, nothing, nothing, [], hyper, 0, False, 1.0, 0.5)
        launch.backward(captured, torch.tensor(2.0), torch.zeros(2, 2), [two] * 2, nothing, nothing, 3)
        return captured.arguments

    @pytest.fixture(autouse=True)
    def few_blocks(self, emulator):
        yield
        emulator.blocks = []

    def forward(self, emulator, small, rows: int, tokens: int, streams: list[torch.Tensor]) -> float:
        """Loss of the last row."""
        (o, _) = small["objective_f32"]
        shape = launch.objective_shape(rows, tokens, 4)
        loss, slopes = zeros(rows, dtype=torch.float32), zeros(2, rows, dtype=torch.float32)
        o.rows, o.loss, o.slopes, o.rewards = rows, loss.data_ptr(), slopes.data_ptr(), slopes.data_ptr()
        for i, s in enumerate(streams):
            o.stream[i].data, o.stream[i].row_stride = s.data_ptr(), s.stride(0)
            o.layouts[i % 2].tokens = tokens
        emulator.blocks = [(rows - 1) // shape.rows % shape.blocks]
        emulator.launch("objective_f32", shape.blocks, shape.threads, [o, shape], reads=streams, writes=[loss, slopes])
        return loss[-1].item()

    def test_rows(self, emulator, small):
        rows = 2**31 + 5
        stream, other = zeros(rows), zeros(rows)
        stream[-1] = 2.0
        loss = self.forward(emulator, small, rows, 1, [stream, other, other, other])
        assert loss == pytest.approx(math.log1p(math.exp(-1)))

    @pytest.mark.parametrize("tokens", [600, 1500])
    def test_row_strides(self, emulator, small, tokens):
        stride, rows = 2**30 + 8, 3
        stream = zeros(2 * stride + tokens).as_strided((rows, tokens), (stride, 1))
        stream[-1] = 2.0 / tokens
        other = zeros(rows, tokens)
        loss = self.forward(emulator, small, rows, tokens, [stream, other, other, other])
        assert loss == pytest.approx(math.log1p(math.exp(-1)), rel=1e-3)

    def test_elements(self, emulator, small):
        rows, tokens = 2**22, 600
        stream, other = zeros(rows, tokens), zeros(rows, tokens)
        stream[-1, 0] = 2.0
        loss = self.forward(emulator, small, rows, tokens, [stream, other, other, other])
        assert loss == pytest.approx(math.log1p(math.exp(-1)))

    def test_gradient(self, emulator, small):
        rows, tokens = 2**22, 600
        (arguments, _) = small["objective_spread"]
        grad, slopes, out = (
            torch.tensor(2.0),
            zeros(2, rows, dtype=torch.float32),
            [zeros(rows, tokens) for _ in range(2)],
        )
        slopes[:, -1] = torch.tensor([0.25, -0.5])
        for side in range(2):
            s = arguments.side[side]
            s.rows, s.layout.tokens, s.layout.mask_stride, s.layout.total = rows, tokens, tokens, rows * tokens
            s.grad, s.slopes, s.gradient = grad.data_ptr(), slopes[side].data_ptr(), out[side].data_ptr()
        shape = launch.spread_shape(2 * rows, tokens)
        emulator.blocks = sorted({(side * rows + rows - 1) // shape.rows % shape.blocks for side in range(2)})
        emulator.launch(
            "objective_spread", shape.blocks, shape.threads, [arguments, shape], reads=[grad, slopes], writes=out
        )
        assert (out[0][-1] == 0.5).all() and (out[1][-1] == -1.0).all() and (out[0][-2] == 0).all()


class TestShapes:
    """The launch from Python restates structs and grids of the C++ side."""

    def test_structs(self, exports):
        structs = ("Layout", "Stream", "Objective", "Spread", "LossSum", "Shape", "SpreadSides")
        assert_structs(exports.fastpo_struct_size, *(getattr(launch, name) for name in structs))

    def test_grids(self, exports):
        out = (ctypes.c_longlong * 4)()
        sizes = [0, 1, 2, 31, 32, 33, 1000, 1023, 1024, 1025, 4096, 65_535, 65_536, 2**20, 2**22 + 1, 2**31, 2**33 + 7]
        for rows, tokens in itertools.product(sizes, sizes):
            for streams in range(1, 7):
                exports.fastpo_objective_shape(ctypes.c_longlong(rows), ctypes.c_longlong(tokens), streams, out)
                s = launch.objective_shape(rows, tokens, streams)
                assert list(out) == [s.blocks, s.threads, s.team, s.rows], (rows, tokens, streams)
                assert 1 <= s.blocks < 2**31 and s.threads % 32 == 0 and s.threads <= 512
            exports.fastpo_spread_shape(ctypes.c_longlong(rows), ctypes.c_longlong(tokens), out)
            s = launch.spread_shape(rows, tokens)
            assert list(out) == [s.blocks, s.threads, s.team, s.rows], (rows, tokens)
