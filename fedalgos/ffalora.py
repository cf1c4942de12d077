"""FFA-LoRA: A stays at its first values; B and the head are trained and sent.

Sun et al., ICLR 2024, arXiv:2403.12313.  The mean of the B_i A is then the mean of the B_i
times A, and noise on B is noise on the product.  No A travels: nodes draw the first values
from the run's seed, or get them once, and a step is values for them to be put into.
"""

from __future__ import annotations

import numpy as np

from fedalgos.masks import Places, places_of, tensor_ranges
from fedalgos.method import Method
from fedalgos.space import ParamSpace
from fedalgos.sparse import Rules, SparseSettings, State, engine
from protocol.errors import ExperimentError
from protocol.payload import Dense, Flat, Payload


class FfaLora(SparseSettings, frozen=True, kw_only=True, tag="ffa-lora"):
    """Settings of FFA-LoRA: those of all sparse methods."""


def ffa_lora(o: FfaLora, space: ParamSpace, secret: bytes | None = None) -> Method[State]:
    """Build FFA-LoRA.

    Raises:
        ExperimentError: there is no A to freeze, or nothing else.
    """
    ranges = tensor_ranges(space, without=".lora_A.")
    free = places_of(ranges)
    if not 0 < len(free) < space.size:
        raise ExperimentError('[method] ffa-lora freezes LoRA\'s A: it needs peft.kind = "lora"')

    def held(x: Flat, round: int, tier: int) -> Places:
        del x, round, tier
        return free

    def read(initial: Flat, round: int, step: Payload) -> Flat:
        del round
        assert isinstance(step, Dense)
        x = np.array(initial, np.float32)
        if len(step.values) != len(free):
            raise ValueError(f"{len(step.values)} values, want {len(free)}")
        x[free] = step.values
        return x

    rules = Rules(
        held=held,
        num_sent=lambda round, tier: len(free),
        published=lambda w, x, round: free,
        write=lambda w, places: Dense(w[places]),
        read=read,
        trained=ranges,
    )
    return engine(o, space, rules, secret)
