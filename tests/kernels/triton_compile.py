"""Compiles the Triton kernels for GPUs that need not be there, and prints what came out as JSON.

A process of its own, run with TRITON_INTERPRET=0: an imported Triton either compiles or interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastpo.kernels.triton import linear_logprobs as tiles
from fastpo.kernels.triton import token_logprobs as kernels
from fastpo.kernels.triton import vocab_divergence as pairs
from fastpo.kernels.vocab_divergence import KL, STATE_ROWS

DEFAULT = {
    "forward": kernels.FORWARD_CONFIGS[0],
    "backward": kernels.BACKWARD_CONFIGS[0],
    "fold": tiles.FOLD_CONFIGS[0],
    "gradient": tiles.GRADIENT_CONFIGS[0],
    "pair": pairs.FORWARD_CONFIGS[0],
    "pair backward": pairs.BACKWARD_CONFIGS[0],
}
STATS = {"none": (), "entropy": ("ENTROPY",), "all": ("ENTROPY", "LOGSUMEXP", "P2", "TOP1")}
POINTERS = {"targets": "*i64", "top1": "*i64", "mask": "*u8", "allowed": "*i32"}
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
FRACTIONS = {"forward": ("inverse", "scale"), "fold": ("cap", "inner")}
FRACTIONS |= {"combine": FRACTIONS["forward"], "backward": FRACTIONS["forward"], "gradient": FRACTIONS["fold"]}
FRACTIONS |= {name: (*FRACTIONS["forward"], "parameter", "rest") for name in ("pair", "pair backward")}
# those whose main loop writes
WRITING = ("backward", "gradient", "pair backward")
# those that read two streams
PAIRS = ("pair", "pair backward")
# the numbers of the divergences for which a row is read twice
OTHERS = sorted(set(STATE_ROWS) - {KL})
NUMBERS = {"forward": kernels._FORWARD_NUMBERS, "combine": kernels._FORWARD_NUMBERS}
NUMBERS |= {"backward": kernels._BACKWARD_NUMBERS, "fold": tiles._FOLD_NUMBERS, "gradient": tiles._GRADIENT_NUMBERS}
NUMBERS |= {"pair": pairs._FORWARD_NUMBERS, "pair backward": pairs._BACKWARD_NUMBERS}


class Case(NamedTuple):
    """One compilation: `stats` of the forward; in the backward "none" stands for the gradient of the log-probs alone.

    "fold" and "gradient" are the tile kernels of linear_logprobs, as "forward" and "backward" are those of
    token_logprobs; `out` is the gradient's dtype where it has its own tensor. "pair" and "pair backward" are those of
    vocab_divergence for the number `divergence`; with mask, temperatures and both gradients unless `stats` is "none".

    `allowed`: over packed sets of columns. `aligned` says whether rows begin and end at multiples of 16 bytes ("yes"),
    anywhere ("edges"), in the backward anywhere and elsewhere than the gradient's ("unlike"), or whether nothing is
    known of the pointers ("unknown").
    """

    kernel: str
    arch: str
    dtype: str = "bf16"
    stats: str = "all"
    aligned: str = "edges"
    config: Any = None
    parts: bool = False
    capped: bool = False
    allowed: bool = False
    out: str = ""
    divergence: int = 0
    options: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        cut = "x".join(map(str, self.config or DEFAULT.get(self.kernel, ())))
        rest = [
            "parts" * self.parts,
            "capped" * self.capped,
            "allowed" * self.allowed,
            f"divergence {self.divergence}" * (self.divergence > 0),
            self.out,
        ]
        return " ".join([self.kernel, self.arch, self.dtype, self.stats, self.aligned, cut, *rest])


def cases(vendor: str) -> Iterator[Case]:
    """Every dtype with every flag for the default cut on one architecture, every cut and the others for one dtype."""
    main, others = ("sm_90", ("sm_80", "sm_100")) if vendor == "nvidia" else ("gfx942", ())
    dtypes = ("bf16", "fp16", "fp32")
    for dtype in dtypes:
        for aligned in ("yes", "edges"):
            for stats in STATS if vendor == "nvidia" else ("all",):
                yield Case("forward", main, dtype, stats, aligned)
            for stats in ("none", "all") if vendor == "nvidia" else ("all",):
                yield Case("backward", main, dtype, stats, aligned)
        yield Case("combine", main, dtype)
    yield from (Case("forward", main, config=config) for config in kernels.FORWARD_CONFIGS[1:])
    yield from (Case("backward", main, config=config) for config in kernels.BACKWARD_CONFIGS[1:])
    yield Case("forward", main, parts=True)
    yield Case("backward", main, aligned="unlike")
    for aligned in ("yes", "edges"):
        yield from (Case(kernel, main, aligned=aligned, allowed=True) for kernel in ("forward", "backward"))
    for arch in others:
        yield from (Case("forward", arch), Case("backward", arch))


def tile_cases(vendor: str) -> Iterator[Case]:
    """As `cases`, of the tile kernels: fp32 tiles, with gradients in bf16, are the usual ones on a GPU."""
    main, others = ("sm_90", ("sm_80", "sm_100")) if vendor == "nvidia" else ("gfx942", ())
    for aligned in ("yes", "edges"):
        for stats in ("none", "all") if vendor == "nvidia" else ("all",):
            for capped in (False, True):
                yield Case("fold", main, "fp32", stats, aligned, capped=capped)
                for out in ("", "bf16"):
                    yield Case("gradient", main, "fp32", stats, aligned, capped=capped, out=out)
    for dtype in ("bf16", "fp16"):
        yield from (Case(kernel, main, dtype, capped=True) for kernel in ("fold", "gradient"))
    for aligned in ("yes", "edges"):
        # of which the words' loads can be told
        yield from (Case(kernel, main, "bf16", "all", aligned, allowed=True) for kernel in ("fold", "gradient"))
    yield from (Case("fold", main, "fp32", config=config, capped=True) for config in tiles.FOLD_CONFIGS[1:])
    for config in tiles.GRADIENT_CONFIGS[1:]:
        yield Case("gradient", main, "fp32", config=config, capped=True, out="bf16")
    yield Case("gradient", main, "fp32", aligned="unlike", out="bf16")
    for arch in others:
        yield Case("fold", arch, "fp32", capped=True)
        yield from (Case("gradient", arch, "fp32", capped=True, out=out) for out in ("", "bf16"))


def pair_cases(vendor: str) -> Iterator[Case]:
    """As `cases`, of the kernels of vocab_divergence."""
    main, others = ("sm_90", ("sm_80", "sm_100")) if vendor == "nvidia" else ("gfx942", ())
    for dtype in ("bf16", "fp16", "fp32"):
        for aligned in ("yes", "edges"):
            for stats in ("none", "all"):
                yield from (Case(kernel, main, dtype, stats, aligned) for kernel in PAIRS)
    yield from (Case("pair", main, config=config) for config in pairs.FORWARD_CONFIGS[1:])
    yield from (Case("pair backward", main, config=config) for config in pairs.BACKWARD_CONFIGS[1:])
    yield Case("pair backward", main, aligned="unlike")
    yield from (
        Case(kernel, main, dtype, divergence=n) for kernel in PAIRS for dtype in ("bf16", "fp32") for n in OTHERS
    )
    for arch in others:
        yield from (Case(kernel, arch, divergence=n) for kernel in PAIRS for n in (0, *OTHERS))


def defects(vendor: str) -> Iterator[Case]:
    """Kernels in which the checks have to find something: fewer registers than are needed, and no vectors."""
    main, few = ("sm_90", ("maxnreg", 24)) if vendor == "nvidia" else ("gfx942", ("waves_per_eu", 8))
    # sums of 16 vectors for each thread
    yield Case("forward", main, config=kernels.Forward(512 if vendor == "nvidia" else 1024, 1, 1), options=(few,))
    yield Case("forward", main, aligned="unknown")
    yield Case("backward", main, aligned="unknown")


def tile_defects(vendor: str) -> Iterator[Case]:
    """As `defects`, of the tile kernels: no vectors."""
    main = "sm_90" if vendor == "nvidia" else "gfx942"
    yield Case("fold", main, "fp32", aligned="unknown")
    yield Case("gradient", main, "fp32", aligned="unknown")


def arguments(case: Case) -> tuple[Any, dict[str, Any], set[str], int, int]:
    """Kernel, constants, arguments that are None, warps, and the rows of E elements that a thread handles at a time."""
    config = case.config or DEFAULT.get(case.kernel, DEFAULT["forward"])
    flags = {name: name in STATS[case.stats] for name in STATS["all"]}
    constants = {"E": 16 // ELEMENT[case.out or case.dtype], "TILE": config.tile}
    constants["IDS"] = 1 if case.stats == "none" else 4
    edges, alike = {"EDGES": case.aligned != "yes"}, {"ALIKE": case.aligned != "unlike"}
    absent: set[str] = set()
    if case.kernel == "forward":
        constants |= edges | {"STAGES": config.stages} | flags
        absent = {"temperatures"} if case.stats == "none" else set()
        absent |= set() if case.parts else {"sums"}
        function = kernels.forward_kernel
    elif case.kernel == "combine":
        constants |= {"PARTS": 16, **flags}
        function = kernels.combine_kernel
    elif case.kernel == "backward":
        constants |= edges | alike | {"TILES": config.tiles}
        if case.stats == "none":
            absent = {"temperatures", "entropy", "grad_entropy", "grad_logsumexp"}
        function = kernels.backward_kernel
    elif case.kernel == "pair":
        constants |= edges | alike | {"KIND": case.divergence}
        absent = {"mask", "temperatures"} if case.stats == "none" else set()
        function = pairs.forward_kernel
    elif case.kernel == "pair backward":
        constants |= edges | {
            "P_ALIKE": alike["ALIKE"],
            "Q_ALIKE": alike["ALIKE"],
            "TILES": config.tiles,
            "KIND": case.divergence,
        }
        absent = {"mask", "temperatures", "grad_reference"} if case.stats == "none" else set()
        function = pairs.backward_kernel
    elif case.kernel == "fold":
        constants |= edges | {"WEIGHTED": flags["ENTROPY"], "SQUARED": flags["P2"]}
        absent = {"top1", "total"} if case.stats == "none" else set()
        function = tiles.fold_kernel
    else:
        constants |= edges | alike | {"TILES": config.tiles}
        absent = {"slope"} if case.stats == "none" else set()
        function = tiles.gradient_kernel
    if case.kernel in ("fold", "gradient") and not case.capped:
        absent |= {"cap", "inner"}
    if not case.allowed:
        absent |= {"allowed"}
    lanes = 64 if case.arch.startswith("gfx") else 32
    warps = config.threads // lanes if case.kernel in PAIRS else config.warps
    return function, constants, absent, warps, config.tile // (warps * lanes)


def type_of(case: Case, name: str) -> str:
    """The type of an argument."""
    if name in NUMBERS[case.kernel]:
        return "fp32" if name in FRACTIONS[case.kernel] else "i32"
    if name in ("logits", "gradient", "tile", "reference", "grad_logits", "grad_reference"):
        return f"*{case.dtype}"
    if name == "out":
        return f"*{case.out or case.dtype}"
    return POINTERS.get(name, "*fp64" if case.kernel in ("fold", "gradient") else "*fp32")


def build(case: Case) -> tuple[Any, int]:
    function, constants, absent, warps, vectors = arguments(case)
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants or name in absent:
            signature[name], values[(i,)] = "constexpr", constants.get(name)
        else:
            signature[name] = type_of(case, name)
            if signature[name][0] == "*" and case.aligned != "unknown":
                attributes[(i,)] = [["tt.divisibility", 16]]
    if case.arch.startswith("gfx"):
        target = GPUTarget("hip", case.arch, 64)
    else:
        target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, **dict(case.options)}
    return triton.compile(ASTSource(function, signature, values, attributes), target=target, options=options), vectors


def ptxas_report(ptx: str, arch: str) -> str:
    """What the assembler that Triton takes for this architecture says of registers."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        tool = get_ptxas(int(arch.removeprefix("sm_"))).path
        command = [tool, "-v", f"-arch={target[1]}", str(source), "-o", str(Path(scratch, "kernel.cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


class Dialect(NamedTuple):
    """How an assembly language writes what is looked for."""

    label: str
    jump: str
    exponential: str
    load: str
    store: str
    vector: str
    single: dict[int, str]
    barrier: str
    registers: str
    spilled: str


PTX = Dialect(
    r"(\$L__BB\d+_\d+):",
    r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+);",
    "ex2.approx",
    # or on its way into shared memory
    r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)",
    r"st\.global",
    r"(?:(?:\.\w+)*?\.(?:v4\.[bu]32|b128)| \[[^\]]*\], \[[^\]]*\], 0x10)\b",
    {2: r"(?:\.(?!v\d)\w+)*?\.[bu]16\b", 4: r"(?:\.(?!v\d)\w+)*?\.[bu]32\b"},
    "bar.sync",
    r"Used (\d+) registers",
    r"(\d+) bytes spill",
)
AMDGCN = Dialect(
    r"(\.LBB\d+_\d+):",
    r"s_c?branch\w*\s+(\.LBB\d+_\d+)",
    "v_exp_f32",
    r"(?:global|buffer)_load_",
    r"(?:global|buffer)_store_",
    r"dwordx4\b",
    {2: r"u?short\w*\b", 4: r"dword\b"},
    "s_barrier",
    r"\.vgpr_count:\s*(\d+)",
    r"\.vgpr_spill_count:\s*(\d+)",
)


def main_loop(text: str, dialect: Dialect) -> str:
    """The body of the first loop that computes exponentials: from a label to the jump back to it; "" without one."""
    lines = text.splitlines()
    at: dict[str, int] = {}
    for i, line in enumerate(lines):
        if match := re.match(dialect.label, line):
            at[match[1]] = i
        elif (match := re.search(dialect.jump, line)) and match[1] in at:
            body = "\n".join(lines[at[match[1]] : i + 1])
            if dialect.exponential in body:
                return body
    return ""


def facts(case: Case) -> dict[str, Any]:
    """What the tests judge.

    `loads` and `stores` are those of the main loop: vectors of 16 bytes, single elements. `vectors` are those that a
    thread should load and store at a time; the latter are none in a kernel that only sums.
    """
    kernel, vectors = build(case)
    amd = case.arch.startswith("gfx")
    dialect, text = (AMDGCN, kernel.asm["amdgcn"]) if amd else (PTX, kernel.asm["ptx"])
    report = text if amd else ptxas_report(text, case.arch)
    loop = main_loop(text, dialect)

    def count(access: str, dtype: str) -> list[int]:
        return [len(re.findall(access + p, loop)) for p in (dialect.vector, dialect.single[ELEMENT[dtype]])]

    out = case.out or case.dtype
    streams = 2 if case.kernel in PAIRS else 1
    outputs = 2 if case.kernel == "pair backward" and case.stats != "none" else 1
    return {
        **case._asdict(),
        "registers": int(re.findall(dialect.registers, report)[0]),
        "spilled": [int(n) for n in re.findall(dialect.spilled, report)],
        "shared": kernel.metadata.shared,
        "vectors": [
            streams * vectors * ELEMENT[case.dtype] // ELEMENT[out],
            outputs * vectors * (case.kernel in WRITING),
        ],
        "loads": count(dialect.load, case.dtype),
        "stores": count(dialect.store, out),
        "barriers": loop.count(dialect.barrier),
        "tf32": "tf32" in text,
    }


if __name__ == "__main__":
    sets = {"cases": cases, "tiles": tile_cases, "pairs": pair_cases, "defects": defects, "tile defects": tile_defects}
    print(json.dumps({case.name: facts(case) for case in sets[sys.argv[1]](sys.argv[2])}))
