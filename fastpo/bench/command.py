"""`fastpo bench`: one kernel, for someone who only installed the wheel."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastpo.bench.advantages import GaeCase, GroupCase
from fastpo.bench.flows import SubTbCase
from fastpo.bench.harness import BASELINE, OWN, Case, CheckFailedError
from fastpo.bench.linear_divergence import LinearDivergenceCase
from fastpo.bench.linear_dpo import LinearDpoCase
from fastpo.bench.linear_logprobs import LinearLogprobsCase
from fastpo.bench.listwise import OBJECTIVES as LIST_OBJECTIVES
from fastpo.bench.listwise import ListwiseCase
from fastpo.bench.objective import ObjectiveCase
from fastpo.bench.policy import PolicyCase
from fastpo.bench.processes import LEGEND, environment, heading, measure_in_processes, summarise, table
from fastpo.bench.state_space import PRODUCTS, StateSpaceCase
from fastpo.bench.token_logprobs import TokenLogprobsCase
from fastpo.bench.vocab_divergence import DIVERGENCES, VocabDivergenceCase
from fastpo.kernels.token_logprobs import STATISTICS
from fastpo.reference.listwise import MAX_ITEMS
from fastpo.reference.registry import objectives


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def list_length(text: str) -> int:
    value = positive(text)
    if value > MAX_ITEMS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_ITEMS}, got {value}")
    return value


def even(text: str) -> int:
    value = positive(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"must be even, got {value}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line of `fastpo bench`."""
    root = argparse.ArgumentParser(
        prog="fastpo bench",
        description="Time a kernel against eager torch, torch.compile, peer libraries and the hardware's "
        "floor; without the times of a provider whose result is wrong.",
    )
    kernels = root.add_subparsers(dest="kernel", required=True, metavar="KERNEL")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--processes", type=positive, default=5, help="fresh ones; 1 is this one (default 5)")
    common.add_argument("--repetitions", type=positive, default=9, help="samples per process (default 9)")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    backward = argparse.ArgumentParser(add_help=False)
    backward.add_argument("--backward", action="store_true", help="with the backward pass")
    help_ = "log-probs of target tokens from logits"
    add = kernels.add_parser("token_logprobs", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=TokenLogprobsCase.rows)
    add.add_argument("--vocab", type=positive, default=TokenLogprobsCase.vocab)
    add.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add.add_argument("--stats", nargs="+", choices=STATISTICS, default=[], metavar="STAT", help=", ".join(STATISTICS))
    _providers(add, TokenLogprobsCase.PROVIDERS)
    help_ = "divergences between two models' next-token distributions, from logits"
    add = kernels.add_parser("vocab_divergence", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=VocabDivergenceCase.rows)
    add.add_argument("--vocab", type=positive, default=VocabDivergenceCase.vocab)
    add.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add.add_argument("--divergence", choices=tuple(DIVERGENCES), default=VocabDivergenceCase.divergence)
    _providers(add, VocabDivergenceCase.PROVIDERS)
    help_ = "log-probs of target tokens from hidden states and the head's weight"
    add = kernels.add_parser("linear_logprobs", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=LinearLogprobsCase.rows)
    _head(add, LinearLogprobsCase)
    add.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    text = f"share of the rows that have no target (default {LinearLogprobsCase.prompt})"
    add.add_argument("--prompt", type=share, default=LinearLogprobsCase.prompt, help=text)
    add.add_argument("--frozen", action="store_true", help="the weight needs no gradient")
    _providers(add, LinearLogprobsCase.PROVIDERS)
    help_ = "DPO from hidden states, with the reference's forward and the backward"
    add = kernels.add_parser("linear_dpo", parents=[common], help=help_, description=help_)
    add.add_argument("--sequences", type=even, default=LinearDpoCase.sequences, help="both sides together")
    add.add_argument("--tokens", type=positive, default=LinearDpoCase.tokens, help="per sequence; half is prompt")
    _head(add, LinearDpoCase)
    _providers(add, LinearDpoCase.PROVIDERS)
    help_ = "divergences between two models' next-token distributions, from hidden states, with the backward"
    add = kernels.add_parser("linear_divergence", parents=[common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=LinearDivergenceCase.rows)
    _head(add, LinearDivergenceCase)
    add.add_argument("--divergence", choices=tuple(DIVERGENCES), default=LinearDivergenceCase.divergence)
    text = f"share of the rows that do not count (default {LinearDivergenceCase.prompt})"
    add.add_argument("--prompt", type=share, default=LinearDivergenceCase.prompt, help=text)
    _providers(add, LinearDivergenceCase.PROVIDERS)
    help_ = "pairwise losses with their metrics, from log-probs"
    add = kernels.add_parser("objective", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--pairs", type=positive, default=ObjectiveCase.pairs)
    add.add_argument("--tokens", type=positive, default=0, help="per sequence; without, summed log-probs")
    formulas = [row.name for row in objectives("pairwise") if ObjectiveCase.takes(row)]
    add.add_argument("--formula", choices=formulas, default=ObjectiveCase.formula)
    add.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    _providers(add, ObjectiveCase.PROVIDERS)
    help_ = "advantages and returns from rewards and values"
    add = kernels.add_parser("gae", parents=[common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=GaeCase.rows)
    add.add_argument("--tokens", type=positive, default=GaeCase.tokens)
    add.add_argument("--layout", choices=("dense", "ragged", "packed"), default=GaeCase.layout)
    _providers(add, GaeCase.PROVIDERS)
    help_ = "rewards normalised in ragged groups"
    add = kernels.add_parser("group_normalize", parents=[common], help=help_, description=help_)
    add.add_argument("--rewards", type=positive, default=GroupCase.rewards)
    add.add_argument("--shuffled", action="store_true", help="members of a group are not adjacent")
    _providers(add, GroupCase.PROVIDERS)
    help_ = "GRPO with its penalty and metrics, from log-probs of sampled tokens"
    add = kernels.add_parser("policy", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--sequences", type=positive, default=PolicyCase.sequences)
    add.add_argument("--tokens", type=positive, default=PolicyCase.tokens, help="per sequence, at most")
    add.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    _providers(add, PolicyCase.PROVIDERS)
    help_ = "SubTB of trajectories, from log-probs and flows"
    add = kernels.add_parser("subtb", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--rows", type=positive, default=SubTbCase.rows)
    add.add_argument("--tokens", type=positive, default=SubTbCase.tokens)
    _providers(add, SubTbCase.PROVIDERS)
    help_ = "losses on lists of completions with their rewards, from summed log-probs"
    add = kernels.add_parser("listwise", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--objective", choices=LIST_OBJECTIVES, default=ListwiseCase.objective)
    add.add_argument("--lists", type=positive, default=ListwiseCase.lists)
    add.add_argument("--items", type=list_length, default=ListwiseCase.items, help="per list")
    add.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    _providers(add, ListwiseCase.PROVIDERS)
    help_ = "the products of state-space layers: Cauchy (S4) or Vandermonde (S4D)"
    add = kernels.add_parser("state_space", parents=[backward, common], help=help_, description=help_)
    add.add_argument("--product", choices=PRODUCTS, default=StateSpaceCase.product)
    add.add_argument("--channels", type=positive, default=StateSpaceCase.channels)
    add.add_argument("--state", type=positive, default=StateSpaceCase.state, help="poles of one half")
    add.add_argument("--length", type=positive, default=StateSpaceCase.length)
    add.add_argument("--dtype", choices=("complex64", "complex128"), default="complex64")
    _providers(add, StateSpaceCase.PROVIDERS)
    return root


def _head(
    to: argparse.ArgumentParser, case: type[LinearLogprobsCase] | type[LinearDpoCase] | type[LinearDivergenceCase]
) -> None:
    to.add_argument("--hidden", type=positive, default=case.hidden, help=f"hidden size (default {case.hidden})")
    to.add_argument("--vocab", type=positive, default=case.vocab)


def _providers(to: argparse.ArgumentParser, every: tuple[str, ...]) -> None:
    names = [name for name in every if name not in (OWN, BASELINE)]
    text = f"besides {OWN} and {BASELINE}, of: {', '.join(names)} (default all)"
    to.add_argument("--providers", nargs="*", choices=names, metavar="NAME", help=text)


def main(argv: list[str]) -> int:
    """Run `fastpo bench` with these arguments; returns the exit code."""
    args = parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        print(f"fastpo bench: --json: there is no directory {args.json.parent}", file=sys.stderr)
        return 2
    case: Case
    if args.kernel == "token_logprobs":
        stats = tuple(dict.fromkeys(args.stats))
        case = TokenLogprobsCase(args.rows, args.vocab, args.dtype, stats, args.backward)
    elif args.kernel == "vocab_divergence":
        case = VocabDivergenceCase(args.rows, args.vocab, args.dtype, args.divergence, args.backward)
    elif args.kernel == "linear_logprobs":
        case = LinearLogprobsCase(
            args.rows, args.hidden, args.vocab, args.dtype, args.prompt, args.frozen, args.backward
        )
    elif args.kernel == "linear_dpo":
        case = LinearDpoCase(args.sequences, args.tokens, args.hidden, args.vocab)
    elif args.kernel == "linear_divergence":
        case = LinearDivergenceCase(args.rows, args.hidden, args.vocab, args.divergence, args.prompt)
    elif args.kernel == "gae":
        case = GaeCase(args.rows, args.tokens, args.layout)
    elif args.kernel == "group_normalize":
        case = GroupCase(args.rewards, args.shuffled)
    elif args.kernel == "policy":
        case = PolicyCase(args.sequences, args.tokens, args.dtype, args.backward)
    elif args.kernel == "subtb":
        case = SubTbCase(args.rows, args.tokens, args.backward)
    elif args.kernel == "listwise":
        case = ListwiseCase(args.objective, args.lists, args.items, args.dtype, args.backward)
    elif args.kernel == "state_space":
        case = StateSpaceCase(args.product, args.channels, args.state, args.length, args.dtype, args.backward)
    else:
        case = ObjectiveCase(args.pairs, args.tokens, args.formula, args.dtype, args.backward)
    where = environment()
    try:
        (runs,) = measure_in_processes([case], args.processes, only=args.providers, repetitions=args.repetitions)
    except CheckFailedError as error:
        print(f"fastpo bench: {error}; no time is reported", file=sys.stderr)
        return 1
    summary = summarise(runs)
    print(heading(where), table(summary), LEGEND, sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps({"environment": where, "cases": [summary]}, indent=2) + "\n")
    return 0
