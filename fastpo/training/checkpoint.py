"""Checkpoints of everything that a run continues from: weights, optimiser, schedule, random states, step.

A checkpoint is a folder: the tensors as torch.distributed.checkpoint writes them, each process its share, and beside
them objects.pt, random-RANK.pt and state.json, which names every file with its size. It is whole or not there, and it
is read by any number of processes, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo.training.errors import UserError

FOLDER = "checkpoints"
TENSORS, OBJECTS, STATE = "tensors", "objects.pt", "state.json"


@dataclass(frozen=True)
class Parts:
    """What a run consists of.

    Attributes:
        algorithm: its name.
        data: a digest of what it is trained on.
        models: by name those whose weights change, as they were prepared; "policy" is what the optimiser trains.
        optimizer: prepared or plain.
        objects: by name what else has a `state_dict` and a `load_state_dict`: small, and the same in all processes.
    """

    algorithm: str
    data: str
    models: Mapping[str, Any]
    optimizer: Any
    objects: Mapping[str, Any]


def save(accelerator: Any, run: Path, step: int, parts: Parts) -> Path:
    """Write the checkpoint of a step, complete or not at all, and remove the ones before it.

    Raises:
        UserError: the processes do not share the folder.
    """
    from torch.distributed import checkpoint as dcp

    final = run / FOLDER / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.part")
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _one_process_is_meant():
        dcp.save(_tensors(accelerator, parts), checkpoint_id=partial / TENSORS, no_dist=accelerator.num_processes == 1)
    torch.save(_random_state(), partial / _random_file(accelerator.process_index))
    if main:
        torch.save({name: part.state_dict() for name, part in _objects(accelerator, parts).items()}, partial / OBJECTS)
    accelerator.wait_for_everyone()
    if main:
        files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        if not all(_random_file(rank) in files for rank in range(accelerator.num_processes)):
            raise UserError(f"{run}: the processes must share this folder, and some have written elsewhere")
        state = {"step": step, "algorithm": parts.algorithm, "data": parts.data}
        state |= {"processes": accelerator.num_processes, "files": files}
        (partial / STATE).write_text(json.dumps(state, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in (run / FOLDER).iterdir():
            if old.name != final.name:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def latest(run: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = sorted((run / FOLDER).glob("step-*"))
    if not found:
        raise UserError(f"{run}: there is no checkpoint to resume from")
    return found[-1]


def check_algorithm(checkpoint: Path, name: str) -> None:
    """Raise UserError unless the checkpoint is whole, and of a run of this algorithm."""
    state = _state(checkpoint)
    if state["algorithm"] != name:
        raise UserError(f"{checkpoint}: this is a run of {state['algorithm']}, not of {name}")


def digest(file: str) -> str:
    """What tells a file of data from others."""
    found = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def load(accelerator: Any, checkpoint: Path, parts: Parts) -> int:
    """Put everything back; returns the number of steps that were done.

    Processes that the saving run did not have take the random state of its last.

    Raises:
        UserError: it is of another algorithm, model or data, or not whole. Nothing on the disk has changed then.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    check_algorithm(checkpoint, parts.algorithm)
    state = _state(checkpoint)
    if state["data"] != parts.data:
        raise UserError(f"{checkpoint}: the data of the run have changed; put back those it was started with")
    saved = _read(checkpoint / OBJECTS)
    objects = _objects(accelerator, parts)
    if saved.keys() != objects.keys():
        has, needs = (", ".join(sorted(names)) for names in (saved.keys(), objects.keys()))
        raise UserError(f"{checkpoint}: it has the state of {has}, and the run needs that of {needs}")
    tensors = _tensors(accelerator, parts)
    _check_shapes(checkpoint, tensors["models"])
    try:
        with _one_process_is_meant():
            # into the weights in place
            dcp.load(tensors, checkpoint_id=checkpoint / TENSORS, no_dist=accelerator.num_processes == 1)
    except (dcp.api.CheckpointException, RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"{checkpoint}: cannot be read: {reason[-1] if reason else type(error).__name__}") from error
    policy = accelerator.unwrap_model(parts.models["policy"])
    set_optimizer_state_dict(policy, _plain(parts.optimizer), tensors["optimizer"])
    for name, part in objects.items():
        part.load_state_dict(saved[name])
    rank = min(accelerator.process_index, state["processes"] - 1)
    _set_random_state(_read(checkpoint / _random_file(rank)))
    return state["step"]


def _state(checkpoint: Path) -> dict[str, Any]:
    """state.json, of a checkpoint that is whole."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        files = state["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint / STATE}: missing or damaged, the checkpoint cannot be read") from error
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path}: missing, the checkpoint cannot be read without it")
        if path.stat().st_size != size:
            raise UserError(f"{path}: has {path.stat().st_size:,} bytes and not {size:,}, the checkpoint is damaged")
    return state


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _tensors(accelerator: Any, parts: Parts) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads in place: a sharded tensor as the share there is."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    policy = accelerator.unwrap_model(parts.models["policy"])
    models = {name: weights(accelerator.unwrap_model(model)) for name, model in parts.models.items()}
    return {"models": models, "optimizer": get_optimizer_state_dict(policy, _plain(parts.optimizer))}


def weights(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint is to hold."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in kept}


def _plain(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _check_shapes(checkpoint: Path, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise UserError unless the checkpoint's models have the same tensors in the same shapes."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(checkpoint / TENSORS).read_metadata().state_dict_metadata
    there = {name: tuple(m.size) for name, m in metadata.items() if name.startswith("models.") and hasattr(m, "size")}
    here = {f"models.{model}.{name}": tuple(t.shape) for model, w in models.items() for name, t in w.items()}
    different = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if different:
        name = different[0]
        has, needs = (f"has the shape {shapes[name]}" if name in shapes else "is missing" for shapes in (there, here))
        raise UserError(
            f"{checkpoint}: it is of another model: {name.removeprefix('models.')} {has} there and {needs} here "
            f"({len(different)} of the tensors)"
        )


def _objects(accelerator: Any, parts: Parts) -> dict[str, Any]:
    scaler = accelerator.scaler
    return {**parts.objects, **({} if scaler is None else {"scaler": scaler})}


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read, the checkpoint is damaged") from error


def _random_file(rank: int) -> str:
    return f"random-{rank}.pt"


def _random_state() -> dict[str, Any]:
    """Of all generators that a process has without asking for them."""
    name, key, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, torch.from_numpy(key), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
