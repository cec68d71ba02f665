"""Adapters: the reference is the model without them, and the exported model has them in its weights."""

from __future__ import annotations

import pytest
import torch

from fastpo.cli import main
from fastpo.training.batches import collate
from fastpo.training.data import Example
from fastpo.training.errors import UserError
from fastpo.training.model import Policy, WithoutAdapters, load_model, policy_inputs, with_adapters

from .conftest import pairs, tiny_model

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("threads")

BATCH = collate([Example([1, 2], ([3, 4], [5])), Example([6], ([7, 8, 9], [1]))], torch.device("cpu"))


def logprobs(model):
    return Policy(model)(*policy_inputs(BATCH)).detach()


def test_without_adapters_is_the_model_before():
    plain = logprobs(tiny_model(20))
    policy = Policy(with_adapters(tiny_model(20), 2, 4.0, "all-linear"))
    assert torch.equal(policy(*policy_inputs(BATCH)), plain)  # its updates begin with 0
    trained = [(name, weight) for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained and all("lora" in name for name, _ in trained)
    with torch.no_grad():
        for _, weight in trained:
            weight += 0.1
    assert (policy(*policy_inputs(BATCH)) - plain).abs().max() > 0.1
    reference = WithoutAdapters(accelerate.Accelerator(cpu=True), policy)
    torch.testing.assert_close(reference(*policy_inputs(BATCH)), plain)
    # and they are back
    assert (policy(*policy_inputs(BATCH)) - plain).abs().max() > 0.1


def test_a_run_exports_adapters_and_the_merged_model(model_folder, write, tmp_path):
    run = tmp_path / "run"
    data = write(pairs(12))
    command = ["train", "dpo", "--model", str(model_folder), "--data", data, "--output", str(run), "--steps", "3"]
    assert main([*command, "--batch.size", "4", "--optim.lr", "0.05", "--lora.rank", "2"]) == 0
    before, merged = (load_model(str(folder)) for folder in (model_folder, run / "model"))
    adapted = peft.PeftModel.from_pretrained(load_model(str(model_folder)), str(run / "adapter")).eval()
    assert (logprobs(merged) - logprobs(before)).abs().max() > 0.01
    # the update is added to the weights, or its product to theirs: other orders of sums
    torch.testing.assert_close(logprobs(merged), logprobs(adapted), rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(UserError, match=r"--lora.targets: "):
        with_adapters(tiny_model(20), 2, 4.0, ["nothing"])


@pytest.mark.parametrize(
    "more, says",
    [
        (["--sync.every", "2"], "--sync moves all weights, and --lora.rank trains adapters"),
        (["--lora.alpha", "0"], "--lora.alpha must be positive"),
    ],
)
def test_options_that_make_no_run(more, says, capsys):
    assert main(["train", "dpo", "--lora.rank", "2", *more]) == 2
    assert says in capsys.readouterr().err
