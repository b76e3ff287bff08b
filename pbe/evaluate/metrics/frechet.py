"""The Frechet distance between two sets of features, each taken as a Gaussian, and the statistics it is made of.

Source: Heusel et al. 2017 (FID), equation 6; upstream eval_tool/fid/fid_score.py.
Deviation: no scipy sqrtm of a d x d product, which is slow, complex-valued and singular for fewer rows than dimensions.
With S_a = A^T A for the centred rows A of a over sqrt(N - 1), and S_b = L L^T for any root L, the non-zero eigenvalues
of S_a S_b are those of (A L)(A L)^T, the squared singular values of A L. Hence tr (S_a S_b)^(1/2) = ||A L||_*, the sum
of the singular values of A L, for any N and rank.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from pbe.errors import UserError

SVD_SIDE = 512  # up to this side singular values are taken directly


class StatisticsError(UserError, ValueError):
    """A file of statistics is damaged, or of another extractor than the features that it should measure."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """n: rows. mean: (d,). scatter: (d, d), the sum of outer products of centred rows; float64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), unbiased, as np.cov."""
        return self.scatter / (self.n - 1)


@dataclass(frozen=True)
class Card:
    """Origin of the features: the extractor's name, the digest of its weights, and its resize rule."""

    extractor: str
    extractor_digest: str
    resize_rule: str


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Compute the statistics of features (N, d), N >= 1. Raises ValueError for another shape or non-finite values."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features: {features.shape}, expected (N, d) with N of at least 1")
    features = _finite(features)
    mean = features.mean(0)
    centred = features - mean
    return FeatureStatistics(len(features), mean, centred.T @ centred)


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Return the statistics of both sets together. Chan et al. 1979: no cancellation, so order does not matter."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and {len(b.mean)} dimensions cannot be merged")
    n, shift = a.n + b.n, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n)
    return FeatureStatistics(n, a.mean + shift * (b.n / n), scatter)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), in squared feature units, >= 0.

    a (N, d), b (M, d): one feature vector per row; N, M >= 2, and fewer than d is fine. S is the unbiased covariance,
    as in np.cov; of constant features it is 0 and only the means count. float64 inside.

    The estimate is biased upwards, roughly in proportion to 1 / N: compare only numbers of equal N and M.
    Raises ValueError for wrong shapes, fewer than two rows or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features: {a.shape} and {b.shape}, expected (N, d) and (M, d)")
    mean_a, root_a = _mean_and_root(a)
    mean_b, root_b = _mean_and_root(b)
    return _distance(mean_a, root_a, mean_b, root_b.T)


class FrechetToReference:
    """`frechet_distance` to one set, and raising as it. mean (d,); root (d, r), with root root^T the covariance."""

    def __init__(self, mean: np.ndarray, root: np.ndarray) -> None:
        self._mean, self._root = mean, root

    def __call__(self, features: np.ndarray) -> float:
        self._refuse_other_width(features)
        mean, mine = _mean_and_root(features)
        return _distance(mean, mine, self._mean, self._root)

    def of_rows(self, features: np.ndarray) -> Callable[[np.ndarray], float]:
        """See SetStatistic.

        Of the centred rows A the distance needs the norms of A and of A L (above), which rotations keep: so both are
        taken from the rows around the reference's mean, and from these times L, turned into the axes that they span.
        """
        self._refuse_other_width(features)
        around_reference = _finite(features) - self._mean
        placed, projected = _in_own_axes(around_reference), _in_own_axes(around_reference @ self._root)
        spread_of_reference = np.sum(self._root**2)

        def distance(rows: np.ndarray) -> float:
            _refuse_one_row(rows)
            some, images = placed[rows], projected[rows]
            shift = some.mean(0)
            spread = np.sum((some - shift) ** 2) / (len(rows) - 1)
            overlap = _nuclear_norm((images - images.mean(0)) / np.sqrt(len(rows) - 1))
            return max(float(np.sum(shift**2) + spread + spread_of_reference - 2 * overlap), 0.0)

        return distance

    def _refuse_other_width(self, features: np.ndarray) -> None:
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(f"features: {features.shape}, the reference has {len(self._mean)} dimensions")


def frechet_to_reference(reference: FeatureStatistics) -> FrechetToReference:
    """Of a set of which only statistics are stored; the root of its covariance is taken once.

    Raises ValueError for a reference of one row.
    """
    if reference.n < 2:
        raise ValueError(f"{reference.n} feature row: a covariance needs at least 2")
    return FrechetToReference(reference.mean, _root_of(reference.covariance))


def frechet_to_features(reference: np.ndarray) -> FrechetToReference:
    """Of a set (M, d), whose root is taken once: of few rows it is small, unlike a covariance's.

    Raises as frechet_distance.
    """
    mean, root = _mean_and_root(reference)
    return FrechetToReference(mean, root.T)


def frechet_from_statistics(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the Frechet distance between two sets from their statistics alone."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    for side in (a, b):
        if side.n < 2:
            raise ValueError(f"{side.n} feature row: a covariance needs at least 2")
    return _distance(a.mean, _root_of(a.covariance).T, b.mean, _root_of(b.covariance))


# -- files ---------------------------------------------------------------------------------------------------------


def statistics_bytes(statistics: FeatureStatistics, card: Card) -> bytes:
    """Return an .npz without pickles, with the card and the arrays' SHA-256; equal statistics give equal bytes."""
    meta = json.dumps(asdict(card) | {"n": statistics.n, "sha256": _content_digest(statistics)}, sort_keys=True)
    arrays = {"mean": statistics.mean, "scatter": statistics.scatter, "card": np.frombuffer(meta.encode(), np.uint8)}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            inner = io.BytesIO()
            np.lib.format.write_array(inner, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), inner.getvalue())  # ZipInfo's own date: always the same
    return out.getvalue()


def statistics_from_bytes(data: bytes, where: str) -> tuple[FeatureStatistics, Card]:
    """Read the statistics and their card. Raises StatisticsError naming `where`."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            mean, scatter, raw = arrays["mean"], arrays["scatter"], arrays["card"]
        meta = json.loads(raw.tobytes())
        n, digest = int(meta.pop("n")), meta.pop("sha256")
        card = Card(**meta)
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StatisticsError(f"{where}: not a file of feature statistics ({' '.join(str(error).split())})") from None
    statistics = FeatureStatistics(n, mean, scatter)
    square = mean.ndim == 1 and scatter.shape == (len(mean), len(mean)) and n >= 1
    if not square or _content_digest(statistics) != digest or not np.isfinite(scatter).all():
        raise StatisticsError(f"{where}: damaged: its arrays do not match its SHA-256")
    return statistics, card


def refuse_other_extractor(found: Card, wanted: Card, where: str) -> None:
    """Raise StatisticsError unless both are of the same network and resize rule."""
    if found != wanted:
        raise StatisticsError(
            f"{where}: statistics by {found.extractor} {found.extractor_digest} ({found.resize_rule}); the features to "
            f"measure are by {wanted.extractor} {wanted.extractor_digest} ({wanted.resize_rule}); make them with that "
            "one"
        )


def _content_digest(statistics: FeatureStatistics) -> str:
    hasher = hashlib.sha256(str(statistics.n).encode())
    for array in (statistics.mean, statistics.scatter):
        hasher.update(np.ascontiguousarray(array, "<f8").tobytes())
    return hasher.hexdigest()


# -- algebra -------------------------------------------------------------------------------------------------------


def _distance(mean_a: np.ndarray, root_a: np.ndarray, mean_b: np.ndarray, root_b: np.ndarray) -> float:
    """root_a (k, d) with root_a^T root_a = S_a; root_b (d, m) with root_b root_b^T = S_b."""
    overlap = _nuclear_norm(root_a @ root_b)
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave a negative zero


def _nuclear_norm(matrix: np.ndarray) -> float:
    """Sum of singular values; of a large matrix from its Gram matrix, five times as fast.

    Squaring leaves a singular value s an error of about eps s_max^2 / s, so what is lost are values of 1e-8 of the
    largest.
    """
    if min(matrix.shape) <= SVD_SIDE:
        return float(np.linalg.svd(matrix, compute_uv=False).sum())
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum())


def _root_of(covariance: np.ndarray) -> np.ndarray:
    """(d, r) with root root^T the covariance. By Cholesky; of a singular one by its eigenvalues above 0, so r is its
    rank."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def _in_own_axes(rows: np.ndarray) -> np.ndarray:
    """Rows (N, d) in orthonormal axes of the space that they span: (N, at most N), of the same inner products."""
    if len(rows) >= rows.shape[1]:
        return rows
    return np.asarray(np.linalg.qr(rows.T, mode="r")).T


def _mean_and_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) to the mean (d,) and a matrix R (at most d, d) with R^T R the covariance, float64."""
    _refuse_one_row(x)
    x = _finite(x)
    mean = x.mean(0)
    root = (x - mean) / np.sqrt(len(x) - 1)
    # never more than d rows, however many images there are
    return mean, _root_of(root.T @ root).T if len(root) > root.shape[1] else root


def _refuse_one_row(x: np.ndarray) -> None:
    if len(x) < 2:
        raise ValueError(f"{len(x)} feature rows: a covariance needs at least 2")


def _finite(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise ValueError(f"features are not all finite: {len(rows)} of {len(x)} rows, the first is row {rows[0]}")
    return x
