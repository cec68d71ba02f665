"""Packed sets of tokens, against bits counted one by one, and the top-p set against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import allowed as module
from fastpo.reference import vocabulary

SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 1000]


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.4


class TestPacking:
    @pytest.mark.parametrize("size", SIZES)
    def test_bit_by_bit(self, size):
        mask = random_mask(3, 2, size)
        words = fastpo.pack_allowed(mask)
        assert words.dtype == torch.int32 and words.shape == (3, 2, -(-size // 32))
        for row, packed in zip(mask.view(6, size).tolist(), words.view(6, -1).tolist(), strict=True):
            for v, wanted in enumerate(row):
                assert (packed[v // 32] & 0xFFFFFFFF) >> v % 32 & 1 == wanted
            assert sum((w & 0xFFFFFFFF).bit_count() for w in packed) == sum(row)

    @pytest.mark.parametrize("size", SIZES)
    def test_there_and_back(self, size):
        mask = random_mask(4, size)
        words = fastpo.pack_allowed(mask)
        assert torch.equal(fastpo.unpack_allowed(words, size), mask)
        assert torch.equal(fastpo.pack_allowed(mask.t().contiguous().t()), words)
        assert torch.equal(fastpo.pack_allowed(mask[0]), words[0])
        assert torch.equal(fastpo.unpack_allowed(words & ~words, size), torch.zeros_like(mask))

    @pytest.mark.parametrize("size", SIZES)
    def test_counts(self, size):
        """Whatever the bits behind the vocabulary are."""
        mask = random_mask(5, size)
        mask[1], mask[2] = False, True
        if size:
            mask[3] = torch.arange(size) == size - 1
            mask[4] = torch.arange(size) == 0
        words = fastpo.pack_allowed(mask)
        if size % 32:
            words[..., -1] |= -1 << size % 32
        assert torch.equal(vocabulary.any_allowed(words, size), mask.any(-1))
        assert torch.equal(vocabulary.count_allowed(words, size), mask.sum(-1))
        if size:
            ids = torch.randint(size, (5, 7), generator=torch.Generator().manual_seed(0))
            assert torch.equal(vocabulary.are_allowed(words, ids), mask.gather(1, ids))
            assert torch.equal(vocabulary.are_allowed(words[0], ids), mask[0][ids])

    def test_messages(self):
        with pytest.raises(TypeError, match="mask must have dtype bool, got int64"):
            fastpo.pack_allowed(torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="mask must have a vocabulary dimension"):
            fastpo.pack_allowed(torch.tensor(True))
        words = torch.zeros(2, 3, dtype=torch.int32)
        with pytest.raises(TypeError, match="allowed must have dtype int32, got int64"):
            fastpo.unpack_allowed(words.long(), 90)
        with pytest.raises(TypeError, match="vocab_size must be an int, got float"):
            fastpo.unpack_allowed(words, 90.0)
        for size in (64, 97, -1):
            with pytest.raises(ValueError, match=r"allowed has shape \(2, 3\), expected \(\.\.\., "):
                fastpo.unpack_allowed(words, size)


def by_definition(logits: Tensor, top_p: float, least: int = 1) -> Tensor:
    """Tokens in descending order, the lower id of equals first, until they have enough."""
    rows = []
    for row in logits.double().numpy().astype(np.longdouble):
        p = np.exp(row - row.max())
        p /= p.sum()
        order = sorted(range(len(row)), key=lambda v: (-row[v], v))
        kept, total = [], np.longdouble(0)
        for v in order:
            if total >= top_p and len(kept) >= least:
                break
            kept.append(v)
            total += p[v]
        rows.append([v in kept for v in range(len(row))])
    return torch.tensor(rows)


class TestTopP:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
    def test_definition(self, dtype, top_p, monkeypatch):
        logits = (torch.randn(7, 200, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        want = by_definition(logits, top_p)
        found = fastpo.top_p_allowed(logits, top_p)
        assert torch.equal(fastpo.unpack_allowed(found, 200), want)
        monkeypatch.setattr(module, "_AT_ONCE", 450)
        assert torch.equal(fastpo.top_p_allowed(logits.view(7, 1, 200), top_p)[:, 0], found)
        least = fastpo.unpack_allowed(fastpo.top_p_allowed(logits, top_p, min_tokens=20), 200)
        assert torch.equal(least, by_definition(logits, top_p, 20)) and (least.sum(-1) >= 20).all()

    def test_exact_borders(self):
        """Probabilities that are powers of two: the sum reaches top_p with no rounding; ties by index."""
        logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
        for top_p, want in ((0.5, [1]), (0.501, [0, 1]), (0.75, [0, 1]), (0.876, [0, 1, 2, 3]), (0.8, [0, 1, 2])):
            assert fastpo.unpack_allowed(fastpo.top_p_allowed(logits, top_p), 4)[0].nonzero()[:, 0].tolist() == want
        even = fastpo.top_p_allowed(torch.zeros(64), 0.25)
        assert even.tolist() == [0xFFFF, 0]

    def test_everything(self):
        """1 allows what is possible, however little it has."""
        logits = torch.tensor([0.0, -200.0, -math.inf, -1e30])
        assert fastpo.top_p_allowed(logits, 1).tolist() == [0b1011]
        assert fastpo.top_p_allowed(logits, 1, min_tokens=9).tolist() == [0b1111]

    def test_always(self):
        logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
        call = fastpo.top_p_allowed
        assert call(logits, 0.9, always=[3]).tolist() == [[0b1001], [0b1010], [0b1100]]
        assert call(logits, 0.9, always=()).tolist() == [[1], [2], [4]]
        own = torch.tensor([1, -100, 2])
        assert call(logits, 0.9, always=own).tolist() == [[0b11], [0b10], [0b100]]
        several = torch.tensor([[1, 2], [-100, -100], [3, -100]], dtype=torch.int32)
        assert call(logits, 0.9, always=several).tolist() == [[0b111], [0b10], [0b1100]]
        assert call(logits[0], 0.9, always=torch.tensor(3)).tolist() == [0b1001]

    def test_nlpo(self):
        """A sampled token keeps its log-prob under the stored set, and is lost under a new one without `always`."""
        g = torch.Generator().manual_seed(0)
        lagged, policy = torch.randn(2, 6, 50, generator=g)
        stored = fastpo.top_p_allowed(lagged, 0.5)
        among = fastpo.unpack_allowed(stored, 50)
        sampled = torch.multinomial(torch.where(among, policy.exp(), 0), 1, generator=g)[:, 0]
        old = fastpo.token_logprobs(policy, sampled, allowed=stored)
        masked = policy.masked_fill(~among, -math.inf).double().log_softmax(-1)
        torch.testing.assert_close(old.double(), masked.gather(1, sampled[:, None])[:, 0], rtol=1e-6, atol=1e-6)
        fresh = -lagged
        lost = fastpo.token_logprobs(policy, sampled, allowed=fastpo.top_p_allowed(fresh, 0.1))
        kept = fastpo.token_logprobs(policy, sampled, allowed=fastpo.top_p_allowed(fresh, 0.1, always=sampled))
        assert (lost == -math.inf).any() and kept.isfinite().all()

    def test_a_row_with_nan(self):
        logits = torch.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 9.0]])
        assert fastpo.top_p_allowed(logits, 0.9).tolist() == [[0b10], [0b100]]

    def test_no_rows(self):
        assert fastpo.top_p_allowed(torch.zeros(0, 4, 40), 0.9).shape == (0, 4, 2)

    def test_messages(self):
        logits = torch.zeros(2, 5)
        for change, error, message in (
            ({"logits": logits.long()}, TypeError, "logits must have dtype"),
            ({"logits": torch.zeros(2, 0)}, ValueError, "a vocabulary dimension, not empty"),
            ({"logits": torch.tensor(0.0)}, ValueError, "a vocabulary dimension"),
            ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
            ({"top_p": 1.1}, ValueError, "top_p must be in"),
            ({"top_p": "1"}, TypeError, "top_p must be a number, got str"),
            ({"min_tokens": 0}, ValueError, "min_tokens must be at least 1, got 0"),
            ({"min_tokens": 1.0}, TypeError, "min_tokens must be an int, got float"),
            ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
            ({"always": 3}, TypeError, "always must be a sequence of ids or a tensor, got int"),
            ({"always": "3"}, TypeError, "always must be a sequence of ids or a tensor, got str"),
            ({"always": [1.0]}, TypeError, "always must hold ints, got float"),
            ({"always": [5]}, IndexError, "always holds 5, out of range for a vocabulary of 5"),
            ({"always": torch.tensor([1, 5])}, IndexError, "always holds 5, out of range"),
            (
                {"always": torch.tensor([1, 2, 3])},
                ValueError,
                r"always has shape \(3,\), expected \(2,\) or \(2, 'K'\)",
            ),
            ({"always": torch.tensor([1.0, 2.0])}, TypeError, "always must have dtype int64, int32"),
        ):
            with pytest.raises(error, match=message):
                fastpo.top_p_allowed(**({"logits": logits, "top_p": 0.9} | change))
