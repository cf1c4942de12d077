"""Perturbed inference: a model run at x + s z for several s at once, a module at a time.

The trained tensors are never changed.  Whenever the model enters a module that has some,
those of this module alone are formed as x + s z in a scratch buffer, for all s from one
draw of z; so the extra memory is the largest module's, and nothing can drift.  The runs,
one for each s, go through the model in step: each is a greenlet that pauses before
every such module until the others have come as far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.nn import functional

from node import device, sites
from node.sites import Site
from protocol.errors import ModelError
from protocol.noise import Direction

Rows = torch.Tensor  # (n,) row numbers of a matrix


@dataclass
class _Shifted:
    """A module's tensors at all offsets; ``waiting`` runs have still to use them."""

    tensors: list[dict[str, torch.Tensor]]  # by run
    rows: Rows | None
    waiting: set[int]


@dataclass
class _Pass:
    """One call of ``Shifter.run``."""

    x: torch.Tensor
    direction: Direction
    offsets: np.ndarray[tuple[int], np.dtype[np.float32]]
    runs: list[Any] = field(default_factory=list)
    ready: dict[int, _Shifted] = field(default_factory=dict)  # by id of the site
    depth: list[int] = field(default_factory=list)  # modules entered, by run

    @property
    def current(self) -> int:
        return self.runs.index(getcurrent())


class Shifter:
    """Wraps the modules of a model that own trained tensors.

    Args:
        model: on its device.
        offsets: of each trained tensor in the flat vector, by the tensor's id.
        label_rows: modules whose output is wanted for some rows of their weight only,
            applied to the last position: an output head over a vocabulary.
    """

    def __init__(
        self, model: nn.Module, offsets: Mapping[int, int], label_rows: Mapping[nn.Module, Rows]
    ) -> None:
        self._label_rows = label_rows
        self._pass: _Pass | None = None
        self._scratch = torch.empty(0)
        self._is_scratch_free = True
        self._sites = sites.find(model, offsets)
        for site in self._sites:
            site.module.forward = self._forward(site, site.module.forward)

    def run(
        self,
        x: torch.Tensor,
        direction: Direction,
        offsets: Sequence[float],
        call: Callable[[], float],
    ) -> tuple[float, ...]:
        """``call()`` with the model at x + s z for each s.

        Raises:
            ModelError: the model reads a trained tensor outside of its module.
        """
        device.expect(x)
        p = _Pass(x, direction, np.array(offsets, np.float32))
        results: dict[int, float] = {}
        p.runs = [greenlet(lambda s=s: results.update({s: call()})) for s in range(len(offsets))]
        p.depth = [0] * len(offsets)
        with sites.away(self._sites):
            self._pass = p
            try:
                while any(not run.dead for run in p.runs):
                    for run in p.runs:
                        if not run.dead:
                            run.switch()
            except (RuntimeError, ValueError) as error:
                if not sites.reads_elsewhere(error):
                    raise
                why = "reads a trained tensor outside of the module that owns it"
                raise ModelError(f"perturbed inference: the model {why}: {error}") from error
            finally:
                for run in p.runs:
                    if not run.dead:
                        run.throw(GreenletExit)
                self._pass, self._is_scratch_free = None, True
        return tuple(results[s] for s in range(len(offsets)))

    def _forward(self, site: Site, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            p = self._pass
            if p is None:
                return inner(*args, **kwargs)
            run = p.current
            if p.depth[run] == 0:  # inside another site the others must not go on
                getcurrent().parent.switch()
            p.depth[run] += 1
            try:
                return self._at(p, run, site, inner, args, kwargs)
            finally:
                p.depth[run] -= 1

        return forward

    def _at(self, p: _Pass, run: int, site: Site, inner: Any, args: Any, kwargs: Any) -> Any:
        """One run's way through a module."""
        module = site.module
        if module in self._label_rows and args:
            with self._tensors(p, run, site, self._label_rows[module]) as own:
                return functional.linear(args[0][:, -1], own["weight"], own.get("bias"))
        if type(module) is nn.Embedding and module.max_norm is None and args:
            rows, inverse = args[0].unique(return_inverse=True)
            with self._tensors(p, run, site, rows) as own:
                return own["weight"][inverse]
        with self._tensors(p, run, site, None) as own:
            away = {name: module._parameters[name] for name in own}
            module._parameters.update(own)  # type: ignore[arg-type]
            try:
                return inner(*args, **kwargs)
            finally:
                module._parameters.update(away)

    @contextmanager
    def _tensors(
        self, p: _Pass, run: int, site: Site, rows: Rows | None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """This run's tensors of a module; the first to come makes them for all."""
        shifted = p.ready.get(id(site))
        same = shifted is not None and (rows is None or torch.equal(rows, shifted.rows))  # type: ignore[arg-type]
        if shifted is None or not same or run not in shifted.waiting:
            shifted = self._make(p, site, rows)
            p.ready[id(site)] = shifted
        shifted.waiting.discard(run)
        try:
            yield shifted.tensors[run]
        finally:
            if not shifted.waiting and p.ready.get(id(site)) is shifted:
                del p.ready[id(site)]
                self._is_scratch_free = not p.ready

    def _make(self, p: _Pass, site: Site, rows: Rows | None) -> _Shifted:
        count = len(p.offsets)
        sizes = {
            name: (shape.numel() if rows is None else len(rows) * shape[1:].numel())
            for name, (_, shape) in site.places.items()
        }
        buffer = self._buffer(count * sum(sizes.values()), p.x)
        tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        at = 0
        for name, (start, shape) in site.places.items():
            size = sizes[name]
            out = buffer[at : at + count * size].view(count, size)
            at += count * size
            if rows is None:
                self._fill(p, start, out)
                new_shape = shape
            else:
                width = shape[1:].numel()
                for i, row in enumerate(rows.tolist()):
                    self._fill(p, start + row * width, out[:, i * width : (i + 1) * width])
                new_shape = torch.Size((len(rows), *shape[1:]))
            for s in range(count):
                tensors[s][name] = out[s].view(new_shape)
        return _Shifted(tensors, rows, set(range(count)))

    def _fill(self, p: _Pass, start: int, out: torch.Tensor) -> None:
        """X + s z of the elements from ``start``, where the direction is not zero."""
        stop = start + out.shape[1]
        x = p.x[start:stop]
        if not any(a <= start and stop <= b for a, b in p.direction.ranges):
            out.copy_(x.expand_as(out))
        for a, b in p.direction.ranges:
            first, last = max(a, start), min(b, stop)
            if first < last:
                part = slice(first - start, last - start)
                device.shifted(x[part], p.direction, p.offsets, out[:, part], first)

    def _buffer(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """The scratch buffer, kept from call to call; a new one while that is in use."""
        if not self._is_scratch_free:
            return like.new_empty(size)
        self._is_scratch_free = False
        if len(self._scratch) < size or self._scratch.device != like.device:
            self._scratch = like.new_empty(size)
        return self._scratch[:size]
