"""Trains the methods of the gallery on the built-in task and keeps the curves that `fastpo train` draws.

`python docs/gallery.py [NAME ...]` writes docs/gallery/NAME.png and docs/gallery/runs.json, about a minute a method.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "gallery"
# one per kind of data
NAMES = ("dpo", "kto", "lipo_lambda", "grpo", "online_dpo", "reward_model")
KEPT = (
    *("accuracy_before", "accuracy_after", "reward_accuracy_before", "reward_accuracy_after"),
    *("kl", "reward_before", "reward_after", "loss_first", "loss_last"),
)


def run(name: str) -> dict[str, float]:
    """Train one method with its defaults of the built-in task; returns what is kept of summary.json."""
    from PIL import Image

    from fastpo.cli import main

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        if code := main(["train", name, "--output", str(output)]):
            sys.exit(code)
        # curves have few colours: a palette makes the file a third as large
        with Image.open(output / "curve.png") as picture:
            picture.convert("RGB").quantize(64).save(HERE / f"{name}.png", optimize=True)
        summary = json.loads((output / "summary.json").read_text())
    return {key: round(summary[key], 3) for key in KEPT if key in summary}


def write(names: list[str]) -> None:
    """Figures of these methods, and their rows in the table of results."""
    HERE.mkdir(exist_ok=True)
    path = HERE / "runs.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        results[name] = run(name)
        path.write_text(json.dumps({key: results[key] for key in NAMES if key in results}, indent=2) + "\n")


if __name__ == "__main__":
    write(sys.argv[1:] or list(NAMES))
