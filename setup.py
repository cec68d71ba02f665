"""Builds fastpo._cpu (LibTorch stable ABI) and fastpo._host (pybind11). Settings are in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

REQUIRE = os.environ.get("FASTPO_REQUIRE_NATIVE") == "1"
# -ffp-contract: the ISO modes of g++ switch fused multiply-add off
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
# GCC 12 warns inside its own AVX-512 intrinsics
FLAGS += [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-unused-parameter",
]
# one build serves every torch from this version on
TORCH_TARGET = "0x020a000000000000"


def extensions():
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CppExtension

    cpu = CppExtension(
        "fastpo._cpu",
        sorted(str(p) for p in [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/torch").glob("*.cpp")]),
        extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
        extra_link_args=["-Wl,--no-undefined"] if sys.platform == "linux" else [],
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in {".h", ".inc"}],
        py_limited_api=True,
    )
    host = Pybind11Extension("fastpo._host", ["csrc/host/module.cpp"], cxx_std=17)
    return [cpu, host]


def make_command():
    """A build_ext that falls back to an install without libraries, which then runs on the reference."""
    try:
        from torch.utils.cpp_extension import BuildExtension

        modules = extensions()
    except ImportError as error:
        if REQUIRE:
            raise
        print(f"fastpo: not building the compiled libraries: {error}", file=sys.stderr)
        return build_ext, []

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if REQUIRE:
                    raise
                print(f"fastpo: the compiled libraries were not built: {error}", file=sys.stderr)
                self.extensions = []

    return Build, modules


command, modules = make_command()
setup(ext_modules=modules, cmdclass={"build_ext": command})
