"""Every function of fastpo in plain torch: the specification, the fallback and the tests' oracle."""

from fastpo.reference import pairwise as pairwise
from fastpo.reference import unpaired as unpaired
from fastpo.reference.registry import Domain, Objective, objective, objectives

__all__ = ["Domain", "Objective", "objective", "objectives", "pairwise", "unpaired"]
