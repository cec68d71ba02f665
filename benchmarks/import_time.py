"""What `import fastpo` takes beyond `import torch`: seconds of fresh processes, in turns.

python benchmarks/import_time.py [--processes 11]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

CODE = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import fastpo
print(middle - start, perf_counter() - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=11, help="how many processes (default: 11)")
    given = parser.parse_args()
    times = []
    # the first one reads the files from disk, and is not counted
    for _ in range(given.processes + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        times.append([float(word) for word in done.stdout.split()])
    for name, found in zip(("torch", "fastpo beyond it"), zip(*times[1:], strict=True), strict=True):
        print(f"{name:18}{statistics.median(found):.3f} s ({min(found):.3f} .. {max(found):.3f})")
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch, fastpo"], capture_output=True, text=True, check=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in loaded.stderr.splitlines() if "|" in line]
    own = [(int(self), name.strip()) for self, _, name in rows[1:] if name.strip().startswith("fastpo")]
    print("of it, by the interpreter's own count, in milliseconds:")
    for microseconds, name in sorted(own, reverse=True)[:8]:
        print(f"  {microseconds / 1e3:8.1f}  {name}")


if __name__ == "__main__":
    main()
