"""Builds fastpo._cpu and, with nvcc, fastpo._cuda (LibTorch stable ABI), and fastpo._host (pybind11).

Compilers: g++ from 11, clang from 14, on Windows clang-cl. Settings are in pyproject.toml. Environment:
FASTPO_REQUIRE_NATIVE=1 makes a failing build an error; FASTPO_CUDA=0 leaves _cuda out, FASTPO_CUDA=1 makes a missing
nvcc an error; CUDA_HOME is where nvcc is looked for first; FASTPO_LOCAL_VERSION=cu130 makes the version 0.1.0+cu130.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

REQUIRE = os.environ.get("FASTPO_REQUIRE_NATIVE") == "1"
WINDOWS = sys.platform == "win32"
# -ffp-contract: the ISO modes of g++ switch fused multiply-add off
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
if WINDOWS:
    # clang-cl hands over to clang what stands behind this
    FLAGS = ["/std:c++20", *(f"/clang:{flag}" for flag in FLAGS)]
else:
    # g++ 12 warns inside its own AVX-512 intrinsics; clang does not know that warning
    FLAGS += [
        "-std=c++20",
        "-g0",  # Python's own flags may have -g: a third more time to compile, and six times the size
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-maybe-uninitialized",
        "-Wno-unused-parameter",
        "-Wno-unknown-warning-option",
    ]
LINK = {
    "linux": ["-Wl,--no-undefined"],
    # where a wheel's torch lies: a library that is loaded already would do on Linux only
    "darwin": ["-Wl,-rpath,@loader_path/../torch/lib"],
}.get(sys.platform, [])
# one build serves every torch from this version on
TORCH_TARGET = "0x020a000000000000"
# each serves its whole major version, which fastpo/kernels/_native.py knows too; the PTX serves what comes after
CUDA_ARCHITECTURES = [80, 90, 100, 120]
PTX_ARCHITECTURE = 100
# what the kernels are compiled from at run time where _cuda does not fit
DEVICE_SOURCES = ["csrc/arguments.h", "csrc/formulas/*.h", "csrc/cuda/*.cuh"]


def find_nvcc():
    wanted = os.environ.get("FASTPO_CUDA")
    if wanted == "0" or sys.platform != "linux":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    found += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    nvcc = next((nvcc for nvcc in found if nvcc), None)
    if wanted == "1" and not nvcc:
        raise FileNotFoundError("FASTPO_CUDA=1, but there is no nvcc")
    return nvcc


def find_clang_cl():
    """MSVC's own compiler has no vector extensions."""
    places = [None, *(f"{os.environ.get(v)}\\LLVM\\bin" for v in ("ProgramFiles", "ProgramW6432"))]
    places.append(f"{os.environ.get('VCINSTALLDIR')}\\Tools\\Llvm\\x64\\bin")
    found = next((c for c in (shutil.which("clang-cl", path=p) for p in places) if c), None)
    if found is None:
        raise FileNotFoundError("there is no clang-cl, and MSVC's compiler lacks the vector extensions")
    return found


def cuda_libraries(nvcc):
    """Where nvcc, which may be a wrapper, has its cudart."""
    said = subprocess.run([nvcc, "--dryrun", "any.cu"], check=True, capture_output=True, text=True).stderr
    found = re.findall(r'"-L([^"]+)"', said)
    return [folder for folder in found if Path(folder, "libcudart_static.a").exists()]


def extensions():
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CppExtension

    def stable(name, sources, link=(), **options):
        return CppExtension(
            name,
            sorted(str(p) for p in sources),
            extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
            extra_link_args=[*LINK, *link],
            depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in {".h", ".inc", ".cuh", ".cu"}],
            py_limited_api=True,
            **options,
        )

    built = [
        stable("fastpo._cpu", [*Path("csrc/cpu").glob("*.cpp"), *Path("csrc/torch").glob("*.cpp")]),
        Pybind11Extension("fastpo._host", ["csrc/host/module.cpp"], cxx_std=17),
    ]
    if find_nvcc():
        # cudart is linked statically: the library then fits every torch, and needs only the driver
        libraries = ["cudart_static", "dl", "rt", "pthread"]
        sources = Path("csrc/torch/cuda").glob("*.cpp")
        built.append(stable("fastpo._cuda", sources, link=["-Wl,--exclude-libs,ALL"], libraries=libraries))
    return built


def compile_device_code(nvcc, folder):
    """The objects of csrc/cuda/*.cu. torch's own build refuses CUDA sources beside a torch without CUDA."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {int(n) for n in re.findall(r"compute_(\d+)", listed)}
    wanted = [a for a in CUDA_ARCHITECTURES if a in known]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    newest = max((a for a in wanted if a <= PTX_ARCHITECTURE), default=wanted[-1])
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = ["-O3", "-std=c++20", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]
    sources = [p for p in Path("csrc").rglob("*") if p.suffix in {".h", ".cuh", ".cu"}]
    # another compiler or other flags make other objects
    stamp, said = folder / "command", " ".join(map(str, [nvcc, listed, *flags, *code]))
    if not stamp.exists() or stamp.read_text() != said:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(said)
    objects = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        target = folder / f"{source.stem}.o"
        if not target.exists() or any(p.stat().st_mtime > target.stat().st_mtime for p in sources):
            subprocess.run([nvcc, *flags, *code, "-c", source, "-o", target], check=True)
        objects.append(str(target))
    return objects


# by library, why it is not built
NOT_BUILT = {}


def record(package):
    """What `fastpo info` says of libraries that were not built, beside them."""
    file = Path(package, "not_built.json")
    if NOT_BUILT:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(NOT_BUILT, indent=2))
    else:
        file.unlink(missing_ok=True)


def leave_out(name, error):
    """Install without a library: the reference serves in its place."""
    if REQUIRE:
        raise error
    NOT_BUILT[name] = " ".join(str(error).split())
    print(f"fastpo: {name} is not built: {NOT_BUILT[name]}", file=sys.stderr)


class Sources(build_py):
    """A wheel carries the device code, as fastpo/csrc; a source tree is used where it is."""

    def run(self):
        super().run()
        # there may be nothing to build
        record("fastpo" if self.editable_mode else Path(self.build_lib, "fastpo"))
        if self.editable_mode:
            return
        for pattern in DEVICE_SOURCES:
            for source in Path().glob(pattern):
                target = Path(self.build_lib, "fastpo", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


def make_command():
    """A build_ext that leaves out what cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler

        modules = extensions()
    except ImportError as error:
        for name in ("_cpu", "_host"):
            leave_out(name, error)
        return build_ext, []

    class Build(BuildExtension):
        def __init__(self, *args, **options):
            # torch's rules for ninja name MSVC's compiler
            super().__init__(*args, **options, use_ninja=not WINDOWS)

        def run(self):
            package = Path(self.get_ext_fullpath("fastpo._cpu")).parent
            for extension in self.extensions:
                extension.define_macros.append(("FASTPO_VERSION", self.distribution.get_version()))
            try:
                super().run()
            except Exception as error:  # before one of them was begun
                for extension in self.extensions:
                    self.leave_out(extension, error)
            record(package)

        def leave_out(self, extension, error):
            compiler = get_cxx_compiler()
            if sys.platform != "win32" and not shutil.which(compiler):
                error = FileNotFoundError(f"no C++ compiler: there is no {compiler}")
            leave_out(extension.name.removeprefix("fastpo."), error)
            # the others do not need it
            self.extensions = [other for other in self.extensions if other is not extension]

        def build_extensions(self):
            if WINDOWS:
                self.compiler.initialize()
                self.compiler.cc = find_clang_cl()
            for extension in self.extensions:
                if extension.name != "fastpo._cuda":
                    continue
                try:
                    nvcc = find_nvcc()
                    extension.extra_objects = compile_device_code(nvcc, Path(self.build_temp, "cuda"))
                    extension.library_dirs += cuda_libraries(nvcc)
                except (OSError, subprocess.CalledProcessError) as error:
                    self.leave_out(extension, error)
            super().build_extensions()

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                self.leave_out(extension, error)

    return Build, modules


command, modules = make_command()
label = os.environ.get("FASTPO_LOCAL_VERSION")
setup(
    ext_modules=modules,
    cmdclass={"build_ext": command, "build_py": Sources},
    options={"egg_info": {"tag_build": f"+{label}"}} if label else {},
)
