"""What this installation consists of, and what serves each function on each device."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpo import _diagnosis, losses
from fastpo._remedies import Finding
from fastpo.kernels import _native
from fastpo.kernels.affine_scan import affine_scan
from fastpo.kernels.cauchy import cauchy
from fastpo.kernels.linear_logprobs import linear_logprobs
from fastpo.kernels.packing import pack
from fastpo.kernels.segment_stats import group_normalize
from fastpo.kernels.token_logprobs import token_logprobs
from fastpo.kernels.vandermonde import vandermonde
from fastpo.kernels.vocab_divergence import token_kl

_PACKAGES = ("torch", "triton", "cupy", "transformers", "accelerate", "trl")
# CuPy's wheels are named after the CUDA they are for
_DISTRIBUTIONS = {"cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-0")}


@dataclass
class Service:
    """What serves one function on one device type, and why what would be faster does not, or what is wrong with it."""

    function: str
    device: str
    backend: str
    reason: str | None = None
    failed: bool = False


@dataclass
class Info:
    """The report of `fastpo.info()`; printed, it is what `fastpo info` shows."""

    version: str
    python: str
    machine: dict[str, Any]
    packages: dict[str, str | None]
    libraries: dict[str, dict[str, Any]]
    services: list[Service] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether something that is here does not work; what is merely absent, the reference serves."""
        return any(finding.broken for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"fastpo {self.version}, Python {self.python}, {self.machine['system']}, {self.machine['processor']}"]
        lines += [f"  {name}={value}" for name, value in self.machine["environment"].items()]
        lines += [f"  {name:14}{found or 'not installed'}" for name, found in self.packages.items()]
        lines.append("libraries")
        for name, facts in self.libraries.items():
            lines.append(f"  {name:14}" + (facts.get("error") or facts["path"]))
            lines += [f"    {key}: {value}" for key, value in facts.items() if key not in ("path", "error")]
        lines.append("what serves what")
        for s in self.services:
            lines.append(f"  {s.function:18}{s.device:6}{s.backend}" + (f" ({s.reason})" if s.reason else ""))
        if self.findings:
            lines.append("what can be mended")
            lines += ["  " + str(finding).replace("\n", "\n  ") for finding in self.findings]
        return "\n".join(lines)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return name


def _probe_vocabulary(device: torch.device) -> bool:
    logits, target = torch.tensor([[0.5, -1.0, 2.0]], device=device), torch.tensor([2], device=device)
    return abs(token_logprobs(logits, target).item() - logits.log_softmax(-1)[0, 2].item()) < 1e-6


def _probe_divergence(device: torch.device) -> bool:
    logits, reference = torch.tensor([[0.0, 0.0]], device=device), torch.tensor([[0.0, 1.0]], device=device)
    return abs(token_kl(logits, reference).item() - 0.1109441) < 1e-6


def _probe_linear(device: torch.device) -> bool:
    hidden, weight = torch.tensor([[0.5, -1.0]], device=device), torch.eye(2, device=device)
    found = linear_logprobs(hidden, weight, torch.tensor([1], device=device)).item()
    return abs(found + 1.7014133) < 1e-6


def _probe_objective(device: torch.device) -> bool:
    one = torch.zeros(1, device=device)
    return abs(losses.dpo(one, one, one, one).loss.item() - 0.6931472) < 1e-6


def _probe_scan(device: torch.device) -> bool:
    return affine_scan(0.5, torch.ones(1, 3, device=device)).tolist() == [[1.75, 1.5, 1.0]]


def _probe_segments(device: torch.device) -> bool:
    values, ids = torch.tensor([1.0, 5.0, 3.0], device=device), torch.tensor([7, -2, 7], device=device)
    return group_normalize(values, ids, mode="center").tolist() == [-1.0, 0.0, 1.0]


def _probe_policy(device: torch.device) -> bool:
    one = torch.ones(1, 1, device=device)
    return losses.gspo(one, one, one).loss.item() == -1.0


def _probe_lists(device: torch.device) -> bool:
    scores, labels = torch.zeros(1, 2, device=device), torch.tensor([[0.0, 1.0]], device=device)
    return abs(losses.list_mle(scores, None, labels).loss.item() - 0.6931472) < 1e-6


def _probe_cauchy(device: torch.device) -> bool:
    v, w = torch.tensor([1 + 2j], device=device), torch.tensor([-1 + 1j], device=device)
    return (cauchy(v, torch.zeros(1, dtype=v.dtype, device=device), w) + 1).abs().item() < 1e-6


def _probe_vandermonde(device: torch.device) -> bool:
    v, x = torch.tensor([1.5j], device=device), torch.tensor([0.5j * torch.pi], device=device)
    return (vandermonde(v, x, 3).cpu() - torch.tensor([0.0, -3.0, 0.0])).abs().max().item() < 1e-6


def _probe_packing() -> bool:
    return pack([2, 3, 1], 3) == [[1], [0, 2]]


def _services() -> list[Service]:
    """Each kernel is run, not merely looked for: what loads may still fail."""
    services = []
    probes = {
        "token_logprobs": _probe_vocabulary,
        "vocab_divergence": _probe_divergence,
        "linear_logprobs": _probe_linear,
        "objective": _probe_objective,
        "policy_objective": _probe_policy,
        "affine_scan": _probe_scan,
        "segment_stats": _probe_segments,
        "listwise": _probe_lists,
        "cauchy": _probe_cauchy,
        "vandermonde": _probe_vandermonde,
    }
    for name, probe in probes.items():
        for device in (torch.device("cpu"), torch.device("cuda")):
            reason = _native.why_not(name, device, torch.float32)
            server = _native.server(name, device)
            if reason is None and device.type == "cuda" and not torch.cuda.is_available():
                reason = f"no CUDA device here; {server} would serve one"
            service = Service(name, device.type, "reference" if reason else server, reason)
            if reason is None:
                try:
                    with _native.use_backend("native"):
                        service.reason = None if probe(device) else "the native kernel gives a wrong result"
                except Exception as error:
                    service.reason = f"the native kernel failed: {error}"
                service.failed = service.reason is not None
            services.append(service)
    packing = Service("packing", "host", "Python" if _native.HOST_ERROR else "compiled", _native.HOST_ERROR)
    if not _probe_packing():
        packing.reason, packing.failed = "gives a wrong result", True
    return [*services, packing]


def _failed(services: list[Service]) -> Iterator[_diagnosis.Words]:
    for s in services:
        if s.failed:
            words = {"function": s.function, "device": s.device, "reason": str(s.reason)}
            yield {**words, "rebuild": _diagnosis.rebuild()}


def info() -> Info:
    """Versions, what was built and for which instruction sets, per function and device what serves it, and what is
    wrong with this installation, with the command that mends it.

    Returns:
        an `Info`; `print(fastpo.info())` is the report, `.as_dict()` its data, `.findings` what is wrong.
    """
    cpu: dict[str, Any] = {"path": str(_native.CPU.path), "error": _native.CPU.error}
    if _native.CPU.loaded:
        cpu["built for"] = _native.CPU.text("fastpo_built_for")
        cpu["in use"] = _native.CPU.text("fastpo_capability") + " (FASTPO_CPU_CAPABILITY overrides)"
    cuda: dict[str, Any] = {"path": str(_native.CUDA.path), "error": _native.CUDA.error}
    if _native.CUDA.path is not None:
        driver = _native.cuda_driver()
        cuda["built with"] = f"CUDA {_native.dotted(_native.cuda_built_with(_native.CUDA.path))}"
        cuda["driver"] = f"CUDA {_native.dotted(driver)}" if driver else "none"
    host = {"path": getattr(_native._HOST, "__file__", None), "error": _native.HOST_ERROR}
    services, gpus = _services(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Info(
        version=_diagnosis.sources_version() or "0+unknown",
        python=platform.python_version(),
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
            "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTPO_")},
        },
        packages={name: _diagnosis.installed(*_DISTRIBUTIONS.get(name, (name,))) for name in _PACKAGES},
        libraries={"_cpu": cpu, "_cuda": cuda, "_host": host},
        services=services,
        findings=_diagnosis.diagnose(_failed(services)),
    )
