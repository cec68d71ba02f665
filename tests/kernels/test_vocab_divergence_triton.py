"""vocab_divergence in Triton: its kernels run in Triton's interpreter, in place of the CPU's, over the CPU's cases.

The interpreter spends its time per tile and not per element: the cases of a few long rows run with tiles larger than
those of a GPU, and those of this module, about borders, with the smallest.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from fastpo.kernels import _native
from tests.emulator.harness import in_place_of_cpu
from tests.kernels import test_vocab_divergence as cases
from tests.kernels.test_token_logprobs_triton import among_nans, vector
from tests.kernels.test_vocab_divergence import TestExtremeRows, compare, evaluate, make  # noqa: F401

pytest.importorskip("triton")
if os.environ["TRITON_INTERPRET"] != "1":
    pytest.skip("Triton compiles: TRITON_INTERPRET is not 1", allow_module_level=True)

from fastpo.kernels.triton import vocab_divergence as kernels

# what numpy says of inf - inf, and of a vector of only NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LARGE = (kernels.Forward(2048, 128), kernels.Backward(2048, 2, 128))
SMALL = (kernels.Forward(16, 128), kernels.Backward(16, 2, 128))


@contextlib.contextmanager
def interpreted(configs=LARGE) -> Iterator[Counter]:
    """Both ops on CPU tensors are the Triton kernels; counts how often each was called."""
    calls: Counter = Counter()
    functions = {
        "vocab_divergence": functools.partial(kernels.forward, config=configs[0]),
        "vocab_divergence_backward": functools.partial(kernels.backward, config=configs[1]),
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


# where fp16 takes no other path than bf16 does, and where fp32 takes none either, as the interpreter takes its time
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
one_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)


class TestPlace:
    def test_the_kernels_run(self, triton):
        evaluate(*make(2, 40))
        assert triton == {"vocab_divergence": 1, "vocab_divergence_backward": 1}

    def test_cuda_takes_it(self):
        cuda = torch.device("cuda")
        for name in ("vocab_divergence", "vocab_divergence_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpo::{name}", "CUDA")
        assert _native.why_not("vocab_divergence", cuda, torch.bfloat16) is None
        assert _native.why_not("vocab_divergence", cuda, torch.float64) == "no Triton kernel for torch.float64"

    def test_same_state_as_the_cpu_kernel(self, dtype):
        """One kernel's backward may follow the other's forward."""
        logits, reference = make(4, 1000, dtype=dtype)
        mask = torch.tensor([True, True, False, True])
        for config in (LARGE[0], SMALL[0]):
            _, state = kernels.forward(logits, reference, mask, None, 0.7, 0, 0.0, config=config)
            assert torch.equal(state[0], torch.where(mask, reference.float().amax(-1), 0))
            assert torch.equal(state[1], torch.where(mask, logits.float().amax(-1), 0))
            sums = [((t.double() - t.double().amax(-1, True)) / 0.7).exp().sum(-1)[mask] for t in (reference, logits)]
            eps = torch.finfo(torch.float32).eps
            assert torch.allclose(state[2, mask].double(), sums[0], rtol=8 * eps)
            assert torch.allclose(state[3, mask].double(), (sums[0] / sums[1]).log(), atol=8 * eps)


class TestValues(cases.TestValues):
    @pytest.mark.parametrize("vocab", [1, 2, 63, 65, 4097, 50257])
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_vocabulary_sizes(self, dtype, vocab, direction):
        super().test_vocabulary_sizes(dtype, vocab, direction)

    @pytest.mark.parametrize("rows", [0, 1, 13])
    def test_row_counts(self, dtype, rows):
        super().test_row_counts(dtype, rows)


class TestAccuracy(cases.TestAccuracy):
    # of the CPU's allocations
    test_nothing_of_the_logits_size_is_allocated = None

    @pytest.mark.parametrize("apart", [1e-5, 1e-3, 0.1])
    @pytest.mark.parametrize("vocab", [2, 65, 4097])
    def test_small_divergences(self, vocab, apart):
        super().test_small_divergences(vocab, apart)

    def test_tiles_and_merges(self):
        """Also with many steps of each accumulator, whose offsets change."""
        with interpreted(SMALL):
            super().test_small_divergences(1500, 1e-3)
            super().test_equal_streams(torch.bfloat16)


class TestLayouts(cases.TestLayouts):
    @two_dtypes
    def test_strides(self, dtype):
        """Not bitwise as on the CPU: where a row begins decides which elements are added up together."""
        for pair in self.layouts(dtype).values():
            compare(*pair)

    @two_dtypes
    def test_every_start_and_length(self, dtype):
        """Rows that begin and end anywhere in a vector of 16 bytes, alike in both streams and not."""
        e = vector(dtype)
        with interpreted(SMALL):
            for before in range(e):
                for columns in (1 + before, 2 * e + before, 33 * e + (3 * before) % e):
                    logits, reference = make(2, columns, dtype=dtype, seed=before)
                    for other in (before, (before + 1) % e):
                        compare(among_nans(logits, before, 3 + before), among_nans(reference, other, 3 + before))

    def test_which_loads_and_stores_are_vectors(self, monkeypatch):
        launched = []
        monkeypatch.setattr(kernels, "launch", lambda kernel, *_, **constants: launched.append(constants))

        def constants(logits, reference) -> tuple[bool, ...]:
            launched.clear()
            out = kernels.forward(logits, reference, None, None, 1.0, 0, 0.0)
            kernels.backward(logits, reference, out[0], *out, None, None, 1.0, 0, 0.0, True, True)
            forward, backward = launched
            return forward["EDGES"], forward["ALIKE"], backward["EDGES"], backward["P_ALIKE"], backward["Q_ALIKE"]

        for dtype in (torch.bfloat16, torch.float32):
            whole, odd = torch.zeros(2, 3, 48, dtype=dtype), torch.zeros(2, 3, 49, dtype=dtype)
            assert constants(whole, whole.clone()) == (False, True, False, True, True)
            assert constants(whole[:, :-1], whole[:, :-1].clone()) == (False, True, False, True, True)
            assert constants(odd, odd.clone()) == (True, True, True, True, True)
            assert constants(odd[:, :-1], odd[:, :-1].clone()) == (True, False, True, True, False)
            assert constants(odd[:, :-1], odd[:, 1:]) == (True, False, True, False, False)


class TestMembers(cases.TestMembers):
    # fp64, which these kernels do not serve
    test_gradcheck = None

    @pytest.mark.parametrize("apart", [1e-3, 1.0, 30.0])
    @two_dtypes
    def test_near_and_far(self, dtype, apart, member):
        super().test_near_and_far(dtype, apart, member)

    @two_dtypes
    def test_equal_streams(self, dtype, member):
        super().test_equal_streams(dtype, member)


class TestKinds(cases.TestKinds):
    test_long_vocabulary = None

    @pytest.mark.parametrize("vocab", [1, 2, 65, 4097])
    @two_dtypes
    def test_vocabulary_sizes(self, dtype, vocab, member):
        super().test_vocabulary_sizes(dtype, vocab, member)

    @one_dtype
    def test_layouts(self, dtype, member):
        super().test_layouts(dtype, member)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("which", [0, 1])
    @one_dtype
    def test_bad_row_stays_alone(self, dtype, bad, which, member):
        super().test_bad_row_stays_alone(dtype, bad, which, member)

    @two_dtypes
    def test_every_start_and_length(self, dtype, member):
        e = vector(dtype)
        with interpreted(SMALL):
            for before in range(0, e, 3):
                logits, reference = make(2, 33 * e + (3 * before) % e, dtype=dtype, seed=before)
                for other in (before, (before + 1) % e):
                    pair = among_nans(logits, before, 3 + before), among_nans(reference, other, 3 + before)
                    compare(*pair, **member)


class TestJensenShannon(cases.TestJensenShannon):
    # fp64, which these kernels do not serve
    test_given_distributions = None
    test_limits_and_symmetry = None


class TestSkew(cases.TestSkew):
    # fp64, which these kernels do not serve
    test_given_distributions = None
    test_limits = None


class TestTotalVariation(cases.TestTotalVariation):
    # fp64, which these kernels do not serve
    test_given_distributions = None


class TestAlpha(cases.TestAlpha):
    # fp64, which these kernels do not serve
    test_given_distributions = None
    test_names = None


class TestAutograd(cases.TestAutograd):
    # fp64, which these kernels do not serve
    test_gradcheck = None
    test_create_graph_through_a_network = None

    def test_batch_invariance_and_determinism(self):
        """A row's result does not depend on its neighbours or on repetition."""
        logits, reference = make(20, 777)
        whole, again = evaluate(logits, reference), evaluate(logits, reference)
        alone = evaluate(logits[12:13], reference[12:13])
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert torch.equal(whole["divergence"][12:13], alone["divergence"])


def test_opcheck():
    cases.TestCompile().test_opcheck(torch.bfloat16)
