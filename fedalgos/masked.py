"""Local training of a part of the parameters, and what a client remembers of its change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedalgos.masks import Places, restricted
from fedalgos.method import Batch, Memory, Oracle
from fedalgos.optim import Local, local_steps
from protocol.payload import Flat, Sparse


def train(
    optimiser: Local,
    start: Flat,
    oracle: Oracle,
    batches: Iterable[Batch],
    ranges: Sequence[tuple[int, int]] = (),
    mask: Places | None = None,
) -> tuple[Flat, float]:
    """The parameters after the last step, and the mean loss.

    With ``ranges`` the optimiser sees these alone, so that no decay moves the others.  With
    a ``mask`` it gets gradients that are zero elsewhere: what starts there at zero stays.
    """
    w, losses = oracle.start(start), []
    cuts = ranges or ((0, len(start)),)
    step_ = local_steps(optimiser, [w[a:b] for a, b in cuts])  # views
    marks = None
    if mask is not None:
        marks = oracle.array(restricted(np.ones_like(start), mask))
    for batch in batches:
        loss, g = oracle.grad(w, batch, ranges) if ranges else oracle.grad(w, batch)
        losses.append(loss)
        g = g if marks is None else g * marks
        step_([g[a:b] for a, b in cuts])
    return oracle.numpy(w).copy(), float(np.mean(losses))


def remember(memory: Memory, change: Flat, sent: Sparse) -> None:
    """Keep what was not sent, unless the run has come to nothing."""
    if np.isfinite(change).all():
        memory.value = change.copy()
        memory.value[sent.places] -= sent.values  # not 0: a coding may have rounded them
