"""From the ``[method]`` table of an experiment to a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fedalgos import robust
from fedalgos.allreduce import FedAvgAllreduce, fedavg_allreduce
from fedalgos.baffle import Baffle, baffle
from fedalgos.decomfl import DeComFL, decomfl
from fedalgos.fedavg import FedAvg, fedavg
from fedalgos.fedfgd import FedFGD, fedfgd
from fedalgos.fedkseed import FedKSeed, fedkseed
from fedalgos.fedmezo import FedMezo, fedmezo
from fedalgos.ferret import Ferret, ferret
from fedalgos.ffalora import FfaLora, ffa_lora
from fedalgos.flasc import Flasc, flasc
from fedalgos.fwdllm import FwdLLM, fwdllm
from fedalgos.guard import guarded
from fedalgos.hetlora import HetLora, hetlora
from fedalgos.method import Method
from fedalgos.pruned import (
    AdapterLth,
    FedSelect,
    SparseAdapter,
    adapter_lth,
    fedselect,
    sparse_adapter,
)
from fedalgos.space import ParamSpace
from fedalgos.sparse import SparseSettings
from fedalgos.spry import Spry, spry
from protocol.errors import ExperimentError

AnySettings = (
    FedAvg
    | FedAvgAllreduce
    | FedMezo
    | FedKSeed
    | DeComFL
    | Baffle
    | Ferret
    | Spry
    | FedFGD
    | FwdLLM
    | Flasc
    | SparseAdapter
    | AdapterLth
    | FedSelect
    | FfaLora
    | HetLora
)


def settings(table: Mapping[str, Any]) -> AnySettings:
    """Decode the ``[method]`` table against the settings of the method it names.

    Raises:
        ExperimentError: naming the path of the fault.
    """
    try:
        decoded: AnySettings = msgspec.convert(table, AnySettings)
    except msgspec.ValidationError as error:
        raise ExperimentError(f"[method] {error}") from error
    if (why := robust.refusal(decoded.robust, decoded.common)) is not None:
        raise ExperimentError(f"[method] {why}")
    return decoded


def fold_late(o: AnySettings) -> None:
    """Allow late updates to be folded in.

    Raises:
        ExperimentError: with this method they cannot be, and why.
    """
    why = o.late_fault if o.robust is None else "a robust rule compares updates of one version"
    if why is not None:
        name = o.__struct_config__.tag
        raise ExperimentError(f'[rounds] late = "fold" is not for {name}: {why}')


def is_private(o: AnySettings) -> bool:
    """Whether the method draws noise that no node may know."""
    return isinstance(o, SparseSettings) and o.dp is not None


def is_collective(o: AnySettings) -> bool:
    """Whether nodes aggregate among themselves."""
    return isinstance(o, FedAvgAllreduce)


def is_exposed(o: AnySettings) -> bool:
    """Whether nodes send each other what is not encrypted, and nobody has said that they may."""
    return isinstance(o, FedAvgAllreduce) and not o.plaintext


def build(o: AnySettings, space: ParamSpace, seed: int, secret: bytes | None = None) -> Method[Any]:
    """The method over a parameter space.

    Args:
        o: its settings.
        space: of the parameters.
        seed: the run's, which everybody knows.
        secret: what only the coordinator knows; without one a method with ``dp`` serves
            nodes, and its ``init`` refuses.
    """
    return guarded(o.robust, _plain(o, space, seed, secret))


def _plain(o: AnySettings, space: ParamSpace, seed: int, secret: bytes | None) -> Method[Any]:
    match o:
        case FedAvg():
            return fedavg(o, space)
        case FedAvgAllreduce():
            return fedavg_allreduce(o, space)
        case FedMezo():
            return fedmezo(o, space, seed)
        case FedKSeed():
            return fedkseed(o, space, seed)
        case DeComFL():
            return decomfl(o, space, seed)
        case Baffle():
            return baffle(o, space, seed)
        case Ferret():
            return ferret(o, space, seed)
        case Spry():
            return spry(o, space, seed)
        case FedFGD():
            return fedfgd(o, space, seed)
        case FwdLLM():
            return fwdllm(o, space, seed)
        case Flasc():
            return flasc(o, space, seed, secret)
        case SparseAdapter():
            return sparse_adapter(o, space, secret)
        case AdapterLth():
            return adapter_lth(o, space, secret)
        case FedSelect():
            return fedselect(o, space, secret)
        case FfaLora():
            return ffa_lora(o, space, secret)
        case HetLora():
            return hetlora(o, space)
