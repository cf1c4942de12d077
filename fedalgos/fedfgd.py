"""FedFGD: the forward gradient of everything on every client; Spry without its split.

The baseline of Panchal et al., arXiv:2405.15551: what the split is worth.
"""

from __future__ import annotations

from fedalgos.forward import Forward, forward
from fedalgos.method import Method
from fedalgos.space import ParamSpace
from fedalgos.split import State, whole


class FedFGD(Forward, frozen=True, kw_only=True, tag="fedfgd"):
    """Settings of FedFGD."""


def fedfgd(o: FedFGD, space: ParamSpace, seed: int) -> Method[State]:
    """Build FedFGD over a parameter space; ``seed`` is the run's."""
    return forward(o, space, seed, whole, "nothing")
