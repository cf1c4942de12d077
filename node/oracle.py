"""The model as methods see it: losses and derivatives of one flat fp32 vector.

The trained parameters are views of one flat buffer.  A local run trains that buffer in
place (``start``); asking about any other vector copies it there first.  Perturbed
inference leaves it alone (``node.shift``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from node import device
from node.model import TrainedModel
from node.shift import Shifter
from node.task import Batch, TextTask
from protocol.errors import ModelError
from protocol.noise import Direction
from protocol.payload import Flat


class TorchOracle:
    """Implements ``fedalgos.method.Oracle`` for a model and a task."""

    def __init__(self, trained: TrainedModel, task: TextTask) -> None:
        self._model, self._task = trained.model, task
        self._names, self._parameters = trained.names, trained.parameters
        self._shapes = [tuple(p.shape) for p in self._parameters]
        self._sizes = [p.numel() for p in self._parameters]
        flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self._flat = flat
        for parameter, part in zip(self._parameters, self._parts(flat), strict=True):
            parameter.data = part  # from here on the model's own tensors are views
        starts = itertools.accumulate(self._sizes, initial=0)
        offsets = {id(p): start for p, start in zip(self._parameters, starts, strict=False)}
        self._shifter = Shifter(trained.model, offsets, task.label_rows)

    def initial(self) -> Flat:
        """The parameters that the model was loaded with, (size,); ask before anything else."""
        return self.numpy(self._flat).copy()

    def load(self, x: Flat) -> None:
        """Put parameters into the model for good, e.g. before it is scored or saved."""
        self._put(torch.from_numpy(x))

    def start(self, x: Flat) -> torch.Tensor:
        """The model's own buffer, set to ``x``."""
        self.load(x)
        return self._flat

    def array(self, x: Flat) -> torch.Tensor:
        return torch.tensor(x, device=self._flat.device)  # copies

    def numpy(self, x: torch.Tensor) -> Flat:
        out: Flat = x.detach().cpu().numpy()
        return out

    @torch.no_grad()
    def loss(self, x: torch.Tensor, batch: Batch) -> float:
        self._put(x)
        return float(self._task.loss(self._model, batch))

    def grad(
        self,
        x: torch.Tensor,
        batch: Batch,
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[float, torch.Tensor]:
        self._put(x)
        loss = self._task.loss(self._model, batch)
        gradients = torch.autograd.grad(loss, self._parameters)
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in gradients])

    def jvp(
        self, x: torch.Tensor, directions: Sequence[Direction], batch: Batch
    ) -> tuple[float, list[float]]:
        """Forward mode: tangents only on the tensors that the directions touch.

        Raises:
            ModelError: the model uses an operation without a forward rule.
        """
        self._put(x)
        pairs = [self._jvp(direction, batch) for direction in directions]
        return pairs[0][0], [slope for _, slope in pairs]

    @torch.no_grad()
    def _jvp(self, direction: Direction, batch: Batch) -> tuple[float, float]:
        tangent = self.array(direction.dense(len(self._flat)))
        touched = [p.any() for p in self._parts(tangent)]
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(parameter, part)  # type: ignore[no-untyped-call]
                for name, parameter, part, is_touched in zip(
                    self._names, self._parts(self._flat), self._parts(tangent), touched, strict=True
                )
                if is_touched
            }
            try:
                loss = self._task.loss(
                    lambda **inputs: torch.func.functional_call(self._model, duals, (), inputs),
                    batch,
                )
            except NotImplementedError as error:
                why = str(error).splitlines()[0]
                raise ModelError(f"no forward mode through this model: {why}") from error
            primal, derivative = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
        return float(primal), 0.0 if derivative is None else float(derivative)

    @torch.no_grad()
    def losses(
        self, x: torch.Tensor, direction: Direction, offsets: Sequence[float], batch: Batch
    ) -> tuple[float, ...]:
        """As ``Oracle.losses``.

        Raises:
            ModelError: the model reads a trained tensor outside of the module that owns it.
        """
        return self._shifter.run(
            x, direction, offsets, lambda: float(self._task.loss(self._model, batch))
        )

    def add_(self, x: torch.Tensor, alpha: float, direction: Direction) -> None:
        device.add_(x, alpha, direction)

    @torch.no_grad()
    def _put(self, x: torch.Tensor) -> None:
        if x.data_ptr() != self._flat.data_ptr():
            self._flat.copy_(x)

    def _parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(flat, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
