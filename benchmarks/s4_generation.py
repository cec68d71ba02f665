"""Generation by an S4 language model: time per token over the position, as a JSON and a plot.

Against the convolution computed anew for every token, with and without its kernels, and a Llama with as many parameters
and its KV cache. Each process first checks that steps give the logits of the convolution, then times all of them; what
is reported is the median over processes of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from report import commit, written

from fastpo.bench import environment
from fastpo.bench.processes import heading
from fastpo.nn import S4Config, S4Kernel, S4LanguageModel

HERE = Path(__file__).parent
LENGTHS = (64, 256, 1024, 2048, 4096)
VOCAB, HIDDEN, LAYERS, STATE = 8192, 256, 4, 64
# what is asked, at the longest position
ASKED, AT = 20.0, 4096
LABELS = {
    "state": "S4, its state",
    "kept": "S4, convolution",
    "convolution": "S4, kernels and convolution",
    "llama": "Llama, its KV cache",
}
COLOURS = {"state": "tab:green", "kept": "tab:gray", "convolution": "lightgray", "llama": "tab:blue"}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def models(longest: int) -> tuple[Any, Any]:
    """An S4 model, and a Llama whose MLPs are as wide as the same number of parameters allows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = S4LanguageModel(
        S4Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            d_state=STATE,
            max_position_embeddings=longest,
        )
    )

    def llama(width: int) -> Any:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=HIDDEN,
                intermediate_size=width,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=longest,
                tie_word_embeddings=True,
            )
        )

    narrow = parameters(llama(1))
    width = 1 + (parameters(ours) - narrow) // (3 * HIDDEN * LAYERS)
    return ours.eval(), llama(width).eval()


@contextmanager
def kept_kernels(model: Any) -> Iterator[None]:
    """The model's convolutions with kernels that were made before."""
    kernels = [module for module in model.modules() if isinstance(module, S4Kernel)]
    for kernel in kernels:
        made = kernel(kernel.length)[0]
        kernel.forward = lambda length, state=None, made=made: (made[..., :length], None)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.forward


def median_time(function: Callable[[], Any], seconds: float, most: int) -> float:
    """Of as many calls as fit, three at least."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < most and sum(times) < seconds):
        begin = perf_counter()
        function()
        times.append(perf_counter() - begin)
    return statistics.median(times)


@torch.inference_mode()
def one_process(lengths: list[int]) -> dict[str, dict[str, float]]:
    """Seconds per token of each way, by position."""
    torch.manual_seed(0)
    ours, llama = models(max(lengths) + 1)
    ids = torch.randint(VOCAB, (1, max(lengths) + 1))
    found: dict[str, dict[str, float]] = {name: {} for name in LABELS}
    for length in lengths:
        before, after = ids[:, :length], ids[:, length : length + 1]
        cache = ours(before).past_key_values
        step = ours(after, past_key_values=cache).logits[:, -1]
        whole = ours(ids[:, : length + 1], use_cache=False, logits_to_keep=1).logits[:, -1]
        if not torch.allclose(step, whole, rtol=1e-3, atol=1e-3 * float(whole.std())):
            raise SystemExit(f"at {length}, steps are off by {(step - whole).abs().max():.2e}; nothing is reported")
        keys = llama(before, use_cache=True).past_key_values
        ways: dict[str, Callable[[], Any]] = {
            "state": lambda cache=cache, after=after: ours(after, past_key_values=cache),  # type: ignore[misc]
            "llama": lambda keys=keys, after=after: llama(after, past_key_values=keys, use_cache=True),  # type: ignore[misc]
            "convolution": lambda n=length: ours(ids[:, : n + 1], use_cache=False, logits_to_keep=1),  # type: ignore[misc]
        }
        for name, way in ways.items():
            way()
            # the KV cache grows by a token a call, so that calls are few
            found[name][str(length)] = median_time(way, 1.0, 20)
        with kept_kernels(ours):
            ways["convolution"]()
            found["kept"][str(length)] = median_time(ways["convolution"], 1.0, 20)
    return found


def summarise(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and most over the processes."""
    return {
        name: {
            length: {"median": statistics.median(times), "min": min(times), "max": max(times)}
            for length in runs[0][name]
            for times in [[run[name][length] for run in runs]]
        }
        for name in LABELS
    }


def plot(found: dict[str, dict[str, dict[str, float]]], where: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, label in LABELS.items():
        lengths = [int(length) for length in found[name]]
        values = list(found[name].values())
        axis.plot(lengths, [1e3 * v["median"] for v in values], marker="o", color=COLOURS[name], label=label)
        low, high = ([1e3 * v[key] for v in values] for key in ("min", "max"))
        axis.fill_between(lengths, low, high, color=COLOURS[name], alpha=0.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("position")
    axis.set_ylabel("ms per token, batch 1")
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title(
        f"{where['parameters']['s4'] / 1e6:.1f}M parameters, {where['cpu']}, {where['cores']} cores, "
        f"torch {where['torch']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=5, help="fresh ones (default: 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="positions to measure at")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = sorted(args.lengths)
    if lengths[0] < 1:
        parser.error("--lengths must be at least 1")
    if args.one:
        print(json.dumps(one_process(lengths)))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    where = {**environment(), "git_commit": commit()}
    where["parameters"] = dict(zip(("s4", "llama"), map(parameters, models(lengths[-1] + 1)), strict=True))
    print(heading(where), end="\n\n", flush=True)
    command = [sys.executable, str(Path(__file__)), "--one", "--lengths", *map(str, lengths)]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = summarise(runs)
    print(f"{'position':>10}" + "".join(f"{label:>30}" for label in LABELS.values()) + f"{'times faster':>14}")
    for length in map(str, lengths):
        times = [found[name][length] for name in LABELS]
        cells = [f"{1e3 * t['median']:.2f} ms ({1e3 * t['min']:.2f} .. {1e3 * t['max']:.2f})" for t in times]
        print(
            f"{length:>10}"
            + "".join(f"{cell:>30}" for cell in cells)
            + f"{times[1]['median'] / times[0]['median']:>14.1f}"
        )
    report: dict[str, Any] = {"environment": where, "seconds_per_token": found}
    if AT in lengths:
        measured = found["kept"][str(AT)]["median"] / found["state"][str(AT)]["median"]
        report["target"] = {"asked": ASKED, "measured": measured, "met": measured >= ASKED}
        print(f"\nat {AT:,}, a step is {measured:.0f} times faster than the convolution alone; asked were {ASKED:.0f}")
    numbers = args.output / "s4_generation.json"
    numbers.write_text(json.dumps(report, indent=2) + "\n")
    written(numbers, plot(found, where, args.output / "s4_generation.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
