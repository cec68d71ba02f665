"""token_logprobs in Triton: its kernels run in Triton's interpreter, in place of the CPU's, over the CPU's cases.

The interpreter spends its time per tile and not per element: the cases of a few long rows run with tiles larger than
those of a GPU, and those of this module, about borders, with the smallest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import _native
from fastpo.kernels.token_logprobs import STATISTICS
from tests.emulator.harness import in_place_of_cpu
from tests.kernels import test_token_logprobs as cases
from tests.kernels.test_token_logprobs import TestExtremeRows, compare, evaluate, make  # noqa: F401

pytest.importorskip("triton")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton compiles: TRITON_INTERPRET is not 1", allow_module_level=True)

from fastpo.kernels.triton import token_logprobs as kernels

# what numpy says of inf - inf, and of a vector of only NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LARGE = (kernels.Forward(2048, 1, 4), kernels.Backward(2048, 2, 4))
SMALL = (kernels.Forward(16, 1, 4), kernels.Backward(16, 2, 4))


@contextlib.contextmanager
def interpreted(configs=LARGE, parts: int | None = None) -> Iterator[Counter]:
    """The three ops on CPU tensors are the Triton kernels; counts how often each was called."""
    calls: Counter = Counter()
    functions = {
        "token_logprobs": functools.partial(kernels.forward, config=configs[0], parts=parts),
        "token_logprobs_backward": functools.partial(kernels.backward, config=configs[1]),
        "token_logprobs_backward_": functools.partial(kernels.backward_inplace, config=configs[1]),
    }

    def counted(name):
        def call(*args):
            calls[name] += 1
            return functions[name](*args)

        return call

    with in_place_of_cpu({name: counted(name) for name in functions}):
        yield calls


@pytest.fixture(autouse=True)
def triton() -> Iterator[Counter]:
    with interpreted() as calls:
        yield calls


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


# where fp16 takes no other path than bf16 does
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def among_nans(rows: Tensor, before: int, after: int) -> Tensor:
    """The rows as a view of a buffer that holds NaN between them: reading outside a row shows."""
    buffer = torch.full((len(rows), before + rows.shape[1] + after), torch.nan, dtype=rows.dtype)
    view = buffer[:, before : before + rows.shape[1]]
    view.copy_(rows)
    return view


class TestPlace:
    def test_the_kernels_run_and_go(self, triton):
        logits, targets = make(2, 40)
        ours = evaluate(logits, targets)
        assert triton == {"token_logprobs": 1, "token_logprobs_backward": 1}
        cases.TestInplaceBackward().run(logits, targets, inplace=True)
        assert triton == {"token_logprobs": 2, "token_logprobs_backward": 1, "token_logprobs_backward_": 1}
        with interpreted(SMALL) as inner:
            evaluate(logits, targets)
        assert inner.total() == 2 and triton.total() == 4
        assert set(ours) == {"logprobs", "grad", *STATISTICS}

    def test_the_cpu_kernel_comes_back(self):
        """In a process of its own, where nothing else replaces it."""
        code = (
            "import torch, fastpo\n"
            "from tests.kernels.test_token_logprobs_triton import interpreted\n"
            "x, y = torch.full((1, 300), 1e4), torch.tensor([400])\n"
            "with interpreted() as calls: assert fastpo.token_logprobs(x, y).isnan()\n"
            "try: fastpo.token_logprobs(x, y)\n"
            "except IndexError: assert calls.total() == 1; print('back')"
        )
        root = Path(__file__).parents[2]
        out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert out.stdout == "back\n", out.stderr

    def test_cuda_takes_it(self, monkeypatch):
        cuda = torch.device("cuda")
        for name in ("token_logprobs", "token_logprobs_backward", "token_logprobs_backward_"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpo::{name}", "CUDA")
        assert _native.why_not("token_logprobs", cuda, torch.bfloat16) is None
        assert _native.why_not("token_logprobs", cuda, torch.float64) == "no Triton kernel for torch.float64"
        # not by its dotted name, which is the function of the same name
        monkeypatch.setattr(_native, "_HAS_TRITON", False)
        assert _native.why_not("token_logprobs", cuda, torch.bfloat16) == "Triton is not installed"

    def test_same_state_as_the_cpu_kernel(self, dtype):
        """One kernel's backward may follow the other's forward."""
        logits, targets = make(4, 1000, dtype=dtype, ids=2)
        targets[2] = -100
        logits[1] = -torch.inf
        _, ours, *_ = kernels.forward(logits, targets, None, 0.7, -100, 0, config=LARGE[0])
        again = kernels.forward(logits, targets, torch.full((4,), 0.7), 1.0, -100, 0, config=SMALL[0], parts=3)[1]
        top = logits.float().amax(-1)
        assert torch.equal(ours[0], torch.where(torch.tensor([True, True, False, True]), top, 0))
        assert torch.equal(ours[0], again[0]) and torch.equal(ours[1, 1:3], torch.zeros(2))
        total = ((logits.double() - top.double()[:, None]) / 0.7).exp().sum(-1)[[0, 3]]
        for state in (ours, again):
            assert torch.allclose(state[1, [0, 3]].double(), total, rtol=8 * torch.finfo(torch.float32).eps)


class TestValues(cases.TestValues):
    @pytest.mark.parametrize("rows", [0, 1, 2, 13])
    def test_row_counts(self, dtype, rows):
        super().test_row_counts(dtype, rows)


class TestLayouts(cases.TestLayouts):
    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_strides(self, dtype):
        """Not bitwise as on the CPU: where a row begins decides which elements are added up together."""
        for name, logits in self.layouts(dtype).items():
            targets = torch.arange(logits.shape[:-1].numel()).view(logits.shape[:-1]) % logits.shape[-1]
            ours = compare(logits, targets)
            assert ours["grad"].shape == logits.shape, name

    @two_dtypes
    def test_every_start_and_length(self, dtype):
        """Rows that begin and end anywhere in a vector of 16 bytes, shorter than one and longer than a tile."""
        e = vector(dtype)
        with interpreted(SMALL):
            for before in range(e):
                for columns in (1 + before, 2 * e + before, 17 * e - 1 - before, 33 * e + (3 * before) % e):
                    # row strides of e more or less than a multiple of e, so that each row begins elsewhere
                    logits = among_nans(make(2, columns, dtype=dtype, seed=before)[0], before, 3 + before)
                    compare(logits, torch.tensor([0, columns - 1]))

    @two_dtypes
    def test_inplace_leaves_what_is_outside(self, dtype):
        e = vector(dtype)
        with interpreted(SMALL):
            for before in range(e):
                rows, targets = make(3, 20 * e + 3, dtype=dtype, ids=2)
                view = among_nans(rows, before, 1)
                out = kernels.forward(view, targets, None, 0.7, -100, 1)
                upstream = (torch.ones(3, 2), torch.ones(3), None)
                expected = kernels.backward(view, targets, out[1], out[2], None, 0.7, -100, *upstream)
                torch.ops.fastpo.token_logprobs_backward_(view, targets, out[1], out[2], None, 0.7, -100, *upstream)
                assert torch.equal(view, expected)
                buffer = view._base
                assert buffer[:, :before].isnan().all() and buffer[:, before + rows.shape[1] :].isnan().all()

    def test_storage_that_is_not_aligned(self, dtype):
        """No aligned place below the first row: correct, if slower."""
        numbers = make(1, 3 * 41 + 1, dtype=dtype)[0]
        memory = np.frombuffer(numbers.view(torch.uint8).numpy().tobytes() + bytes(64), dtype=np.uint8)
        start = next(i for i in range(16) if (memory.ctypes.data + i) % 16 == dtype.itemsize)
        moved = np.concatenate([np.zeros(start, np.uint8), memory])[:]
        start += (dtype.itemsize - (moved.ctypes.data + start)) % 16
        moved[start : start + 3 * 41 * dtype.itemsize] = memory[: 3 * 41 * dtype.itemsize]
        logits = torch.from_numpy(moved[start : start + 3 * 41 * dtype.itemsize]).view(dtype).view(3, 41)
        assert logits.data_ptr() % 16 == dtype.itemsize and logits.storage_offset() == 0
        compare(logits, torch.tensor([0, 7, 40]))

    def test_which_loads_and_stores_are_vectors(self, monkeypatch):
        """EDGES only where a row begins or ends inside a vector; ALIKE unless the gradient begins elsewhere in one."""
        launched = []
        monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **constants: launched.append(constants))

        def constants(logits: Tensor, inplace: bool = False) -> tuple[bool, ...]:
            launched.clear()
            targets = torch.zeros(*logits.shape[:-1], 1, dtype=torch.int64)
            function = kernels.backward_inplace if inplace else kernels.backward
            kernels.forward(logits, targets, None, 1.0, -100, 0)
            function(logits, targets, torch.zeros(2, targets.numel()), None, None, 1.0, -100, None, None, None)
            forward, backward = launched
            return forward["EDGES"], backward["EDGES"], backward["ALIKE"]

        for dtype in (torch.bfloat16, torch.float32):
            whole, odd = torch.zeros(2, 3, 48, dtype=dtype), torch.zeros(2, 3, 49, dtype=dtype)
            assert constants(whole) == (False, False, True)
            assert constants(whole[:, :-1]) == (False, False, True)
            assert constants(odd) == constants(odd[0]) == (True, True, True)
            assert constants(odd[:, :-1]) == (True, True, False)
            assert constants(odd[:, :-1], inplace=True) == (True, True, True)
            assert constants(odd[..., 1:]) == (True, False, False)
            assert constants(whole[..., 8:]) == (False, False, True)
            assert constants(whole[..., 1:], inplace=True) == (True, True, True)
            # one row: its stride is nothing to go by
            assert constants(odd[:1, :1, :48]) == (False, False, True)

    def test_layouts_that_are_read_where_they_are(self):
        base = torch.zeros(2, 3, 4, 48)
        for view in (
            base,
            base[:, :, :-1],
            base[:, 1],
            base[1:, :, 2:, 5:],
            base.expand(5, 2, 3, 4, 48)[0],
            base[0, 0, 0],
        ):
            assert kernels.rows_of(view) is not None
        for view in (base[..., ::2], base[:, :-1, :-1], base.movedim(-1, 0).contiguous().movedim(0, -1)):
            assert kernels.rows_of(view) is None


class TestBorders:
    @two_dtypes
    def test_ids_everywhere(self, dtype):
        """At both ends of every tile, chunk and edge, several times, and among ignored ones."""
        e = vector(dtype)
        tile, columns = 16 * e, 16 * e * 5 + 2 * e + 3
        for before in (0, 3):
            head = -before % e
            borders = [head + tile * n + d for n in range(6) for d in (-1, 0, 1)]
            borders += [0, 1, head + e, columns - 4, columns - 3, columns - 1, columns - 1]
            ids = sorted(c for c in borders if 0 <= c < columns)
            targets = torch.tensor([ids, ids[::-1], [7] * len(ids), [-100] * len(ids)])
            targets[1, ::2] = -100
            logits = among_nans(make(4, columns, dtype=dtype)[0], before, e - before + 1)
            with interpreted(SMALL):
                compare(logits, targets)
                # an id of the vocabulary is ignored
                compare(logits[2:], targets[[0, 2]], ignore_index=7)

    def test_ignore_index_beyond_32_bits(self):
        logits, targets = make(3, 40)
        targets[1] = 2**40
        assert evaluate(logits, targets, ignore_index=2**40)["top1"][1] == -1
        # no 32-bit id is that, though its lower 32 bits are 0
        narrow = torch.zeros(3, dtype=torch.int32)
        ours, plain = evaluate(logits, narrow, ignore_index=2**40), evaluate(logits, narrow)
        assert all(torch.equal(ours[name], plain[name]) for name in plain)

    def test_no_ids(self):
        """Rows that ask for nothing are ignored rows."""
        logits, targets = make(3, 40)
        ours = evaluate(logits, targets[:, None][:, :0])
        assert ours["logprobs"].shape == (3, 0) and (ours["top1"] == -1).all()
        assert not ours["entropy"].any() and not ours["grad"].any()

    def test_id_out_of_range(self, dtype):
        """NaN in its place, and nothing is read there."""
        logits, targets = make(3, 40, dtype=dtype, ids=2)
        clean = evaluate(logits, targets)
        for bad in (40, -1, 2**31, 2**40, -(2**62)):
            wrong = targets.clone()
            wrong[1, 1] = bad
            ours = evaluate(logits, wrong)
            assert ours["logprobs"][1].isnan().tolist() == [False, True]
            for name, value in ours.items():
                if name != "logprobs":
                    assert torch.equal(value[[0, 2]], clean[name][[0, 2]]), name

    @two_dtypes
    @pytest.mark.parametrize("parts", [1, 3])
    def test_top1_among_equals(self, dtype, parts):
        """The lowest of equal maxima, wherever in edges, vectors, tiles and parts they are."""
        e = vector(dtype)
        generator = torch.Generator().manual_seed(0)
        with interpreted(SMALL, parts):
            for before in (0, 1, e - 1):
                for columns in (e - 1, 5 * e + 1, 60 * e + e - 1):
                    rows = torch.randint(0, 4, (3, columns), generator=generator).to(dtype)
                    # the maximum only at the end, and at both ends
                    rows[1] = torch.where(torch.arange(columns) < columns - 2, rows[1], 9)
                    rows[2, [0, -1]] = 9
                    logits = among_nans(rows, before, 1)
                    top1 = fastpo.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), stats=("top1",)).top1
                    assert np.array_equal(top1.numpy(), rows.float().numpy().argmax(-1))

    def test_lowest_finite_numbers(self):
        """The least float is a number: a row of it alone, and one whose other entries are -inf."""
        least = torch.finfo(torch.float32).min
        logits = torch.full((2, 50), least)
        logits[1] = -torch.inf
        logits[1, [20, 30]] = least
        ours = evaluate(logits, torch.tensor([3, 20]))
        assert ours["top1"].tolist() == [0, 20]
        assert torch.allclose(ours["logprobs"], -torch.tensor([50.0, 2.0]).log())
        assert torch.allclose(ours["entropy"], -ours["logprobs"])


class TestParts:
    @two_dtypes
    @pytest.mark.parametrize("parts", [2, 7])
    def test_values(self, dtype, parts):
        e = vector(dtype)
        with interpreted(SMALL, parts):
            for columns in (5, 33 * e + 3, 120 * e):
                logits, targets = make(3, columns, dtype=dtype, ids=2)
                targets[1] = -100
                compare(among_nans(logits, 1, 2), targets, temperature=torch.tensor([0.5, 1.0, 2.0]))

    @two_dtypes
    def test_part_without_a_finite_logit(self, dtype):
        logits, targets = make(2, 100 * vector(dtype), dtype=dtype)
        logits[:, 10:-10] = -torch.inf
        targets[:] = 3
        with interpreted(SMALL, 5):
            compare(logits, targets)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
    def test_bad_rows(self, bad):
        for column in (0, 700):
            logits, targets = make(3, 720, dtype=torch.bfloat16)
            with interpreted(SMALL, 4):
                clean = evaluate(logits, targets)
                if bad is None:
                    logits[1] = -torch.inf
                else:
                    logits[1, column], logits[1, 300] = bad, torch.inf
                ours, reference = evaluate(logits, targets), evaluate(logits, targets, "reference")
            for name, value in ours.items():
                assert torch.equal(value[[0, 2]], clean[name][[0, 2]]), name
            for name in ("logsumexp", "top1"):
                assert torch.equal(ours[name][1].nan_to_num(7), reference[name][1].nan_to_num(7)), name
            assert ours["logprobs"][1].isnan() and ours["entropy"][1].isnan() and ours["grad"][1].isnan().all()

    def test_how_many(self):
        count = kernels.parts_of_a_row
        tile = kernels.FORWARD_CONFIGS[0].tile
        # a device that the rows fill is not given more programs
        assert count(100_000, 20_000, 132, tile) == 1 and count(2112, 20_000, 132, tile) == 1
        # no part is shorter than a few tiles
        assert count(1, 4 * tile, 132, tile) == 1 and count(1, 8 * tile, 132, tile) == 2
        for rows in (0, 1, 2, 64, 500, 2000):
            for vectors in (1, 500, 6283, 19_000, 10**6):
                parts = count(rows, vectors, 132, tile)
                assert 1 <= parts <= 128 and (parts == 1 or vectors >= 4 * tile * parts)
                assert parts == 1 or rows * (parts - 1) < 16 * 132
        assert count(8, 19_000, 132, tile) == 18
        assert count(500, 19_000, 132, tile) == 5

    def test_none_on_its_own(self):
        """Without a count, as the ops are called: the interpreter stands for one multiprocessor."""
        logits, targets = make(1, 16 * 4 * 2 * 4)
        with interpreted(SMALL) as calls:
            whole = evaluate(logits, targets)
        with interpreted(SMALL, 2):
            two = evaluate(logits, targets)
        assert calls.total() == 2
        assert torch.equal(whole["logprobs"], two["logprobs"])


class TestAutograd(cases.TestAutograd):
    # fp64, which these kernels do not serve
    test_gradcheck = None
    test_create_graph_through_a_network = None

    def test_batch_invariance_and_determinism(self):
        """A row's result does not depend on its neighbours or on repetition."""
        logits, targets = make(20, 777)
        whole, again = evaluate(logits, targets), evaluate(logits, targets)
        alone = evaluate(logits[12:13], targets[12:13], stats=("entropy",))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert torch.equal(whole["logprobs"][12:13], alone["logprobs"])
        assert torch.equal(whole["entropy"][12:13], alone["entropy"])

    def test_statistics_do_not_change_each_other(self, dtype):
        """Each combination is a kernel of its own."""
        logits, targets = make(2, 301, dtype=dtype)
        every = kernels.forward(logits, targets[:, None], None, 0.7, -100, 15)
        for stats in range(16):
            some = kernels.forward(logits, targets[:, None], None, 0.7, -100, stats)
            for i, value in enumerate(some):
                if i < 2 or stats >> (i - 2) & 1:
                    assert torch.equal(value, every[i]), (stats, i)
                else:
                    assert value.numel() == 0


class TestInplaceBackward(cases.TestInplaceBackward):
    pass


class TestAllowed(cases.TestAllowed):
    # fp64, which these kernels do not serve; and a trace, in which the ops would have to be there
    test_gradcheck = None
    test_compiled = None

    @pytest.mark.parametrize("vocab", [1, 33, 1000, 8225])
    def test_values(self, dtype, vocab):
        super().test_values(dtype, vocab, 0.4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_layouts(self, dtype):
        super().test_layouts(dtype)

    def test_opcheck(self):
        super().test_opcheck(torch.bfloat16)

    def test_empty_set(self, dtype):
        """NaN in its row alone, and the gradient 0, since nobody looks at the values."""
        logits, targets = make(3, 100, dtype=dtype)
        words = torch.full((3, 4), -1, dtype=torch.int32)
        clean = evaluate(logits, targets, allowed=words)
        words[1] = torch.tensor([0, 0, 0, -1 << 4])
        ours = evaluate(logits, targets, allowed=words)
        for name in ("logprobs", "entropy"):
            assert ours[name].isnan().tolist() == [False, True, False]
        assert not ours["grad"][1].any()
        assert all(torch.equal(value[[0, 2]], clean[name][[0, 2]]) for name, value in ours.items())

    @two_dtypes
    @pytest.mark.parametrize("parts", [1, 3])
    def test_every_start(self, dtype, parts):
        """Where rows begin inside a vector, one vector's bits are in two words."""
        e = vector(dtype)
        with interpreted(SMALL, parts):
            for before in range(0, e, 1 if e == 4 else 3):
                for columns in (1 + before, 35 * e + (3 * before) % e):
                    logits, targets = make(2, columns, dtype=dtype, ids=2, seed=before)
                    targets[:, 0] = torch.tensor([0, columns - 1])
                    logits, words, _ = cases.allow(logits, targets)
                    compare(among_nans(logits, before, 3 + before), targets, allowed=words)

    @two_dtypes
    def test_top1_among_equals(self, dtype):
        """The lowest of equal maxima that are allowed, in edges and vectors, where others are larger."""
        e, g = vector(dtype), torch.Generator().manual_seed(0)
        with interpreted(SMALL, 2):
            for before in (0, e - 1):
                columns = 40 * e + e - 1
                rows = torch.randint(0, 4, (4, columns), generator=g).to(dtype)
                mask = torch.rand(4, columns, generator=g) < 0.2
                mask[:, 5] = True
                rows[~mask] += 5
                targets = torch.full((4,), 5)
                words = fastpo.pack_allowed(mask)
                out = fastpo.token_logprobs(among_nans(rows, before, 1), targets, stats=("top1",), allowed=words)
                assert np.array_equal(out.top1.numpy(), torch.where(mask, rows, -1).float().numpy().argmax(-1))


def test_opcheck():
    cases.TestCompile().test_opcheck(torch.bfloat16)
