"""What `import fastpo` takes beyond `import torch`: seconds of fresh processes, in turns.

python benchmarks/import_time.py [--processes 11]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import fastpo
print(middle - start, perf_counter() - middle)
"""


def python(cache: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that imports this source tree, as an installed package is imported: with its bytecode kept."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=11, help="how many processes (default: 11)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # the first one compiles the modules, and is not counted
        runs = [python(cache, "-c", CODE).stdout.split() for _ in range(given.processes + 1)][1:]
        counted = python(cache, "-X", "importtime", "-c", "import torch, fastpo").stderr
    for name, words in zip(("torch", "fastpo beyond it"), zip(*runs, strict=True), strict=True):
        found = [float(word) for word in words]
        print(f"{name:18}{statistics.median(found):.3f} s ({min(found):.3f} .. {max(found):.3f})")
    rows = [line.removeprefix("import time:").split("|") for line in counted.splitlines() if "|" in line]
    own = [(int(self), name.strip()) for self, _, name in rows[1:] if name.strip().startswith("fastpo")]
    print("of it, by the interpreter's own count, in milliseconds:")
    for microseconds, name in sorted(own, reverse=True)[:8]:
        print(f"  {microseconds / 1e3:8.1f}  {name}")


if __name__ == "__main__":
    main()
