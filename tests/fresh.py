"""Fresh processes that have imported torch and nothing of fastpo: forks of one that waits, as torch takes seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    job = json.loads(line)
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    for stream, path in job["streams"].items():
        os.dup2(os.open(path, os.O_WRONLY), int(stream))
    os.environ.update(job["environment"])
    sys.path.insert(0, job["path"])
    # an editable install finds in its own tree what is missing in `path`
    sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
    code = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTPO_") and k not in ("PYTHONPATH", "CXX")}
    command = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, env=clean, cwd="/", text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    return server


def python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code`, which finds modules in `path` first, with no variable of fastpo but those given."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        streams = {"1": f"{folder}/out", "2": f"{folder}/err"}
        for file in streams.values():
            Path(file).touch()
        job = {"code": code, "path": str(path), "environment": environment, "streams": streams}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        ended = int(server.stdout.readline())
        out, err = (Path(file).read_text() for file in streams.values())
    return subprocess.CompletedProcess(code, ended, out, err)
