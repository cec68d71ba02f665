"""Benchmarks: fastpo side by side with eager torch, torch.compile, peer libraries and the hardware's floor.

A case builds its inputs and lists its providers; every provider's result is checked before it is timed.
"""

from fastpo.bench.advantages import GaeCase, GroupCase
from fastpo.bench.command import main
from fastpo.bench.flows import SubTbCase
from fastpo.bench.harness import (
    Case,
    CheckFailedError,
    Expected,
    Problem,
    Provider,
    UnavailableError,
    measure,
)
from fastpo.bench.linear_divergence import LinearDivergenceCase
from fastpo.bench.linear_dpo import LinearDpoCase
from fastpo.bench.linear_logprobs import LinearLogprobsCase
from fastpo.bench.listwise import ListwiseCase
from fastpo.bench.objective import ObjectiveCase
from fastpo.bench.policy import PolicyCase
from fastpo.bench.processes import environment, measure_in_processes, summarise, table
from fastpo.bench.state_space import StateSpaceCase
from fastpo.bench.token_logprobs import TokenLogprobsCase
from fastpo.bench.vocab_divergence import VocabDivergenceCase

__all__ = [
    "Case",
    "CheckFailedError",
    "Expected",
    "GaeCase",
    "GroupCase",
    "LinearDivergenceCase",
    "LinearDpoCase",
    "LinearLogprobsCase",
    "ListwiseCase",
    "ObjectiveCase",
    "PolicyCase",
    "Problem",
    "Provider",
    "StateSpaceCase",
    "SubTbCase",
    "TokenLogprobsCase",
    "UnavailableError",
    "VocabDivergenceCase",
    "environment",
    "main",
    "measure",
    "measure_in_processes",
    "summarise",
    "table",
]
