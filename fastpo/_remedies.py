"""What may be wrong with an installation, in words, and the command that mends it: one table.

`fastpo info` prints the rows that `fastpo._diagnosis` finds, docs/install.md all of them. Nothing of fastpo is imported
here: the first row is looked at before the rest of it could fail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# as pyproject.toml has it
OLDEST_TORCH = (2, 10)


@dataclass(frozen=True)
class Finding:
    """What is wrong, what mends it, and whether it is broken: what is merely absent, the reference serves."""

    check: str
    found: str
    remedy: str
    broken: bool

    def __str__(self) -> str:
        return f"{self.check}{' (broken)' if self.broken else ''}: {self.found}\n  remedy: {self.remedy}"


@dataclass(frozen=True)
class Row:
    """One thing that may be wrong. `{}` stands for what a check fills in; `symptom` is how a user meets it.

    Commands stand between backticks, which the documentation keeps and a terminal does not need.
    """

    check: str
    symptom: str
    finding: str
    remedy: str
    broken: bool

    def found(self, **words: str) -> Finding:
        return Finding(
            self.check, self.finding.format(**words), self.remedy.replace("`", "").format(**words), self.broken
        )


ROWS = {
    row.check: row
    for row in (
        Row(
            "torch",
            "`import fastpo` is an ImportError",
            "torch {found} is installed, and fastpo needs torch {oldest} or newer",
            '`pip install --upgrade "torch>={oldest}"`',
            broken=True,
        ),
        Row(
            "not built",
            "the CPU is served by the reference",
            "{libraries}: {reason}; {compiler}",
            "{rebuild}",
            broken=False,
        ),
        Row(
            "library",
            "the reference serves although the libraries were built",
            "{file} did not load: {error}{mismatch}",
            "{rebuild}",
            broken=True,
        ),
        Row(
            "version",
            "an op is not found, or takes other arguments",
            "{file} is of version {built}, and the Python sources are of {version}",
            "{rebuild}",
            broken=True,
        ),
        Row(
            "instruction set",
            "CPU kernels are slower than the benchmarks say",
            "FASTPO_CPU_CAPABILITY={forced} is in the environment, and this processor has {best}",
            "`unset FASTPO_CPU_CAPABILITY`",
            broken=False,
        ),
        Row(
            "driver",
            "CUDA devices are not served by the compiled library",
            "{file} was built with CUDA {built}, and the driver runs CUDA {driver} at most; {instead}",
            "update the NVIDIA driver to one that runs CUDA {built}, or let NVRTC serve: `{nvrtc}`",
            broken=False,
        ),
        Row(
            "architecture",
            "a GPU that is old, or newer than the driver, is served by the reference",
            "{device}: {reason}; the reference serves it",
            "let NVRTC serve: `{nvrtc} && export FASTPO_CUDA=0`",
            broken=False,
        ),
        Row(
            "NVRTC",
            "CUDA devices are served by the reference",
            "_cuda: {library}; {reason}; the reference serves CUDA devices",
            "`{nvrtc}`",
            broken=False,
        ),
        Row(
            "CuPy",
            "a kernel that NVRTC compiles fails when it is called",
            "{installed} is installed, and torch with this driver needs CuPy for CUDA {wanted}",
            "`pip uninstall --yes {installed} && {nvrtc}`",
            broken=True,
        ),
        Row(
            "Triton",
            "log-probabilities and divergences on a GPU are served by the reference",
            "torch has {platform}, and Triton is not installed: the reference serves what walks the vocabulary",
            '`pip install "{triton}"`',
            broken=False,
        ),
        Row(
            "kernel",
            "wrong numbers, or an error from inside a kernel",
            "{function} on {device}: {reason}",
            '{rebuild}; until then `fastpo.use_backend("reference")`. What stays is a bug: `fastpo info --json`',
            broken=True,
        ),
    )
}


def require_torch() -> None:
    """Raise an ImportError if torch is too old, before an undefined symbol or a missing attribute says so."""
    import torch

    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        row = ROWS["torch"].found(found=torch.__version__, oldest=".".join(map(str, OLDEST_TORCH)))
        raise ImportError(f"{row.found}: {row.remedy}")
