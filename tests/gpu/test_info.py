"""Nothing on this machine is served by the reference without anybody noticing."""

from __future__ import annotations

import fastpo


def test_every_kernel_runs_here(cuda):
    on_cuda = [s for s in fastpo.info().services if s.device == "cuda"]
    served = {s.function for s in on_cuda}
    assert served >= {
        "token_logprobs",
        "objective",
        "affine_scan",
        "segment_stats",
        "listwise",
        "cauchy",
        "vandermonde",
    }
    assert not [s for s in on_cuda if s.backend == "reference" or s.reason], on_cuda
