"""The engine on vLLM, with a stand-in for vLLM that keeps what it is told."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from fastpo.training.errors import UserError
from fastpo.training.model import Policy
from fastpo.training.rollouts import Sampling
from fastpo.training.vllm import VLLMEngine

from .conftest import tiny_model

STOP = 5


class StandIn(types.ModuleType):
    """vllm.LLM and vllm.SamplingParams, as far as they are used."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.loaded: dict[str, torch.Tensor] = {}
        self.resets = 0
        self.requests: list[Any] = []
        outer = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                outer.options = options
                runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=outer.loaded.update))
                worker = types.SimpleNamespace(model_runner=runner)
                executor = types.SimpleNamespace(driver_worker=worker)
                self.llm_engine = types.SimpleNamespace(model_executor=executor)

            def reset_prefix_cache(self) -> None:
                outer.resets += 1

            def generate(self, requests: Any, *, sampling_params: Any, use_tqdm: bool) -> Any:
                outer.requests = list(zip(requests, sampling_params, strict=True))
                return [types.SimpleNamespace(outputs=[outer.output(k) for k in range(p.n)]) for p in sampling_params]

        self.LLM = LLM
        self.SamplingParams = types.SimpleNamespace

    @staticmethod
    def output(k: int) -> Any:
        ids = [1, 2, STOP] if k == 0 else [3, 4, 4]
        logprobs = [{9: types.SimpleNamespace(logprob=-9.0), i: types.SimpleNamespace(logprob=-i / 8)} for i in ids]
        return types.SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs, finish_reason="length" if k else "stop")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_completions_and_log_probs(vllm):
    engine = VLLMEngine("name", max_length=32, dtype="bfloat16")
    assert vllm.options["logprobs_mode"] == "processed_logprobs"
    assert (vllm.options["max_model_len"], vllm.options["dtype"]) == (32, "bfloat16")
    sampling = Sampling(3, temperature=0.7, top_p=0.9, stop=(STOP,), stop_strings=("end",), seed=4)
    found = engine.generate([[1, 2], [3]], 2, sampling, [10, 20])
    for first, second in found:
        assert (first.ids, first.ended) == ([1, 2, STOP], True)
        assert (second.ids, second.ended) == ([3, 4, 4], False)
        assert first.logprobs.tolist() == [-1 / 8, -2 / 8, -STOP / 8]
    assert [request["prompt_token_ids"] for request, _ in vllm.requests] == [[1, 2], [3]]
    for _, given in vllm.requests:
        assert (given.n, given.temperature, given.top_p, given.max_tokens) == (2, 0.7, 0.9, 3)
        assert (given.stop_token_ids, given.stop) == ([STOP], ["end"])
    seeds = [given.seed for _, given in vllm.requests]
    assert len(set(seeds)) == 2
    engine.generate([[3]], 2, sampling, [20])
    assert vllm.requests[0][1].seed == seeds[1]


def test_greedy_completions_have_probability_one(vllm):
    (found,) = VLLMEngine("name", max_length=32).generate([[1]], 1, Sampling(3, temperature=0.0, top_p=0.5))
    assert vllm.requests[0][1].top_p == 1.0
    assert found[0].logprobs.tolist() == [0, 0, 0]


def test_the_policys_weights_are_loaded_and_the_cache_is_forgotten(vllm):
    engine = VLLMEngine("name", max_length=32)
    policy = Policy(tiny_model(20))
    engine.update(policy)
    names = dict(policy.model.named_parameters())
    assert vllm.loaded.keys() == names.keys() and vllm.resets == 1
    assert all(torch.equal(vllm.loaded[name], value) for name, value in names.items())
    assert not any(value.requires_grad for value in vllm.loaded.values())


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"vllm is not installed: pip install \"fastpo\[vllm\]\""):
        VLLMEngine("name", max_length=32)
