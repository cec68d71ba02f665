"""token_logprobs on a GPU: the CPU kernel's own cases in Triton; streams, graphs, waiting."""

from __future__ import annotations
