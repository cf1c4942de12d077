"""What a phase costs a node that measures it: entering and leaving, with nothing inside.

    python -m benchmarks.phase

In a process of no size, and in one that holds 1 GB as blocks of 1 MB, as a model's tensors are.
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import Metric, alternate, no_arguments, report
from node.measure import Phases

REPEATS = 500


def main() -> None:
    """Time, report."""
    no_arguments(__doc__)
    phases = Phases()

    def nothing() -> None:
        with phases("train"):
            pass

    (small,) = alternate(nothing, repeats=REPEATS)
    held = [np.ones(1 << 20, np.uint8) for _ in range(1000)]
    (large,) = alternate(nothing, repeats=REPEATS)
    del held
    report(
        "phase",
        {
            "phase_ms": Metric(1e3 * small, "ms", "lower"),
            "phase_of_1_gb_ms": Metric(1e3 * large, "ms", "lower"),
        },
    )


if __name__ == "__main__":
    main()
