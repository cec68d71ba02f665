"""S4 and S4D: convolutions whose kernels are impulse responses of linear state-space systems, and their layer.

A system x' = A x + B u, y = C x of N states, discretised with a step dt, has the kernel K_l = C Ā^l B̄. It is made at
once for a whole sequence (`S4Kernel`, `S4DKernel`), and the same system runs token by token in constant time and memory
(`Recurrence`). A is real with N eigenvalues in conjugate pairs, so that one half of all vectors is kept: n = N/2.

The state dicts of `S4Layer` are those of state-spaces/s4's S4Block (of its version 4): `layer.D`, `C`, `inv_dt`, `B`,
`A_real`, `A_imag`, `P` and `l_kernel` under `layer.kernel`, and `output_linear.0.weight` and `bias`. `from_original`
translates those of its minimal S4D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpo.kernels import cauchy, vandermonde, vandermonde_transpose
from fastpo.nn import hippo

if TYPE_CHECKING:
    from typing_extensions import Unpack

# the least decay rate that a system begins with: the logarithm of 0 is no parameter
_MIN_DECAY = 1e-4

# steps that are taken as one matrix product when a state is carried over a sequence
_CHUNK = 64


class Recurrence(NamedTuple):
    """One step of H systems: g_r = 2 Re Σ w_r x, x <- a x - Σ_r p_r g_r + b u, y_c = 2 Re Σ c_c x.

    Attributes:
        a: complex (H, n), the diagonal.
        p, w: complex (R, H, n), the low-rank part; R is 0 for diagonal systems.
        b: complex (H, n), the input.
        c: complex (C, H, n), the outputs.
    """

    a: Tensor
    p: Tensor
    w: Tensor
    b: Tensor
    c: Tensor

    def to(self, dtype: torch.dtype) -> Recurrence:
        """The same in another complex dtype."""
        return Recurrence(*(t.to(dtype) for t in self))

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of it, linear in n.

        Args:
            u: real (batch, H), the input.
            state: complex (batch, H, n), as it was before, in the dtype of the recurrence.

        Returns:
            The outputs, real (batch, C, H), and the state as it is now.
        """
        new = self.a * state + self.b * u.unsqueeze(-1)
        for p, w in zip(self.p, self.w, strict=True):
            new = new - p * (2 * (w * state).sum(-1, keepdim=True).real)
        return 2 * (self.c * new.unsqueeze(1)).sum(-1).real, new

    def dense(self) -> tuple[Tensor, Tensor]:
        """The matrix (H, 2n, 2n) and the input (H, 2n) of a step of the real vector (Re x, Im x)."""
        real, imaginary = torch.diag_embed(self.a.real), torch.diag_embed(self.a.imag)
        matrix = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
        out, into = torch.cat([self.p.real, self.p.imag], -1), 2 * torch.cat([self.w.real, -self.w.imag], -1)
        return matrix - torch.einsum("rhi,rhj->hij", out, into), torch.cat([self.b.real, self.b.imag], -1)


def _power(matrix: Tensor, exponent: int) -> Tensor:
    """matrix^exponent by repeated squaring."""
    found = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    while exponent:
        if exponent % 2:
            found = found @ matrix
        exponent //= 2
        if exponent:
            matrix = matrix @ matrix
    return found


def _real(parameter: Tensor, double: bool = False) -> Tensor:
    """In single precision at least, in double if asked for."""
    return parameter.double() if double or parameter.dtype == torch.float64 else parameter.float()


def _complex(parameter: Tensor, double: bool = False) -> Tensor:
    """A parameter (..., 2) as complex numbers."""
    return torch.view_as_complex(_real(parameter, double).contiguous())


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


class KernelOptions(TypedDict, total=False):
    """What both kernels are told beside their sizes and their init: see `S4Kernel`."""

    d_state: int
    channels: int
    n_ssm: int | None
    dt_min: float
    dt_max: float
    dt_tie: bool


class _Kernel(nn.Module):
    """What both kernels have: the parameters of H systems, and how the recurrence is run.

    Parameters, real, complex ones as (..., 2): `inv_dt` (H, 1), the logarithm of the step, or (H, n); `C`
    (channels, H, n, 2); `B` (1, S, n, 2); `A_real` and `A_imag` (S, n), with A = -exp(A_real) - i A_imag. Head h has
    the A and B of number h modulo S.
    """

    # what an init may be
    known: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        d_model: int,
        l_max: int,
        init: str | Sequence[str],
        *,
        d_state: int = 64,
        channels: int = 1,
        n_ssm: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
    ) -> None:
        super().__init__()
        self.d_model, self.l_max = _positive("d_model", d_model), _positive("l_max", l_max)
        self.channels = _positive("channels", channels)
        hippo._check_state(d_state)
        self.d_state = d_state
        self.n_ssm = d_model if n_ssm is None else _positive("n_ssm", n_ssm)
        if d_model % self.n_ssm:
            raise ValueError(f"n_ssm must divide d_model {d_model}, got {self.n_ssm}")
        self.inits = (init,) if isinstance(init, str) else tuple(init)
        if not self.inits or self.n_ssm % len(self.inits):
            raise ValueError(f"n_ssm {self.n_ssm} must be a multiple of the number of inits, {len(self.inits)}")
        for name in self.inits:
            hippo._known("init", name, self.known)
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_min and dt_max must be positive and in this order, got {dt_min} and {dt_max}")
        self.dt_min, self.dt_max = dt_min, dt_max
        n, heads = d_state // 2, self.n_ssm
        self.inv_dt = nn.Parameter(torch.empty(d_model, 1 if dt_tie else n))
        self.C = nn.Parameter(torch.empty(channels, d_model, n, 2))
        self.B = nn.Parameter(torch.empty(1, heads, n, 2))
        self.A_real = nn.Parameter(torch.empty(heads, n))
        self.A_imag = nn.Parameter(torch.empty(heads, n))

    def _initial(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (n,), low-rank factors (R, n) and inputs (n,) of an init, complex128."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt, log-uniform in [dt_min, dt_max], and C, complex normal; set A and B."""
        if self.C.is_meta:
            return
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        self.inv_dt.uniform_(low, high)
        # real and imaginary part of a standard complex normal number
        self.C.normal_(0, math.sqrt(0.5))
        a, p, b = zip(*(self._initial(name) for name in self.inits), strict=True)
        # every init has its share of the systems, one after the other
        copies = self.n_ssm // len(self.inits)
        spread = torch.stack(a).repeat_interleave(copies, 0)
        self.A_real.copy_(spread.real.neg().clamp(min=_MIN_DECAY).log())
        self.A_imag.copy_(spread.imag.neg())
        self.B.copy_(torch.view_as_real(torch.stack(b).repeat_interleave(copies, 0))[None])
        self._reset_more(torch.stack(p, 1).repeat_interleave(copies, 1))

    def _reset_more(self, p: Tensor) -> None:
        pass

    def _systems(self, double: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (H, 1) or (H, n), A (H, n), B (1, H, n) and C (channels, H, n)."""
        dt, real, imaginary = (_real(t, double) for t in (self.inv_dt, self.A_real, self.A_imag))
        a, b, c = torch.complex(-real.exp(), -imaginary), _complex(self.B, double), _complex(self.C, double)
        times = self.d_model // self.n_ssm
        return dt.exp(), a.repeat(times, 1), b.repeat(1, times, 1), c

    def discrete(self) -> Recurrence:
        """The system as it steps, made in fp64, without a gradient."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of states: complex64, or complex128 with parameters in fp64."""
        return torch.complex128 if self.C.dtype == torch.float64 else torch.complex64

    def default_state(self, *batch: int) -> Tensor:
        """The state of nothing seen, complex (*batch, H, n)."""
        return torch.zeros(*batch, self.d_model, self.d_state // 2, dtype=self.dtype, device=self.C.device)

    def _check(self, length: int, state: Tensor | None) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        shape = (self.d_model, self.d_state // 2)
        if state is not None and (state.dim() != 3 or tuple(state.shape[1:]) != shape or not state.is_complex()):
            raise ValueError(
                f"state must be complex (batch, {shape[0]}, {shape[1]}), got {state.dtype} {tuple(state.shape)}"
            )


class S4Kernel(_Kernel):
    """The convolution kernel of S4: A = diag(Λ) - Σ_r P_r P_r*, discretised by the bilinear transform.

    Its discrete Fourier transform is rational in the nodes: one Cauchy product with the poles dt Λ, and Woodbury's
    identity for the low-rank part, O(N + L) memory for each head. `C` is the parameter C̃ = C (I - Ā^l), with l =
    `l_kernel` (at first l_max), of the code of state-spaces/s4: the kernel then needs no power of Ā, but training dt or
    A also moves what C is.

    Further parameters: `P` (R, S, n, 2); the buffer `l_kernel`, for which C̃ was made; loaded as 0, as the original has
    it before its first forward, C is taken for C itself.

    Source: S4 (2111.00396), Algorithm 1, with C unconjugated and nodes exp(-2πi k/L), as in the code.
    """

    l_kernel: Tensor
    known = hippo.MEASURES

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        init: str | Sequence[str] = "legs",
        rank: int | None = None,
        double: bool | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        """
        Args:
            d_model: H, the number of systems.
            l_max: the longest sequence, at least 1.
            init: a measure of `hippo.MEASURES`, or several, among which the systems are divided.
            rank: R, at least that of the measures (2 for "legt", else 1), which it is by default.
            double: whether products are computed in fp64 with parameters in single precision. By default for "legt" and
                "fout": their normal parts hardly decay, so that poles come near nodes, where the terms of Woodbury's
                identity cancel (measured in single precision: gradients of dt are off by 1% to 80%; of "legs" by 2e-4).
            options: `d_state`, N, even (64 by default); `channels`, outputs of each (1); `n_ssm`, S, how many different
                A and B there are, which divides d_model (d_model); `dt_min` and `dt_max`, where steps are drawn (0.001
                and 0.1); `dt_tie`, whether the states of a system have one step (True).

        Raises:
            TypeError, ValueError: an argument outside its domain.
        """
        super().__init__(d_model, l_max, init, **options)
        least = max(2 if name == "legt" else 1 for name in self.inits)
        self.rank = least if rank is None else _positive("rank", rank)
        if self.rank < least:
            raise ValueError(f"rank must be at least {least} for {', '.join(self.inits)}, got {self.rank}")
        self.double_products = any(name != "legs" for name in self.inits) if double is None else bool(double)
        self.P = nn.Parameter(torch.empty(self.rank, self.n_ssm, self.d_state // 2, 2))
        # a number beside it, since a kernel that is compiled may not look into a tensor
        self.register_buffer("l_kernel", torch.tensor(l_max))
        self.length = l_max
        self.reset_parameters()

    def _initial(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        form = hippo.nplr(name, self.d_state)
        return form.w, F.pad(form.p, (0, 0, 0, self.rank - len(form.p))), form.b

    def _reset_more(self, p: Tensor) -> None:
        self.P.copy_(torch.view_as_real(p))
        self._attune(self.l_max)

    def _attune(self, length: int) -> None:
        """From C to C̃, for a kernel of this length."""
        self._times_powers(length, -1.0)
        self.length = length
        self.l_kernel.fill_(length)

    @torch.no_grad()
    def _times_powers(self, length: int, sign: float) -> None:
        """C <- C (I + sign Ā^length)."""
        matrix, _ = self._transition().dense()
        c = torch.view_as_complex(self.C.double())
        rows = torch.cat([c.real, -c.imag], -1)
        rows = rows + sign * torch.einsum("chi,hij->chj", rows, _power(matrix, length))
        self.C.copy_(torch.stack([rows[..., : c.shape[-1]], -rows[..., c.shape[-1] :]], -1))

    def double_length(self) -> None:
        """Make the kernel twice as long; what it is up to now does not change: C̃ <- C̃ (I + Ā^l)."""
        self._times_powers(self.length, 1.0)
        self.length *= 2
        self.l_kernel.fill_(self.length)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.length = int(self.l_kernel)
        if self.length == 0:
            self._attune(self.l_max)

    def _low_rank(self, double: bool = False) -> Tensor:
        """P (R, H, n)."""
        return _complex(self.P, double).repeat(1, self.d_model // self.n_ssm, 1)

    def forward(self, length: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The kernel, and what a state adds to the outputs.

        Args:
            length: L, of the kernel, up to `self.length`.
            state: complex (batch, H, n), what earlier inputs have left.

        Returns:
            K (channels, H, L), K_l = C Ā^l B̄, and C Ā^(l+1) state, (batch, channels, H, L), or None without a state.

        Raises:
            ValueError: length is outside 1 .. `self.length`, or the state has another shape.
        """
        self._check(length, state)
        if length > self.length:
            raise ValueError(f"length {length} is beyond the kernel's {self.length}: call double_length() before")
        dt, a, rows, columns = self._systems(self.double_products)
        p = self._low_rank(self.double_products)
        q = p.conj()
        if state is not None:
            # what comes of a state is what comes of an input at the step before: (I + dt/2 A) state = dt B u
            s = state.to(a.dtype)
            rest = torch.einsum("rhn,bhn->rbh", q, s).real.unsqueeze(-1) * 2
            s = s / dt + (s * a - (rest * p.unsqueeze(1)).sum(0)) / 2
            rows = torch.cat([s, rows])
        v = dt * torch.cat([rows, p]).unsqueeze(1) * torch.cat([columns, q])
        # Nodes z = 2 (1-ω)/(1+ω) = 2i tan(πk/L) with ω = e^(-2πi k/L), from fp64: powers of a rounded ω would drift.
        # The factor 2/(1+ω) is 1 + z/2, exact near the node ω = -1 where 1 + ω has no digits, so that the plain Cauchy
        # product keeps its precision at every finite node. At ω = -1 itself, with L even, the products vanish like
        # Σ v / z: what remains of (1 + z/2) Σ v / z is half the sum over the spectrum, and nothing of the low rank.
        size = self.length
        angles = torch.arange((size + 1) // 2, dtype=torch.float64, device=a.device) * (math.pi / size)
        z = torch.complex(torch.zeros_like(angles), 2 * angles.tan()).to(a.dtype)
        found = _eliminate(cauchy(v, z, dt * a), self.rank) * (1 + z / 2)
        if size % 2 == 0:
            last = v[: -self.rank, : -self.rank].sum(-1, keepdim=True).real
            found = torch.cat([found, last.to(found.dtype)], -1)
        k = torch.fft.irfft(found, n=size)[..., :length]
        if self.dtype == torch.complex64:
            k = k.float()
        return k[-1], None if state is None else k[:-1]

    def _transition(self) -> Recurrence:
        """The recurrence in fp64 but for its outputs: x' = (2/dt - A)^-1 ((2/dt + A) x + 2 B u) by Woodbury."""
        dt, a, b, c = self._systems(double=True)
        p = self._low_rank(double=True)
        q = p.conj()
        inverse, forward = 1 / (2 / dt - a), 2 / dt + a
        mixed = 2 * torch.einsum("rhn,shn->hrs", q * inverse, p).real
        eye = torch.eye(self.rank, dtype=mixed.dtype, device=mixed.device)
        solved = torch.linalg.solve((eye + mixed).to(a.dtype), (q * inverse).transpose(0, 1)).transpose(0, 1)
        rest = eye - 2 * torch.einsum("rhn,shn->hrs", solved, p).real
        w = torch.einsum("hrs,shn->rhn", rest.to(a.dtype), q) + solved * forward
        taken = 4 * torch.einsum("rhn,hn->rh", solved, b[0]).real
        out = p * inverse
        return Recurrence(inverse * forward, out, w, 2 * inverse * b[0] - (out * taken.unsqueeze(-1)).sum(0), c)

    @torch.no_grad()
    def discrete(self) -> Recurrence:
        found = self._transition()
        matrix, _ = found.dense()
        rows = torch.cat([found.c.real, -found.c.imag], -1).transpose(0, 1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # rows (I - Ā^l) = those of C̃
        rows = torch.linalg.solve(eye - _power(matrix, self.length), rows, left=False).transpose(0, 1)
        real, imaginary = rows.chunk(2, -1)
        return found._replace(c=torch.complex(real, -imaginary))


def _eliminate(table: Tensor, rank: int) -> Tensor:
    """r00 - r01 (I + r11)^-1 r10 of a table of products (rows + R, columns + R, ...).

    By Gaussian elimination without pivots: I + r11 has a Hermitian part of at least I on the imaginary axis, where the
    nodes are, as Λ decays, and so has what each step leaves.
    """
    for _ in range(rank):
        rows, columns, last = table[:-1, -1:], table[-1:, :-1], table[-1:, -1:]
        table = table[:-1, :-1] - rows * columns / (1 + last)
    return table


class S4DKernel(_Kernel):
    """The convolution kernel of S4D: A is diagonal, K a Vandermonde product.

    Source: S4D (2206.11893).
    """

    known = hippo.DIAGONALS

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        init: str | Sequence[str] = "legs",
        disc: Literal["zoh", "bilinear"] = "zoh",
        **options: Unpack[KernelOptions],
    ) -> None:
        """
        Args:
            d_model, l_max, options: as of `S4Kernel`; kernels may be longer than l_max.
            init: of `hippo.DIAGONALS`, or several.
            disc: how it is discretised: "zoh", inputs held constant between steps, or "bilinear".

        Raises:
            TypeError, ValueError: an argument outside its domain.
        """
        super().__init__(d_model, l_max, init, **options)
        hippo._known("disc", disc, ("zoh", "bilinear"))
        self.disc = disc
        self.reset_parameters()

    def _initial(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        a, b = hippo.diagonal(name, self.d_state)
        return a, a.new_empty(0, len(a)), b

    def _exponents(self, dt: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """log Ā, and B̄ / B."""
        x = dt * a
        if self.disc == "zoh":
            # e^x - 1 has no digits left where x is small
            return x, torch.expm1(x) / a
        return torch.log((1 + x / 2) / (1 - x / 2)), dt / (1 - x / 2)

    def forward(self, length: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `S4Kernel.forward`; any length."""
        self._check(length, state)
        dt, a, b, c = self._systems()
        x, factor = self._exponents(dt, a)
        rows = b * factor
        if state is not None:
            rows = torch.cat([state.to(a.dtype) * x.exp(), rows])
        k = vandermonde(rows.unsqueeze(1) * c, x, length)
        return k[-1], None if state is None else k[:-1]

    @torch.no_grad()
    def discrete(self) -> Recurrence:
        dt, a, b, c = self._systems(double=True)
        x, factor = self._exponents(dt, a)
        none = a.new_empty(0, *a.shape)
        return Recurrence(x.exp(), none, none, (b * factor)[0], c)


def advance(system: Recurrence, u: Tensor, state: Tensor | None = None) -> Tensor:
    """The state after a sequence of inputs, without a gradient.

    A diagonal system takes one transposed Vandermonde product. One with a low-rank part takes chunks of steps as matrix
    products, and puts them together in pairs, in O(L N + L N² / 64) operations a head.

    Args:
        system: in the precision in which powers are taken, fp64 at best.
        u: real (batch, H, L), L at least 0.
        state: complex (batch, H, n), before the first of them; None if there was nothing.

    Returns:
        complex (batch, H, n), in the precision of u.
    """
    if u.shape[-1] == 0 and state is not None:
        return state
    # nor are products in half precision, where autocast is on
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        return _advance(system, u, state)


def _advance(system: Recurrence, u: Tensor, state: Tensor | None) -> Tensor:
    length, real = u.shape[-1], u.dtype
    if len(system.p) == 0:
        # a factor of 0 has no logarithm, but is as good as one that e^-1000 is
        x = torch.where(system.a == 0, -1000.0, system.a.log())
        found = vandermonde_transpose(u.flip(-1).to(x.real.dtype), system.b, x)
        if state is not None:
            found = found + (x * length).exp() * state
        return found.to(real.to_complex())
    matrix, given = system.dense()
    chunk = min(_CHUNK, 1 << max(length - 1, 0).bit_length())
    # Ā^(chunk-1) B̄, ..., Ā B̄, B̄ by doubling
    inputs, power = given.unsqueeze(-1), matrix
    while inputs.shape[-1] < chunk:
        inputs, power = torch.cat([power @ inputs, inputs], -1), power @ power
    # what is missing of the first chunk is nothing: zeros before the state, which follows it
    count = max(1, -(-length // chunk))
    padded = F.pad(u.to(real), (count * chunk - length, 0)).transpose(0, 1)
    batch = u.shape[0]
    parts = padded.reshape(len(padded), batch * count, chunk) @ inputs.to(real).mT
    parts = parts.view(len(padded), batch, count, -1)
    while (count := parts.shape[2]) > 1:
        if count % 2:
            parts = F.pad(parts, (0, 0, 1, 0))
        early, late = parts[:, :, ::2], parts[:, :, 1::2]
        shape = early.shape
        parts = late + (early.reshape(shape[0], -1, shape[-1]) @ power.to(real).mT).view(shape)
        if count > 2:
            power = power @ power
    after = parts[:, :, 0]
    if state is not None:
        before = torch.cat([state.real, state.imag], -1).transpose(0, 1)
        after = after + before @ _power(matrix, length).to(real).mT
    return torch.complex(*after.transpose(0, 1).chunk(2, -1))


class _Convolution(nn.Module):
    """The kernel and the skip connection D (channels, H), under the original's names."""

    def __init__(self, kernel: S4Kernel | S4DKernel, channels: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(channels, kernel.d_model))
        self.kernel = kernel


class S4Layer(nn.Module):
    """A convolution over the sequence with S4's kernel, an activation, and a gated linear map of the features.

    y = GLU(W dropout(gelu(K * u + D u)) + b), causal unless it is bidirectional: then a second kernel reads what comes
    after each position, its first value the next position, as in the original. In `setup_step()` and `step()` the same
    layer runs token by token.

    Its state dict is that of the original's S4Block; GELU is applied once, as there in its standalone version.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        kernel: Literal["dplr", "diag"] = "dplr",
        channels: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        glu: bool = True,
        **options: Any,
    ) -> None:
        """
        Args:
            d_model: H, features.
            l_max: the longest sequence.
            kernel: "dplr" for `S4Kernel`, "diag" for `S4DKernel`.
            channels: outputs of the convolution for each feature.
            bidirectional: whether it also reads what comes after.
            dropout: after the activation, in [0, 1).
            glu: whether features are mixed and gated; else its output is (batch, L, channels H).
            options: of the kernel.

        Raises:
            TypeError, ValueError: an argument outside its domain.
        """
        super().__init__()
        hippo._known("kernel", kernel, ("dplr", "diag"))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        made = S4Kernel if kernel == "dplr" else S4DKernel
        outputs = _positive("channels", channels) * (2 if bidirectional else 1)
        self.d_model, self.bidirectional, self.channels = d_model, bidirectional, channels
        self.layer = _Convolution(made(d_model, l_max, channels=outputs, **options), channels)
        self.dropout = nn.Dropout(dropout)
        self.output_linear: nn.Module = (
            nn.Sequential(nn.Linear(channels * d_model, 2 * d_model), nn.GLU(-1)) if glu else nn.Identity()
        )
        self._recurrences: tuple[Recurrence, Recurrence] | None = None

    @property
    def kernel(self) -> S4Kernel | S4DKernel:
        return self.layer.kernel

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """(batch, L, H) to (batch, L, H); with the state that earlier inputs have left, if there were any.

        Raises:
            ValueError: x has another shape, is longer than the kernel, or a bidirectional layer is given a state.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (batch, L, {self.d_model}), got {tuple(x.shape)}")
        if state is not None and self.bidirectional:
            raise ValueError("state is what came before, and a bidirectional layer reads what comes after too")
        length = x.shape[1]
        if length == 0:
            return self._features(x.repeat(1, 1, self.channels))
        # no kernel is made, and no Fourier transform taken, in half precision
        u = _real(x).transpose(1, 2)
        k, more = self.kernel(length, state)
        size = 2 * length
        if self.bidirectional:
            k, after = k.chunk(2)
            k = F.pad(k, (0, length)) + F.pad(after.flip(-1), (length, 0))
        # padded so that the circular convolution wraps into nothing
        spectrum = torch.fft.rfft(u, n=size).unsqueeze(1) * torch.fft.rfft(k, n=size)
        y = torch.fft.irfft(spectrum, n=size)[..., :length] + _real(self.layer.D).unsqueeze(-1) * u.unsqueeze(1)
        if more is not None:
            y = y + more
        return self._features(y.flatten(1, 2).transpose(1, 2).to(x.dtype))

    def _features(self, y: Tensor) -> Tensor:
        return self.output_linear(self.dropout(F.gelu(y)))

    def setup_step(self) -> tuple[Recurrence, Recurrence]:
        """Make the recurrence of the parameters as they are now, which `step` and `extend` then use.

        Returns:
            It in fp64, and in the precision of states.

        Raises:
            ValueError: the layer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no recurrence")
        exact = self.kernel.discrete()
        self._recurrences = exact, exact.to(self.kernel.dtype)
        return self._recurrences

    def _made(self, given: tuple[Recurrence, Recurrence] | None) -> tuple[Recurrence, Recurrence]:
        found = self._recurrences if given is None else given
        if found is None:
            raise ValueError("there is no recurrence yet: call setup_step() before")
        return found

    def default_state(self, *batch: int) -> Tensor:
        """The state of nothing seen, complex (*batch, H, n)."""
        return self.kernel.default_state(*batch)

    def step(
        self, x: Tensor, state: Tensor, recurrences: tuple[Recurrence, Recurrence] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One position: its output (batch, H) and the state after it.

        Args:
            x: (batch, H).
            state: of `default_state`, `step` or `extend`.
            recurrences: what a call of `setup_step` returned, if not of its last.

        Raises:
            ValueError: `setup_step` was not called.
        """
        _, system = self._made(recurrences)
        u = _real(x)
        y, state = system.step(u, state)
        y = y + _real(self.layer.D) * u.unsqueeze(1)
        return self._features(y.flatten(1).to(x.dtype)), state

    def extend(
        self,
        x: Tensor,
        state: Tensor | None = None,
        recurrences: tuple[Recurrence, Recurrence] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the state after it: what as many steps give, at once. The state has no gradient."""
        exact, _ = self._made(recurrences)
        u = _real(x).transpose(1, 2)
        return self(x, state), advance(exact, u, state).to(self.kernel.dtype)


def from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of state-spaces/s4 under the names of `S4Layer`.

    Those of its S4Block are the same and stay as they are. Those of its minimal S4D (`D`, `kernel.log_dt`,
    `kernel.log_A_real`, `kernel.A_imag`, `kernel.C`, a 1x1 convolution as `output_linear.0`) become those of an S4Layer
    with kernel="diag". Its eigenvalues have positive imaginary parts, so C is conjugated; it has no B, which becomes 1.

    Args:
        state_dict: of the original's module, without a prefix.

    Raises:
        ValueError: there is no kernel in it that is known.
    """
    state = dict(state_dict)
    if "layer.kernel.C" in state:
        return state
    if not {"D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag"} <= state.keys():
        raise ValueError(f"state_dict is of no S4Block and of no S4D: it has {', '.join(sorted(state)[:8])}")
    c = state.pop("kernel.C")
    found = {
        "layer.D": state.pop("D")[None],
        "layer.kernel.inv_dt": state.pop("kernel.log_dt")[:, None],
        "layer.kernel.C": (c * c.new_tensor([1.0, -1.0]))[None],
        "layer.kernel.A_real": state.pop("kernel.log_A_real"),
        "layer.kernel.A_imag": state.pop("kernel.A_imag"),
        "layer.kernel.B": torch.stack([torch.ones_like(c[..., 0]), torch.zeros_like(c[..., 0])], -1)[None],
    }
    weight = state.pop("output_linear.0.weight", None)
    if weight is not None:
        found["output_linear.0.weight"] = weight.flatten(1)
    return {**found, **state}
