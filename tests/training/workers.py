"""What a launcher starts for the tests: processes that run many command lines, as starting them takes longest.

Arguments: a folder with jobs.json, a list of
    argv: the command line; {rank} in it stands for the process's own.
    port: where the processes of this job meet.
    interrupt: this many steps are done, then Ctrl-C.
    kill: after so many steps, the second process is killed.
    terminate: after so many steps, the second process gets SIGTERM.
    keep: where the first process puts a copy of what --output names.
Each process writes, when all jobs are done, codes-RANK.json, and what it said on stderr as said-RANK.json.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def before_step(number: int | None, action: Callable[[], None]) -> Iterator[None]:
    """Once so many steps were done, `action` comes before the next."""
    from fastpo.training import loop

    done: list[int] = []

    def step(job: Any, index: int, real: Any = loop.optimizer_step) -> dict[str, float]:
        if len(done) == number:
            action()
        done.append(index)
        return real(job, index)

    with mock.patch.object(loop, "optimizer_step", step):
        yield


def interrupt() -> None:
    raise KeyboardInterrupt


def to_second(number: signal.Signals) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)


def run(job: dict[str, Any]) -> tuple[int, str]:
    """The exit code of a job, and what it said."""
    from accelerate.state import AcceleratorState

    from fastpo.cli import main

    rank = os.environ["RANK"]
    os.environ["MASTER_PORT"] = str(job["port"])
    argv = [word.replace("{rank}", rank) for word in job["argv"]]
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        before_step(job.get("interrupt"), interrupt),
        before_step(job.get("kill"), lambda: to_second(signal.SIGKILL)),
        before_step(job.get("terminate"), lambda: to_second(signal.SIGTERM)),
    ):
        code = main(argv)
    if torch.distributed.is_initialized():
        # whoever frees a group joins its thread while holding the GIL, for which that thread waits if it is about to
        # free the tensors of its last operation: what else holds the group goes first, and that thread has its time
        gc.collect()
        time.sleep(0.1)
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    if "keep" in job and rank == "0":
        shutil.copytree(argv[argv.index("--output") + 1], job["keep"])
    return code, said.getvalue()


def main() -> None:
    torch.set_num_threads(1)
    # what torchrun sends when the other process was killed; this one is to end by itself
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # each job has a store of its own
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    codes, said = zip(*map(run, json.loads((folder / "jobs.json").read_text())), strict=True)
    (folder / f"codes-{rank}.json").write_text(json.dumps(codes))
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
