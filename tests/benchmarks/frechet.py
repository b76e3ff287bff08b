"""Is the Frechet distance here faster than the textbook formula with scipy's sqrtm, on the same features?

    python tests/benchmarks/frechet.py [--quick] [--device cuda]

N = 3,500 and d = 2,048: COCOEE's items, Inception's features. The last line has the speedup and the relative difference
of the two results; nothing is asserted. --quick measures once instead of three times. Both sides use numpy and scipy:
--device cuda changes nothing, and says so.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pbe.evaluate.metrics.frechet import feature_statistics, frechet_distance, frechet_to_reference
from tests.benchmarks.device import add_device, say_processor_alone

N, D = 3500, 2048


def features(seed: int, scale: float) -> np.ndarray:
    """(N, D) features whose spectrum falls like that of image features, in a random basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D))).Q
    return (rng.standard_normal((N, D)) * scale / (1 + np.arange(D)) ** 0.7) @ basis.T + 0.01 * scale


def textbook(a: np.ndarray, b: np.ndarray) -> float:
    """The distance as computed in upstream's eval_tool/fid/fid_score.py."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def best(run: Callable[[], float], times: int) -> tuple[float, float]:
    """Seconds of the fastest of `times` runs, and its result."""
    seconds, result = [], 0.0
    for _ in range(times):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    add_device(parser)
    args = parser.parse_args()
    say_processor_alone(args.device, "numpy and scipy do all of it")
    times = 1 if args.quick else 3
    a, b = features(1, 1.0), features(2, 1.1)
    reference = frechet_to_reference(feature_statistics(b))
    reference(a[:600])  # the first call into a linear algebra library takes longer
    theirs_s, theirs = best(lambda: textbook(a, b), times)
    ours_s, ours = best(lambda: frechet_distance(a, b), times)
    kept_s, kept = best(lambda: reference(a), times)
    of_rows, half = reference.of_rows(a), np.arange(0, N, 2)
    half_s, _ = best(lambda: of_rows(half), times)
    print(f"N {N}, d {D}: sqrtm {theirs_s:.2f} s, from features {ours_s:.2f} s, to stored statistics {kept_s:.2f} s,")
    print(f"one half of a jackknife {half_s:.2f} s; {theirs:.9f}, {ours:.9f}, {kept:.9f}")
    print(f"speedup_over_sqrtm={theirs_s / ours_s:.1f} rel_error={abs(ours - theirs) / theirs:.1e}")


if __name__ == "__main__":
    main()
