"""Pairwise losses that the user writes as an expression: `fastpo.formula("softplus(-beta*(w-l))", beta=0.1)`.

The text is parsed once, against a white list, into a tree. The reference walks the tree with torch, which
differentiates it; device code comes from the C++ expression that the tree emits over the dual numbers of
csrc/formulas/dual.h. A function has one name and one meaning in both, at kinks and at the ends of its domain too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.kernels import _checks
from fastpo.kernels.objective import PairwiseOutput
from fastpo.losses._build import build
from fastpo.reference.pairwise import Pair
from fastpo.reference.registry import Domain, Objective

POLICY_VARIABLES = ("w", "l", "policy_w", "policy_l")
REFERENCE_VARIABLES = ("reference_w", "reference_l")
VARIABLES = POLICY_VARIABLES + REFERENCE_VARIABLES
# those that need the log-probs of a reference model
_RATIOS = frozenset(("w", "l", *REFERENCE_VARIABLES))

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 100  # of the tree; a sum of n terms is n deep
MAX_EXPONENT = 64
MAX_HYPER_PARAMETERS = 64  # as many as csrc/arguments.h has places for

# Literals, hyper-parameters and what is computed from them alone: Python numbers, or fp64 tensors without dimensions,
# which leave the dtype of the tensors that they meet alone.
Value = Tensor | float


def _gate(taken: Tensor, x: Tensor) -> Tensor:
    """x, with no gradient where `taken` is false, not even a NaN."""
    return torch.where(taken, x, x.detach())


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus is cut off beyond a threshold
    return -F.logsigmoid(-x)


def _log1mexp(x: Tensor) -> Tensor:
    near = x > -math.log(2)
    # 0 - y is +0 at y = 0, of whose inverse the sign matters
    return torch.where(near, torch.log(0 - torch.expm1(_gate(near, x))), torch.log1p(-torch.exp(_gate(~near, x))))


@dataclass(frozen=True)
class Function:
    """What may stand in an expression: its torch function and its C++ text, with {0}, {1}, ... for the arguments."""

    torch: Callable[..., Any]
    cpp: str
    arity: int
    # whether the torch function takes Python numbers too, and never raises on them
    numbers: bool = False


def _named(name: str, function: Callable[..., Any], arity: int = 1) -> Function:
    return Function(function, f"{name}({', '.join(f'{{{i}}}' for i in range(arity))})", arity)


FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "exp": _named("exp", torch.exp),
        "log": _named("log", torch.log),
        "log1p": _named("log1p", torch.log1p),
        "expm1": _named("expm1", torch.expm1),
        "log1mexp": _named("log1mexp", _log1mexp),
        "sqrt": _named("sqrt", torch.sqrt),
        "square": _named("square", torch.square),
        "abs": _named("abs", torch.abs),
        "relu": _named("relu", torch.relu),
        "sigmoid": _named("sigmoid", torch.sigmoid),
        "log_sigmoid": _named("log_sigmoid", F.logsigmoid),
        "softplus": _named("softplus", _softplus),
        "tanh": _named("tanh", torch.tanh),
        "minimum": _named("minimum", torch.minimum, 2),
        "maximum": _named("maximum", torch.maximum, 2),
        "clip": _named("clip", torch.clamp, 3),
        "where": _named("where", torch.where, 3),
        "detach": _named("detach", torch.detach),
    }
)

_ADD = Function(operator.add, "({0} + {1})", 2, numbers=True)
_SUBTRACT = Function(operator.sub, "({0} - {1})", 2, numbers=True)
_MULTIPLY = Function(operator.mul, "({0} * {1})", 2, numbers=True)
_NEGATE = Function(operator.neg, "(-{0})", 1, numbers=True)
_DIVIDE = Function(torch.div, "({0} / {1})", 2)
_BINARY: dict[type[ast.operator], Function] = {
    ast.Add: _ADD,
    ast.Sub: _SUBTRACT,
    ast.Mult: _MULTIPLY,
    ast.Div: _DIVIDE,
}
_COMPARISONS: dict[type[ast.cmpop], Function] = {
    ast.Lt: Function(torch.lt, "({0} < {1})", 2),
    ast.LtE: Function(torch.le, "({0} <= {1})", 2),
    ast.Gt: Function(torch.gt, "({0} > {1})", 2),
    ast.GtE: Function(torch.ge, "({0} >= {1})", 2),
}

_ALLOWED = (
    f"allowed are numbers, the variables {', '.join(VARIABLES)}, hyper-parameters given as keywords, parentheses, "
    f"+ - * /, ** with a literal exponent from -{MAX_EXPONENT} to {MAX_EXPONENT}, the functions "
    f"{', '.join(FUNCTIONS)}, and one comparison (<, <=, >, >=) as the condition of where"
)


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"formula: {what}; {_ALLOWED}")


@dataclass(frozen=True)
class Leaf:
    """A number, a hyper-parameter or a variable."""

    # repr of a number, or a name
    text: str
    number: float = 0.0

    @property
    def variables(self) -> frozenset[str]:
        return frozenset((self.text,)) & frozenset(VARIABLES)

    @property
    def policies(self) -> frozenset[str]:
        return self.variables - frozenset(REFERENCE_VARIABLES)

    def evaluate(self, names: Mapping[str, Value], like: Tensor) -> Value:
        return names.get(self.text, self.number)

    def cpp(self, hyper_names: tuple[str, ...]) -> str:
        return f"h[{hyper_names.index(self.text)}]" if self.text in hyper_names else self.text


@dataclass(frozen=True)
class Call:
    """A function or operator and its arguments."""

    function: Function
    arguments: tuple[Node, ...]
    # on which the value depends
    variables: frozenset[str]
    # through which a gradient flows
    policies: frozenset[str]

    def evaluate(self, names: Mapping[str, Value], like: Tensor) -> Value:
        def tensor(value: Value) -> Tensor:
            return value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)

        if self.function is FUNCTIONS["where"]:
            # autograd multiplies the branch not taken by 0, which is NaN where its slope is infinite; shut off at the
            # leaves, it has no influence, as in C++
            taken = tensor(self.arguments[0].evaluate(names, like))
            yes, no = (
                tensor(branch.evaluate({**names, **{n: _gate(mask, tensor(names[n])) for n in branch.policies}}, like))
                for branch, mask in zip(self.arguments[1:], (taken, ~taken), strict=True)
            )
            chosen = torch.where(taken, yes, no)
            # two numbers of fp64 become the numbers of many pairs here
            return chosen.to(like.dtype) if self.variables else chosen
        values = [argument.evaluate(names, like) for argument in self.arguments]
        return self.function.torch(*(values if self.function.numbers else [tensor(value) for value in values]))

    def cpp(self, hyper_names: tuple[str, ...]) -> str:
        texts = []
        for argument in self.arguments:
            text = argument.cpp(hyper_names)
            # constants have slopes of 0, which an infinite derivative inside them would make NaN
            if isinstance(argument, Call) and argument.function not in _WITHOUT_SLOPES:
                constant = argument.variables and not argument.policies
                text = f"detach({text})" if constant and self.policies else text
            texts.append(text)
        if self.function is FUNCTIONS["where"] and self.arguments[0].variables:
            # two numbers do not say of which type the result is
            if not (self.arguments[1].variables or self.arguments[2].variables):
                texts[1] = f"lift<D>({texts[1]})"
        return self.function.cpp.format(*texts)


Node = Leaf | Call

_WITHOUT_SLOPES = frozenset((*_COMPARISONS.values(), FUNCTIONS["detach"]))


def _call(function: Function, *arguments: Node) -> Call:
    variables = frozenset[str]().union(*(a.variables for a in arguments))
    policies = frozenset[str]().union(*(a.policies for a in arguments))
    return Call(function, arguments, variables, frozenset() if function in _WITHOUT_SLOPES else policies)


def _number(value: float) -> Leaf:
    return Leaf(repr(value), value)


def _power(base: Node, exponent: float) -> Node:
    """base ** exponent; what has a simpler form gets it here, so that torch and C++ take the same."""
    size = abs(exponent)
    if exponent < 0 and (size.is_integer() or size == 0.5):
        return _call(_DIVIDE, _number(1.0), _power(base, size))
    if exponent == 0.5:
        return _call(FUNCTIONS["sqrt"], base)
    if exponent.is_integer():
        n = int(exponent)
        return _call(Function(functools.partial(torch.pow, exponent=n), f"power<{n}>({{0}})", 1), base)
    return _call(Function(functools.partial(torch.pow, exponent=exponent), f"power({{0}}, {exponent!r})", 1), base)


class _Parser:
    """From the syntax tree of Python to ours, by white list."""

    def __init__(self, hyper_parameters: Mapping[str, float]) -> None:
        self.hyper_parameters = hyper_parameters
        self.used: set[str] = set()

    def parse(self, text: str) -> Node:
        if not text.strip():
            _refuse("the expression is empty")
        if len(text) > MAX_LENGTH:
            _refuse(f"the expression has {len(text)} characters, more than {MAX_LENGTH}")
        try:
            syntax = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            _refuse(f"{text!r} is no expression ({error.msg})")
        except (ValueError, RecursionError, MemoryError) as error:
            _refuse(f"{text!r} is no expression, or nested too deeply ({error})")
        _check_depth(syntax)
        node = self.node(syntax)
        for name in self.hyper_parameters:
            if name not in self.used:
                _refuse(f"the hyper-parameter {name!r} does not occur in {text!r}")
        if not node.policies:
            _refuse(f"{text!r} depends on no policy variable ({', '.join(POLICY_VARIABLES)}): it has no gradient")
        return node

    def node(self, syntax: ast.expr) -> Node:
        match syntax:
            case ast.Constant():
                return _number(self.number(syntax))
            case ast.Name(id=name):
                return self.name(name)
            case ast.UnaryOp(op=ast.USub()):
                return _call(_NEGATE, self.node(syntax.operand))
            case ast.BinOp(op=ast.Pow()):
                return _power(self.node(syntax.left), self.exponent(syntax))
            case ast.BinOp() if type(syntax.op) in _BINARY:
                left, right = self.node(syntax.left), self.node(syntax.right)
                return _call(_BINARY[type(syntax.op)], left, right)
            case ast.Call():
                return self.call(syntax)
            case ast.Compare():
                _refuse(f"the comparison {ast.unparse(syntax)!r} is not the condition of a where")
        _refuse(f"{ast.unparse(syntax)!r} ({type(syntax).__name__}) may not stand in a formula")

    def number(self, syntax: ast.Constant) -> float:
        value = syntax.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _refuse(f"{value!r} is not a number")
        return _finite(f"the number {ast.unparse(syntax)}", value)

    def name(self, name: str) -> Leaf:
        if name in self.hyper_parameters:
            self.used.add(name)
        elif name in FUNCTIONS:
            _refuse(f"the function {name!r} has no arguments")
        elif name not in VARIABLES:
            _refuse(f"unknown name {name!r}, neither a variable nor a hyper-parameter")
        return Leaf(name)

    def exponent(self, syntax: ast.BinOp) -> float:
        literal, sign = syntax.right, 1.0
        if isinstance(literal, ast.UnaryOp) and isinstance(literal.op, ast.USub):
            literal, sign = literal.operand, -1.0
        if not isinstance(literal, ast.Constant):
            _refuse(f"the exponent of {ast.unparse(syntax)!r} is not a literal (exp(p * log(x)) has any exponent p)")
        exponent = sign * self.number(literal)
        if abs(exponent) > MAX_EXPONENT:
            _refuse(f"the exponent of {ast.unparse(syntax)!r} is too large")
        return exponent

    def call(self, syntax: ast.Call) -> Node:
        text = ast.unparse(syntax)
        name = ast.unparse(syntax.func)
        if name not in FUNCTIONS:
            _refuse(f"{name!r} is not a function of formulas")
        function = FUNCTIONS[name]
        if syntax.keywords or any(isinstance(a, ast.Starred) for a in syntax.args):
            _refuse(f"{text!r}: arguments are given by place")
        if len(syntax.args) != function.arity:
            _refuse(f"{text!r}: {name} takes {function.arity} arguments, got {len(syntax.args)}")
        if name == "where":
            condition = self.condition(syntax.args[0])
            return _call(function, condition, *(self.node(a) for a in syntax.args[1:]))
        arguments = [self.node(a) for a in syntax.args]
        if name == "clip" and (arguments[1].variables or arguments[2].variables):
            _refuse(f"{text!r}: the bounds of clip are numbers and hyper-parameters; minimum and maximum take any")
        return _call(function, *arguments)

    def condition(self, syntax: ast.expr) -> Node:
        if not isinstance(syntax, ast.Compare):
            _refuse(f"the condition {ast.unparse(syntax)!r} is not a comparison")
        if len(syntax.ops) != 1 or type(syntax.ops[0]) not in _COMPARISONS:
            _refuse(f"the condition {ast.unparse(syntax)!r} is not one of <, <=, >, >=")
        left, right = (self.node(s) for s in (syntax.left, syntax.comparators[0]))
        return _call(_COMPARISONS[type(syntax.ops[0])], left, right)


def _check_depth(syntax: ast.AST) -> None:
    # level by level: recursion, ours and that of ast.unparse, is for what has passed
    level = [syntax]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        _refuse(f"the expression is nested more than {MAX_DEPTH} deep")


def _finite(name: str, value: object) -> float:
    try:
        number = _checks.number(f"formula: {name}", value)
    except OverflowError:  # an int
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"formula: {name} must be finite, got {number}")
    return number


class Expression:
    """A parsed expression: what a registry row of a user's loss has as its formula.

    Attributes:
        text: the expression.
        hyper_names: names of its hyper-parameters, sorted.
        source: C++ over `w, l, policy_w, policy_l, reference_w, reference_l` of type `D = Dual<T, k>` and
            `const double* h`, the hyper-parameters in the order of `hyper_names`. Its type is D.
        reference_model: whether it needs log-probs of a reference model.
    """

    def __init__(self, text: str, hyper_parameters: Mapping[str, float]) -> None:
        self.text = text
        self.hyper_names = tuple(sorted(hyper_parameters))
        self._root = _Parser(hyper_parameters).parse(text)
        self.source = self._root.cpp(self.hyper_names)
        self.reference_model = not self._root.variables.isdisjoint(_RATIOS)
        # the row takes its documentation from here
        self.__doc__ = (
            f"The pairwise loss {text}\n\n"
            "w and l are the log-ratios log(π/π_ref) of the chosen and the rejected completion, policy_* and\n"
            "reference_* the log-probs; with length_norm, per-token averages. Rewards are beta times the log-ratios,\n"
            "with beta = 1 where the formula has no such hyper-parameter."
        )

    def __call__(self, pair: Pair, **hyper: float) -> Tensor:
        """The loss (B,) of pairs, by torch, which can differentiate it."""
        names: dict[str, Value] = {
            **hyper,
            "w": pair.chosen_logratio,
            "l": pair.rejected_logratio,
            "policy_w": pair.chosen,
            "policy_l": pair.rejected,
            "reference_w": (pair.chosen - pair.chosen_logratio).detach(),
            "reference_l": (pair.rejected - pair.rejected_logratio).detach(),
        }
        loss = self._root.evaluate(names, pair.chosen)
        assert isinstance(loss, Tensor)  # it depends on a variable
        return loss


@dataclass(frozen=True, eq=False, repr=False)
class Formula:
    """A pairwise loss made by `fastpo.formula` and called like those of `fastpo.losses`: see `__doc__` and
    `inspect.signature` of the instance.

    Attributes:
        row: a row like those of the registry, which it has not entered; its `formula` is `parsed`.
        parsed: the expression.
    """

    row: Objective
    parsed: Expression
    _loss: Callable[..., PairwiseOutput] = field(init=False)

    def __post_init__(self) -> None:
        loss = build(self.row)
        object.__setattr__(self, "_loss", loss)
        object.__setattr__(self, "__doc__", loss.__doc__)
        object.__setattr__(self, "__signature__", inspect.signature(loss))

    @property
    def expression(self) -> str:
        """The text that was given."""
        return self.parsed.text

    @property
    def hyper_parameters(self) -> Mapping[str, float]:
        """The hyper-parameters and their defaults."""
        return self.row.defaults

    @property
    def hyper_names(self) -> tuple[str, ...]:
        """Their names, sorted: their places in the array `h` of `source`."""
        return self.parsed.hyper_names

    @property
    def source(self) -> str:
        """The C++ expression (see `Expression`)."""
        return self.parsed.source

    def __call__(self, *args: Any, **kwargs: Any) -> PairwiseOutput:
        return self._loss(*args, **kwargs)

    def __repr__(self) -> str:
        hyper = "".join(f", {name}={value!r}" for name, value in self.hyper_parameters.items())
        return f"fastpo.formula({self.expression!r}{hyper})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.expression, dict(self.hyper_parameters))


def _rebuild(expression: str, hyper_parameters: dict[str, float]) -> Formula:
    return formula(expression, **hyper_parameters)


def formula(expression: str, /, **hyper_parameters: float) -> Formula:
    """A pairwise loss from a Python expression, e.g. `formula("softplus(-beta*(w-l))", beta=0.1)`, which is DPO.

    Variables, one number per pair each:
        w, l: log-ratios log(π/π_ref) of the chosen (winning) and the rejected (losing) completion.
        policy_w, policy_l: their log-probs under the policy.
        reference_w, reference_l: their log-probs under the reference model; constants.
    With `length_norm=True` all of them are per-token averages. If only policy_w and policy_l occur, the loss has no
    reference model and takes no reference arguments.

    Operators: + - * / and unary -; ** with a literal exponent from -64 to 64. A base may be negative only under an
    integer; under any other exponent its power is NaN.

    Functions: exp, log, log1p, expm1, log1mexp (log(1 - e^x)), sqrt, square, abs, relu, sigmoid, log_sigmoid,
    softplus, tanh, minimum(a, b), maximum(a, b), clip(x, low, high) with constant bounds, detach(x), and
    where(a < b, x, y) with one of <, <=, >, >=, in which the branch that is not taken has no influence, not even as
    a NaN gradient. Gradients at kinks are torch's: 0 for abs and relu, half for each side of a tie of minimum and
    maximum, 1 on the bounds of clip.

    Args:
        expression: the text. It is parsed against a white list, never executed.
        hyper_parameters: the defaults of the names in it that are no variables. All finite values are admitted.

    Returns:
        A Formula, to be called like `fastpo.losses.dpo`: policy_chosen, policy_rejected and, where the loss has a
        reference model, reference_chosen, reference_rejected; by keyword the hyper-parameters, masks and cu_seqlens,
        length_norm with lengths, reduction, num_items. It returns a PairwiseOutput, whose rewards are beta times the
        log-ratios if there is a hyper-parameter of that name, else the log-ratios themselves.

    Raises:
        TypeError: the expression is no str, or a hyper-parameter no number.
        ValueError: the expression holds anything else than the above, is empty, too long or too deep, or depends on
            no policy variable; a hyper-parameter is not finite, is not used, or has the name of something else. The
            message names it.
    """
    if not isinstance(expression, str):
        raise TypeError(f"formula: the expression must be a str, got {type(expression).__name__}")
    for name in hyper_parameters:
        if name in VARIABLES or name in FUNCTIONS or name.startswith("_"):
            kind = "variable" if name in VARIABLES else "function" if name in FUNCTIONS else "private name"
            raise ValueError(f"formula: the hyper-parameter {name!r} has the name of a {kind}: rename it")
    if len(hyper_parameters) > MAX_HYPER_PARAMETERS:
        raise ValueError(f"formula: {len(hyper_parameters)} hyper-parameters, more than {MAX_HYPER_PARAMETERS}")
    defaults = {name: _finite(name, value) for name, value in hyper_parameters.items()}
    parsed = Expression(expression, defaults)
    row = Objective(
        name="formula",
        kind="pairwise",
        title="an expression given by the user",
        paper="evaluated as written",
        equation=f"with the hyper-parameters {', '.join(defaults) or 'none'}",
        formula=parsed,
        defaults=MappingProxyType({}),
        domains=MappingProxyType({}),
        reference_model=parsed.reference_model,
        lengths="optional",
        theory="property",
    )
    for name in inspect.signature(build(row)).parameters:
        if name in defaults:
            raise ValueError(f"formula: the hyper-parameter {name!r} has the name of an argument of losses: rename it")
    domains = MappingProxyType(dict.fromkeys(defaults, Domain()))
    return Formula(replace(row, defaults=MappingProxyType(defaults), domains=domains), parsed)
