"""Write ``protocol/normals.f32``: the half table of unit-variance normal quantiles.

Run once; the file is part of the protocol (docs/noise.md) and its hash is checked at
import.  The last bits of a quantile depend on the machine's libm, which is why the
table ships as bytes and is never computed at run time.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np

HALF = 1 << 15


def main() -> None:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (j + 0.5) / (2 * HALF)) for j in range(HALF)])
    upper /= np.sqrt(np.mean(upper**2))  # both halves are mirror images: variance is exact
    Path("protocol/normals.f32").write_bytes(upper.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
