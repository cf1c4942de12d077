"""A model whose frozen weights are dealt among the ranks of a node, by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from node import fsdp, layout
from node.engine import Ranks, Setup
from node.lead import Lead
from node.worker import Worker
from protocol import experiment as experiments
from protocol.errors import ModelError
from protocol.messages import Failed, Ready
from tests.test_group_processes import ALONE, TASK, causal, csv, following, sent
from tests.test_worker import step_to, told

__all__ = ["csv"]  # a fixture

pytestmark = [pytest.mark.net, pytest.mark.slow, pytest.mark.timeout(600)]

FEDAVG: Mapping[str, Any] = {"name": "fedavg", "local": {"kind": "sgd", "lr": 0.1}}


@contextmanager
def dealt(experiment: experiments.Experiment, size: int) -> Iterator[Lead]:
    lead = Lead(experiment, ALONE, Ranks(size, patience_seconds=120.0, fsdp=True))
    try:
        told(lead.ready(), Ready)
        yield lead
    finally:
        lead.close()


def by_itself(experiment: experiments.Experiment) -> Worker:
    worker = Worker(experiment, ALONE)
    worker.ready()
    return worker


def kept(worker: Worker) -> int:
    """Bytes of frozen weights in the blocks of the model that this process has."""
    trainee: Any = worker.trainee
    blocks = layout.blocks(trainee._trained.model).values()
    frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)


def test_gradients_of_three_parts_of_a_model_and_the_loss_of_two(csv: Path) -> None:
    """Five rows by micro-batches of 1 are 1, 2 and 2 to a rank: one has to wait for the others."""
    compute = experiments.Compute(micro_batch=1, checkpointing=True)
    wanted = msgspec.structs.replace(causal(csv, **FEDAVG), compute=compute)
    alone = by_itself(wanted)
    want = sent(alone.run(TASK, None))
    assert np.abs(want - alone.x).max() > 1e-3
    with dealt(wanted, 3) as lead:
        assert kept(lead._worker) < 0.4 * kept(alone)
        np.testing.assert_allclose(sent(lead.run(TASK, None)), want, rtol=1e-6, atol=1e-6)

        def kill(done: int, total: int) -> None:
            if done == 1:
                following()[0].kill()

        failed = told(lead.run(TASK, None, kill), Failed)
        assert "killed by signal 9" in failed.reason
        x = alone.x + np.float32(0.01)
        assert lead.run(*step_to(x)) is None  # while nobody has the rest of the model
        assert alone.run(*step_to(x)) is None
        second = msgspec.structs.replace(TASK, version=1, round=2)
        want = sent(alone.run(second, None))
        np.testing.assert_allclose(sent(lead.run(second, None)), want, rtol=1e-6, atol=1e-6)
        assert kept(lead._worker) < 0.4 * kept(alone)


@pytest.mark.parametrize(("name", "dtype"), [("decomfl", "int8"), ("spry", "bf16")])
def test_passes_without_gradients_are_those_of_a_whole_model(
    csv: Path, name: str, dtype: Any
) -> None:
    model = experiments.Model(id="random:llama-tiny", dtype=dtype)
    wanted = causal(csv, name=name, perturbations=3)
    wanted = msgspec.structs.replace(wanted, model=model)
    want = sent(by_itself(wanted).run(TASK, None))
    with dealt(wanted, 2) as lead:
        got = sent(lead.run(TASK, None))
    assert np.abs(want).max() > 0
    assert got.tobytes() == want.tobytes()


def test_a_fault_inside_of_a_pass_fails_the_task_and_not_the_node(
    csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = causal(csv, **FEDAVG)
    want = sent(by_itself(wanted).run(TASK, None))
    with dealt(wanted, 2) as lead:
        oracle: Any = lead._worker.trainee.oracle

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(oracle, "grad", full)
            failed = told(lead.run(TASK, None), Failed)
        assert "a pass of a dealt model broke off: OutOfMemoryError: no more" in failed.reason
        np.testing.assert_allclose(sent(lead.run(TASK, None)), want, rtol=1e-6, atol=1e-6)


def test_a_model_is_tried_out_before_its_parts_are_in_different_places(csv: Path) -> None:
    """On a CPU alone all places are one; the device "meta" takes no numbers from another."""
    setup = Setup((0, 1), device="meta", threads=1, ranks=Ranks(2, fsdp=True))
    trainee: Any = Worker(causal(csv, **FEDAVG), setup).trainee
    model = trainee._trained.model
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    fsdp.place(model, "meta")
    later = {id(p) for b in layout.blocks(model).values() for p in b.parameters()}
    for parameter in model.parameters():
        stays = id(parameter) in later and not parameter.requires_grad
        assert parameter.device.type == ("cpu" if stays else "meta")
    assert trainee.batch(0, np.arange(2)).labels.device.type == "meta"


def test_a_model_with_nothing_frozen_is_refused(csv: Path) -> None:
    whole = msgspec.structs.replace(causal(csv, **FEDAVG), peft=experiments.Peft(kind="full"))
    setup = Setup((0, 1), threads=1, ranks=Ranks(2, fsdp=True))
    with pytest.raises(ModelError, match="--fsdp deals frozen weights"):
        Worker(whole, setup)
