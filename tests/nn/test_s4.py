"""S4 and S4D: kernels against the systems they are of, step by step; the layer in its two forms; what it learns."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpo.nn import S4DKernel, S4Kernel, S4Layer, advance, from_original, hippo
from fastpo.nn.s4 import _eliminate

KERNELS = {
    "legs": (S4Kernel, {"init": "legs"}),
    "legt": (S4Kernel, {"init": "legt"}),
    "fout": (S4Kernel, {"init": "fout"}),
    "rank 3": (S4Kernel, {"init": "legs", "rank": 3}),
    "two of them": (S4Kernel, {"init": ("legs", "legt"), "n_ssm": 2}),
    "untied": (S4Kernel, {"init": "legs", "dt_tie": False}),
    "zoh": (S4DKernel, {"init": "inv"}),
    "bilinear": (S4DKernel, {"init": "lin", "disc": "bilinear"}),
    "untied zoh": (S4DKernel, {"init": "legs", "dt_tie": False, "n_ssm": 1}),
}
by_kernel = pytest.mark.parametrize("kind", KERNELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that share busy cores wait for each other, and the tensors here are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind, length, **more):
    """A kernel in fp64, with low-rank factors that no measure has."""
    made, options = KERNELS[kind]
    torch.manual_seed(length)
    kernel = made(**{"d_model": 4, "l_max": length, "channels": 2, "d_state": 8, **options, **more}).double()
    if made is S4Kernel:
        with torch.no_grad():
            kernel.P += 0.2 * torch.randn_like(kernel.P)
    return kernel


def both(half):
    """A half of conjugate pairs, and the other."""
    return torch.cat([half, half.conj()], -1)


class Explicit:
    """The system from its parameters alone, by dense matrices of the whole spectrum."""

    def __init__(self, kernel):
        heads = torch.arange(kernel.d_model) % kernel.n_ssm
        a = both(torch.complex(-kernel.A_real.exp(), -kernel.A_imag))[heads]
        b, c = both(torch.view_as_complex(kernel.B))[0, heads], both(torch.view_as_complex(kernel.C))
        matrix = torch.diag_embed(a)
        if isinstance(kernel, S4Kernel):
            p = both(torch.view_as_complex(kernel.P))[:, heads]
            matrix = matrix - torch.einsum("rhi,rhj->hij", p, p.conj())
        dt = kernel.inv_dt.exp()
        dt = (both(dt) if dt.shape[-1] > 1 else dt).to(matrix.dtype)
        eye = torch.eye(a.shape[-1], dtype=a.dtype)
        scaled = dt.unsqueeze(-1) * matrix
        if getattr(kernel, "disc", "bilinear") == "zoh":
            self.a = torch.linalg.matrix_exp(scaled)
            self.b = torch.linalg.solve(matrix, ((self.a - eye) @ b.unsqueeze(-1)))[..., 0]
        else:
            self.a = torch.linalg.solve(eye - scaled / 2, eye + scaled / 2)
            self.b = torch.linalg.solve(eye - scaled / 2, (dt * b).unsqueeze(-1))[..., 0]
        self.c = c
        if isinstance(kernel, S4Kernel):
            # what is stored is C (I - Ā^l)
            rest = eye - torch.linalg.matrix_power(self.a, kernel.length)
            self.c = torch.linalg.solve(rest, c.transpose(0, 1), left=False).transpose(0, 1)
        # Σ v / (z - w) has terms as large as one over this; and C̃ loses what I - Ā^l does
        decay = (dt.real * -a.real).min()
        self.loss = max(1.0, 1 / decay.item())

    def kernel(self, length, state=None):
        x, out = self.b if state is None else torch.einsum("hij,bhj->bhi", self.a, both(state)), []
        for _ in range(length):
            out.append(torch.einsum("chn,...hn->...ch", self.c, x))
            x = torch.einsum("hij,...hj->...hi", self.a, x)
        return torch.stack(out, -1).real

    def run(self, u, state):
        """y (batch, C, H, L) and the last state, by the recurrence."""
        x, out = both(state), []
        for each in u.unbind(-1):
            x = torch.einsum("hij,bhj->bhi", self.a, x) + self.b * each.unsqueeze(-1)
            out.append(torch.einsum("chn,bhn->bch", self.c, x).real)
        return torch.stack(out, -1), x.chunk(2, -1)[0]


EPS, EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps


def close(ours, exact, loss, rounds=16, eps=EPS):
    """Some roundings of terms that are so much larger than the result."""
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= rounds * eps * loss * exact.abs().max()


@by_kernel
@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_kernel_is_the_system_s_response(kind, length):
    for size in (2, 8, 32):
        kernel = build(kind, length, d_state=size)
        exact = Explicit(kernel)
        state = torch.randn(3, 4, size // 2, dtype=torch.complex128)
        for wanted in {length, (length + 1) // 2}:
            k, more = kernel(wanted, state)
            close(k, exact.kernel(wanted), exact.loss)
            close(more, exact.kernel(wanted, state), exact.loss)
            assert kernel(wanted)[1] is None


@by_kernel
@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
def test_recurrence_and_its_state(kind, length):
    kernel = build(kind, length)
    exact = Explicit(kernel)
    system = kernel.discrete()
    u = torch.randn(3, 4, length, dtype=torch.float64)
    for begin in (torch.randn(3, 4, 4, dtype=torch.complex128), kernel.default_state(3)):
        y, last = exact.run(u, begin)
        state, out = begin, []
        for each in u.unbind(-1):
            given, state = system.step(each, state)
            out.append(given)
        close(torch.stack(out, -1), y, exact.loss)
        close(state, last, 1.0, rounds=4 * length + 64)
        close(advance(system, u, begin), last, 1.0, rounds=4 * length + 64)
    close(advance(system, u), last, 1.0, rounds=4 * length + 64)
    assert torch.equal(advance(system, u[..., :0], begin), begin)


@pytest.mark.parametrize("kind", ["legs", "legt", "untied"])
def test_twice_as_long(kind):
    kernel = build(kind, 12)
    exact = Explicit(kernel)
    before = kernel(12)[0]
    kernel.double_length()
    assert kernel.length == int(kernel.l_kernel) == 24
    close(kernel(24)[0], exact.kernel(24), exact.loss)
    close(kernel(12)[0], before, exact.loss)
    close(kernel.discrete().c, exact.c.chunk(2, -1)[0], exact.loss)


def test_elimination_is_woodbury():
    torch.manual_seed(0)
    for rank in (1, 2, 4):
        table = torch.randn(3 + rank, 2 + rank, 5, dtype=torch.complex128)
        r00, r01 = table[:3, :2], table[:3, 2:]
        r10, r11 = table[3:, :2], table[3:, 2:] + 2 * torch.eye(rank)[..., None]
        table = torch.cat([table[:3], torch.cat([r10, r11], 1)])
        inverse = torch.linalg.inv((torch.eye(rank)[..., None] + r11).movedim(-1, 0)).movedim(0, -1)
        expected = r00 - torch.einsum("ijl,jkl,kml->iml", r01, inverse, r10)
        torch.testing.assert_close(_eliminate(table, rank), expected)


def test_small_steps_of_zoh():
    """e^x - 1 of small x: in single precision, the plain difference would be wrong by 1e-3 and more."""
    kernel = S4DKernel(4, 8, d_state=8, init="lin", dt_min=1e-7, dt_max=1e-6)
    exact = Explicit(kernel.double())
    k = kernel.float()(8)[0].double()
    close(k, exact.kernel(8), 1.0, rounds=64, eps=EPS32)


def test_a_step_that_forgets_everything():
    """Ā = 0: bilinear with dt A = -2. What is left is the last input."""
    kernel = S4DKernel(1, 4, d_state=2, init="real", disc="bilinear").double()
    with torch.no_grad():
        kernel.inv_dt.fill_(torch.tensor(2.0, dtype=torch.float64).log())
    kernel.A_real.data.zero_(), kernel.A_imag.data.zero_()
    system = kernel.discrete()
    system = system._replace(a=torch.zeros_like(system.a))
    u = torch.randn(2, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(advance(system, u, kernel.default_state(2)), u[..., -1:] * system.b)


@pytest.mark.parametrize("measure, length", [*itertools.product(hippo.MEASURES, (64, 1000)), ("legs", 16_384)])
def test_single_precision(measure, length):
    """Nodes to their last digit: powers of a rounded one leave the kernel wrong by 1.6e-3 at 16,384."""
    torch.manual_seed(0)
    kernel = S4Kernel(4, length, d_state=16, init=measure)
    double = S4Kernel(4, length, d_state=16, init=measure)
    double.load_state_dict(kernel.state_dict())
    double.double()
    grad = torch.randn(1, 4, length)
    values = [each(length)[0] for each in (kernel, double)]
    for value in values:
        value.backward(grad.to(value.dtype))
    assert values[0].dtype == torch.float32
    error = (values[0] - values[1]).abs().amax(-1) / values[1].abs().amax(-1)
    assert error.max() < 32 * EPS32
    for ours, exact in zip(kernel.parameters(), double.parameters(), strict=True):
        # that of dt is the sum of one of every state, which nearly cancel
        assert (ours.grad - exact.grad).norm() < 2**13 * EPS32 * exact.grad.norm()


@by_kernel
@pytest.mark.parametrize("length", [5, 6])
def test_gradients(kind, length):
    kernel = build(kind, length, d_model=2, d_state=4, dt_min=0.1, dt_max=0.5)
    with torch.no_grad():
        # FouT's first pole nearly coincides with a node
        kernel.A_real.clamp_(min=-1.0)
    names, values = zip(*kernel.named_parameters(), strict=True)
    state = torch.randn(2, 2, 2, dtype=torch.complex128, requires_grad=True)

    def response(state, *given):
        return torch.func.functional_call(kernel, dict(zip(names, given, strict=True)), (length, state))

    assert torch.autograd.gradcheck(response, (state, *values), fast_mode=True)


def test_gradients_of_the_layer():
    torch.manual_seed(0)
    for options in ({}, {"bidirectional": True}, {"channels": 2}):
        layer = S4Layer(2, 5, d_state=4, dt_min=0.1, dt_max=0.5, **options).double()
        x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


LAYERS = [
    {"kernel": "dplr"},
    {"kernel": "dplr", "init": "legt", "channels": 2},
    {"kernel": "diag", "init": "lin"},
    {"kernel": "diag", "disc": "bilinear", "glu": False, "channels": 3},
]


def layer_of(length=37, d_model=6, d_state=8, **options):
    torch.manual_seed(0)
    return S4Layer(d_model, length, d_state=d_state, **options).double().eval()


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_convolution_is_the_recurrence(options):
    layer = layer_of(**options)
    x = torch.randn(2, 37, 6, dtype=torch.float64)
    whole = layer(x)
    layer.setup_step()
    state, out = layer.default_state(2), []
    for each in x.unbind(1):
        y, state = layer.step(each, state)
        out.append(y)
    loss = 1e3 if options.get("init") != "legt" else 1e7
    close(torch.stack(out, 1), whole, loss)
    # in pieces, with the state passed on
    y, seen = layer.extend(x[:, :9])
    middle, seen = layer.extend(x[:, 9:30], seen)
    last, seen = layer.extend(x[:, 30:31], seen)
    end, seen = layer.step(x[:, 31], seen)
    close(torch.cat([y, middle, last, end[:, None]], 1), whole[:, :32], loss)
    close(layer(x[:, 9:20], layer.extend(x[:, :9])[1]), whole[:, 9:20], loss)
    assert layer(x[:, :0]).shape == (2, 0, whole.shape[-1])


def test_convolution_by_sums():
    """The layer from its kernel by a plain sum, both ways, with the skip connection and what follows it."""
    for bidirectional, channels in itertools.product((False, True), (1, 2)):
        layer = layer_of(length=9, bidirectional=bidirectional, channels=channels)
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        k = layer.kernel(9)[0]
        y = torch.einsum("blh,ch->blch", x, layer.layer.D)
        for t, s in itertools.product(range(9), repeat=2):
            if s <= t:
                y[:, t] += k[:channels, :, t - s] * x[:, s, None]
            elif bidirectional:
                y[:, t] += k[channels:, :, s - t - 1] * x[:, s, None]
        linear = layer.output_linear[0]
        found = F.glu(F.linear(F.gelu(y.flatten(2)), linear.weight, linear.bias), -1)
        close(layer(x), found, 1e3)


def test_nothing_flows_backwards():
    for options in LAYERS:
        layer = layer_of(**options)
        x = torch.randn(1, 37, 6, dtype=torch.float64)
        other = x.clone()
        other[:, 20:] = torch.randn(1, 17, 6, dtype=torch.float64)
        difference = (layer(x) - layer(other)).abs()
        assert difference[:, :20].max() < 1e-12 < 1e-3 < difference[:, 20:].max()


def test_dropout():
    layer = layer_of(dropout=0.5).train()
    x = torch.randn(2, 37, 6, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), layer_of()(x))


def test_half_precision():
    """Kernels and transforms are in single precision where parameters are not."""
    layer = S4Layer(8, 32, d_state=8).eval()
    x = torch.randn(2, 32, 8)
    exact = layer(x)
    layer.setup_step()
    state = layer.extend(x[:, :20])[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.extend(x[:, :20])[1], state)
    layer.bfloat16()
    found = layer(x.bfloat16())
    assert found.dtype == torch.bfloat16
    layer.setup_step()
    # what the rounding of parameters moves, which decays of up to 1/dt steps see 1e3 times: here 32 of them
    assert (found.float() - exact).norm() < 0.1 * exact.norm()
    y, state = layer.extend(x[:, :5].bfloat16())
    assert y.dtype == torch.bfloat16 and state.dtype == torch.complex64
    y, _ = layer.step(x[:, 5].bfloat16(), state)
    assert (y.float() - found[:, 5].float()).norm() < 0.05 * found[:, 5].float().norm()


@pytest.mark.parametrize(
    "options",
    [{"kernel": "dplr", "init": ("legs", "legt"), "channels": 2}, {"kernel": "diag", "bidirectional": True}],
    ids=str,
)
def test_compiled(options):
    layer = S4Layer(4, 16, d_state=8, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 11, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compiled(x)
    expected = layer(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def original_dplr(h=4, n=4, rank=1, channels=1, length=0):
    """A state dict with the names and shapes of the original's S4Block, as its constructors leave it."""
    torch.manual_seed(1)
    form = hippo.nplr("legs", 2 * n)
    real = torch.view_as_real
    return {
        "layer.D": torch.randn(channels, h),
        "layer.kernel.inv_dt": torch.empty(h, 1).uniform_(-6, -2),
        "layer.kernel.C": torch.randn(channels, h, n, 2),
        "layer.kernel.B": real(form.b.expand(1, h, n).contiguous()).float(),
        "layer.kernel.P": real(form.p.unsqueeze(1).expand(rank, h, n).contiguous()).float(),
        "layer.kernel.A_real": (-form.w.real).log().expand(h, n).float(),
        "layer.kernel.A_imag": (-form.w.imag).expand(h, n).float(),
        "layer.kernel.l_kernel": torch.tensor(length),
        "output_linear.0.weight": torch.randn(2 * h, h * channels),
        "output_linear.0.bias": torch.randn(2 * h),
    }


@pytest.mark.parametrize("length", [0, 12])
def test_weights_of_the_original(length):
    state = original_dplr(length=length)
    layer = S4Layer(4, 20, d_state=8)
    layer.load_state_dict(from_original(state))
    # never used, it is tuned to this layer's length; else it keeps its own
    assert layer.kernel.length == (length or 20)
    exact = Explicit(layer.kernel.double())
    c = torch.view_as_complex(state["layer.kernel.C"]).to(torch.complex128)
    if length:
        kept = both(c).transpose(0, 1) @ torch.linalg.inv(
            torch.eye(8, dtype=c.dtype) - torch.linalg.matrix_power(exact.a, length)
        )
        c = kept.transpose(0, 1).chunk(2, -1)[0]
    # stored in single precision, which C̃ of a small I - Ā^l feels
    k = layer.kernel(layer.kernel.length)[0]
    x, responses = exact.b, []
    for _ in range(k.shape[-1]):
        responses.append(torch.einsum("chn,hn->ch", both(c), x).real)
        x = (exact.a @ x.unsqueeze(-1))[..., 0]
    close(k, torch.stack(responses, -1), exact.loss, rounds=4, eps=EPS32)
    # and back: what is saved, it would load
    assert layer.state_dict().keys() == state.keys()
    for name, value in layer.state_dict().items():
        assert value.shape == state[name].shape, name


def test_weights_of_the_minimal_s4d():
    torch.manual_seed(1)
    h, n, length = 4, 6, 10
    state = {
        "D": torch.randn(h),
        "kernel.C": torch.randn(h, n, 2),
        "kernel.log_dt": torch.empty(h).uniform_(-6, -2),
        "kernel.log_A_real": torch.randn(h, n),
        "kernel.A_imag": 3.0 * torch.rand(h, n) * torch.arange(n),
        "output_linear.0.weight": torch.randn(2 * h, h, 1),
        "output_linear.0.bias": torch.randn(2 * h),
    }
    layer = S4Layer(h, length, kernel="diag", d_state=2 * n)
    layer.load_state_dict(from_original(state))
    layer.double()
    state = {name: value.double() for name, value in state.items()}
    u = torch.randn(2, h, length, dtype=torch.float64)
    # K_l = 2 Re Σ C (e^(dt A) - 1)/A e^(dt A l), with A = -e^log_A_real + i A_imag
    a = torch.complex(-state["kernel.log_A_real"].exp(), state["kernel.A_imag"])
    x = a * state["kernel.log_dt"].exp()[:, None]
    c = torch.view_as_complex(state["kernel.C"]) * torch.expm1(x) / a
    k = 2 * torch.einsum("hn,hnl->hl", c, (x.unsqueeze(-1) * torch.arange(length)).exp()).real
    y = torch.stack([(k[:, : t + 1].flip(-1) * u[..., : t + 1]).sum(-1) for t in range(length)], -1)
    y = F.gelu(y + state["D"][:, None] * u)
    expected = F.glu(F.conv1d(y, state["output_linear.0.weight"], state["output_linear.0.bias"]), 1)
    torch.testing.assert_close(layer(u.transpose(1, 2)).transpose(1, 2), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="state_dict is of no S4Block and of no S4D: it has weight"):
        from_original({"weight": torch.zeros(1)})


def test_copies_move_with_their_length():
    kernel = S4Kernel(2, 8, d_state=4)
    kernel.double_length()
    other = S4Kernel(2, 8, d_state=4)
    other.load_state_dict(kernel.state_dict())
    assert other.length == 16
    torch.testing.assert_close(other(16)[0], kernel(16)[0])


class Reader(nn.Module):
    """Symbols to embeddings, mixed along the sequence, to symbols."""

    def __init__(self, mix):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(4, 32), mix, nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.mix(self.embedding(x)))


class Bag(nn.Module):
    """What came before without its order: the mean, and the symbol at hand."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.inner(torch.cat([x, mean], -1))


def test_learns_a_delay():
    """The symbol of 48 positions before: a state remembers it, a bag does not."""
    found = {}
    for name, steps in (("s4", 240), ("bag", 240)):
        torch.manual_seed(0)
        mix = Bag() if name == "bag" else S4Layer(32, 128, d_state=32, dt_min=0.01)
        model = Reader(mix)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            x = torch.randint(4, (16, 128))
            F.cross_entropy(model(x)[:, 48:].flatten(0, 1), x[:, :-48].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        x = torch.randint(4, (32, 128))
        found[name] = (model(x)[:, 48:].argmax(-1) == x[:, :-48]).float().mean().item()
    assert found["s4"] > 0.9 and found["bag"] < 0.4, found


def test_errors():
    for made in (S4Kernel, S4DKernel):
        for name, value, error in (
            ("d_state", 7, "d_state must be even"),
            ("d_state", 0, "d_state must be at least 2"),
            ("channels", 0, "channels must be at least 1, got 0"),
            ("init", "hippo", "init must be one of .*, got 'hippo'"),
            ("init", (), "n_ssm 4 must be a multiple of the number of inits, 0"),
            ("n_ssm", 3, "n_ssm must divide d_model 4, got 3"),
            ("dt_min", 0.0, "dt_min and dt_max must be positive and in this order, got 0.0 and 0.1"),
        ):
            with pytest.raises(ValueError, match=error):
                made(4, 8, **{name: value})
        with pytest.raises(ValueError, match="l_max must be at least 1, got 0"):
            made(4, 0)
        with pytest.raises(TypeError, match="l_max must be an int, got float"):
            made(4, 8.0)
        kernel = made(4, 8, d_state=8)
        for length in (0, -1):
            with pytest.raises(ValueError, match=f"length must be at least 1, got {length}"):
                kernel(length)
        for state in (torch.zeros(2, 4, 8, dtype=torch.complex64), torch.zeros(2, 4, 4)):
            with pytest.raises(ValueError, match=r"state must be complex \(batch, 4, 4\), got torch"):
                kernel(4, state)
    with pytest.raises(ValueError, match=r"length 9 is beyond the kernel's 8: call double_length\(\) before"):
        S4Kernel(4, 8)(9)
    assert S4DKernel(4, 8)(9)[0].shape == (1, 4, 9)
    with pytest.raises(ValueError, match="rank must be at least 2 for legt, got 1"):
        S4Kernel(4, 8, init="legt", rank=1)
    with pytest.raises(ValueError, match="disc must be one of zoh, bilinear, got 'euler'"):
        S4DKernel(4, 8, disc="euler")
    with pytest.raises(ValueError, match="kernel must be one of dplr, diag, got 's5'"):
        S4Layer(4, 8, kernel="s5")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        S4Layer(4, 8, dropout=1)
    layer = S4Layer(4, 8, d_state=4)
    with pytest.raises(ValueError, match=r"there is no recurrence yet: call setup_step\(\) before"):
        layer.step(torch.zeros(1, 4), layer.default_state(1))
    with pytest.raises(ValueError, match=r"x must be \(batch, L, 4\), got \(2, 4\)"):
        layer(torch.zeros(2, 4))
    layer = S4Layer(4, 8, d_state=4, bidirectional=True)
    with pytest.raises(ValueError, match="a bidirectional layer has no recurrence"):
        layer.setup_step()
    with pytest.raises(ValueError, match="state is what came before"):
        layer(torch.zeros(1, 8, 4), torch.zeros(1, 4, 2, dtype=torch.complex64))
