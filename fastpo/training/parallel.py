"""Several processes: what each holds of a model, and errors that end all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpo.training.errors import UserError
from fastpo.training.model import layers


def start(**options: Any) -> Any:
    """The `Accelerator` of this process and those that the launcher started with it.

    Without a GPU the processes talk by gloo: left to itself, accelerate would let each train alone.

    Raises:
        UserError: the launcher asks for accelerate's own FSDP.
    """
    from accelerate import Accelerator

    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        raise UserError(
            "accelerate's own FSDP (--use_fsdp) knows no CPUs, and its checkpoints one number of processes: "
            "launch without it, and say --parallel fsdp2"
        )
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def prepare(accelerator: Any, model: nn.Module, parallel: str, *, frozen: bool = False) -> Any:
    """The model on its device and in its precision, with what makes its gradients those of all processes.

    Args:
        accelerator: devices, processes and precision.
        model: a `Policy`, `Logits` or `Scores`.
        parallel: "ddp", a copy in each process, or "fsdp2", a share of every tensor.
        frozen: whether it is not trained.
    """
    if parallel == "ddp" or accelerator.num_processes == 1:
        return accelerator.prepare_model(model, evaluation_mode=frozen)
    # each layer goes to its device when it is sharded, so that the whole is never there
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    return _sharded(model, accelerator.device.type)


def _sharded(model: Any, device: str) -> Any:
    """Layers are gathered one at a time, what is around them as one more; nothing stays gathered after a forward.

    The layers are what transformers says may not be split. Embedding and head are together, as they may be tied.
    Gradients are summed over the processes with every backward, as whole ones would take the memory that was saved.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # log-probs may be a view of something, and nobody changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, "inside"):
        register_fsdp_forward_method(model, "inside")
    return model


def inside(accelerator: Any, model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(causal language model, *arguments) where the weights of a prepared `Policy` can be used.

    With sharded weights, every process must call it, and run equally many forwards in it.
    """
    return accelerator.unwrap_model(model).inside(function, *arguments)


def largest(accelerator: Any) -> Callable[[int], int]:
    """What takes a number of this process and gives the largest of all processes."""

    def largest(number: int) -> int:
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())

    return largest


def lost(accelerator: Any, error: RuntimeError) -> bool:
    """Whether the error is gloo's, to which another process has stopped answering. NCCL ends the process instead."""
    return accelerator.num_processes > 1 and "gloo" in str(error)


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """A UserError of one process is one of all: none waits for those that have ended, and the first can say it."""
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        said = gather_object([str(error) if error else None])
        others = [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]
        if others and error is None:
            error = UserError(others[0])
    if error is not None:
        raise error
