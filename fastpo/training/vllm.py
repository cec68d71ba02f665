"""vLLM as the engine that samples completions, one in every process, beside the model that is trained.

It follows the interface of vLLM 0.10 and later as TRL uses it; it has been run with a stand-in for vLLM only, which
needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.training.errors import UserError
from fastpo.training.rollouts import Rollout, Sampling, draw_seed


class VLLMEngine:
    """See `Engine`. What it draws is its own affair: seeds are given to it, but batches may change its numbers."""

    def __init__(self, model: str, *, max_length: int, memory: float = 0.4, **options: Any) -> None:
        """
        Args:
            model: as vLLM loads it; the weights come from the policy.
            max_length: most tokens of prompt and completion.
            memory: the share of the GPU's that it may take.
            options: for `vllm.LLM`.

        Raises:
            UserError: vLLM is not installed.
        """
        try:
            import vllm
        except ImportError as error:
            raise UserError('vllm is not installed: pip install "fastpo[vllm]"') from error
        self.parameters = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=model,
            max_model_len=max_length,
            gpu_memory_utilization=memory,
            # every process of the launcher is a worker of its own
            distributed_executor_backend="external_launcher",
            # those of the distribution that was sampled, with its temperature and nucleus
            logprobs_mode="processed_logprobs",
            **options,
        )

    def update(self, policy: Any) -> None:
        """Load the policy's weights, whole ones where they are sharded, and forget what was cached under older ones."""
        inner = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for item in _weights(policy):
            inner.load_weights([item])
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, keys: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """See `Engine`."""
        keys = range(len(prompts)) if keys is None else keys
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = self.llm.generate(
            requests,
            sampling_params=[self._parameters(n, sampling, draw_seed(sampling.seed, key, 0)) for key in keys],
            use_tqdm=False,
        )
        return [[_rollout(each, sampling) for each in request.outputs] for request in found]

    def _parameters(self, n: int, sampling: Sampling, seed: int) -> Any:
        greedy = sampling.temperature == 0
        return self.parameters(
            n=n,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop),
            stop=list(sampling.stop_strings) or None,
            seed=seed,
            # of the token that was sampled
            logprobs=0,
            # the tokenizer's EOS ends a completion only if it is among the stops
            ignore_eos=True,
        )


def _rollout(found: Any, sampling: Sampling) -> Rollout:
    ids = list(found.token_ids)
    if sampling.temperature == 0:
        return Rollout(ids, torch.zeros(len(ids)), found.finish_reason == "stop")
    logprobs = [each[token].logprob for each, token in zip(found.logprobs, ids, strict=True)]
    return Rollout(ids, torch.tensor(logprobs), found.finish_reason == "stop")


@torch.no_grad()
def _weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """The language model's parameters under transformers' names; all ranks must walk through them together."""
    inner = getattr(policy, "module", policy).model
    for name, value in inner.named_parameters():
        yield name, value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
