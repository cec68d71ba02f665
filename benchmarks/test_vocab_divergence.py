"""`fastpo.token_kl` and its peers, under pytest-benchmark: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import VOCAB_DIVERGENCE

from fastpo.bench import VocabDivergenceCase


@pytest.mark.parametrize("prepared", VOCAB_DIVERGENCE, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", VocabDivergenceCase.PROVIDERS)
def test_vocab_divergence(timed: Callable[[str], None], provider: str) -> None:
    timed(provider)
