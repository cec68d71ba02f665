"""Both ways to launch a kernel of csrc/cuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastpo.kernels import _native
from fastpo.kernels.cuda import nvrtc


def both_ways(source: str, launched_by: Callable[[nvrtc.Launcher], dict[str, Callable[..., Any]]]) -> Any:
    """A fixture for all tests of a module: the compiled library, and NVRTC in its place where that is the default."""

    @pytest.fixture(params=["compiled", "nvrtc"], autouse=True)
    def launch(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
        by_nvrtc = request.param == "nvrtc"
        if device.type != "cuda":
            if by_nvrtc:
                pytest.skip("needs a CUDA device")
            yield
            return
        if not by_nvrtc and not _native.CUDA.loaded:
            pytest.skip(f"_cuda: {_native.CUDA.error}")
        if by_nvrtc and nvrtc.why_not():
            pytest.skip(nvrtc.why_not())
        if not by_nvrtc or not _native.CUDA.loaded:
            yield
            return
        library = torch.library.Library("fastpo", "IMPL")
        for name, function in launched_by(nvrtc.Driver(source)).items():
            library.impl(name, function, "CUDA", allow_override=True)
        yield
        library._destroy()

    return launch
