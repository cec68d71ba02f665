"""Checkpoints of everything that a run continues from: weights, optimiser, schedule, random states, step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastpo.training.errors import UserError

FOLDER = "checkpoints"


def save(accelerator: Any, run: Path, step: int, algorithm: str) -> Path:
    """Write the checkpoint of a step, complete or not at all, and remove the ones before it."""
    final = run / FOLDER / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.part")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "state.json").write_text(json.dumps({"step": step, "algorithm": algorithm}))
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


def load(accelerator: Any, checkpoint: Path, algorithm: str) -> int:
    """Put everything back; returns the number of steps that were done."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["algorithm"] != algorithm:
        raise UserError(f"{checkpoint}: this is a run of {state['algorithm']}, not of {algorithm}")
    accelerator.load_state(str(checkpoint))
    return state["step"]
