"""A policy gradient of one's own: groups centred at their median, which a single very good sample does not move.

Run it in the root of the repository: `python examples/new_algorithm.py`, with options of `fastpo train` if you like.
It trains on the built-in task; with --model, --data and --reward.of on any other.
"""

import sys

import torch

from fastpo import algorithms
from fastpo.algorithms.rollouts import Estimate, Recipe
from fastpo.cli import main
from fastpo.reference import Domain


def median(seen, hyper):
    """Rewards less the median of their prompt's, cut at ±most."""
    advantages = torch.zeros_like(seen.rewards)
    for group in seen.groups.unique():
        mine = seen.groups == group
        advantages[mine] = seen.rewards[mine] - seen.rewards[mine].quantile(0.5)
    return Estimate(seen.per_token(advantages.clamp(-hyper["most"], hyper["most"])))


algorithms.register(
    Recipe(
        name="median_grpo",
        title="GRPO with the median as baseline",
        source="this example",
        loss="dapo",  # any row of fastpo.losses' policy losses
        estimate=median,
        penalty="loss",  # KL to the model before training, by --algorithm.beta
        numbers={"most": (1.0, Domain(0.0, low_open=True))},
    )
)

if __name__ == "__main__":
    sys.exit(main(["train", "median_grpo", *sys.argv[1:]]))
