"""The paper's quality score: likelihood of CLIP features under a Gaussian mixture of real photos.

Source: GMM-GIQA (Gu et al. 2020); upstream eval_tool/gmm/gmm_score_coco.py, whose pickled mixture is published.
`pbe import-mixture` turns that pickle into arrays once; nothing else here ever reads a pickle. Which covariances the
published mixture has, and which photos it was fitted on, is stated nowhere; the file says the first.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from pbe.errors import UserError
from pbe.store import whole_file

CovarianceType = Literal["full", "tied", "diag", "spherical"]
UPSTREAM_CEILING = 300.0  # log-likelihood that is 100 points; upstream's own constant for its mixture


class MixtureError(UserError, ValueError):
    """A file of a mixture is damaged, or does not fit the features."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights (K,); means (K, d); precisions_cholesky as scikit-learn has it: (K, d, d) full, (d, d) tied, (K, d) diag,
    (K,) spherical. float64."""

    weights: np.ndarray
    means: np.ndarray
    precisions_cholesky: np.ndarray
    covariance_type: CovarianceType

    def __post_init__(self) -> None:
        """Raise MixtureError for arrays that are not a mixture."""
        if self.covariance_type not in get_args(CovarianceType):
            raise MixtureError(
                f"covariance type {self.covariance_type!r}; known are {', '.join(get_args(CovarianceType))}"
            )
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1]:
            raise MixtureError(f"weights {self.weights.shape} and means {self.means.shape} do not belong together")
        count, d = self.means.shape
        shapes = {"full": (count, d, d), "tied": (d, d), "diag": (count, d), "spherical": (count,)}
        if self.precisions_cholesky.shape != shapes[self.covariance_type]:
            raise MixtureError(
                f"precisions of shape {self.precisions_cholesky.shape}; {count} {self.covariance_type} covariances in "
                f"{d} dimensions have {shapes[self.covariance_type]}"
            )
        if not all(np.isfinite(x).all() for x in (self.weights, self.means, self.precisions_cholesky)):
            raise MixtureError("its arrays are not all finite")
        roots = self.precisions_cholesky
        diagonal = np.diagonal(roots, axis1=-2, axis2=-1) if self.covariance_type in ("full", "tied") else roots
        if (diagonal <= 0).any():
            raise MixtureError("its precisions are not all above 0")
        if (self.weights < 0).any() or abs(self.weights.sum() - 1) > 1e-6:
            raise MixtureError(f"its weights sum to {self.weights.sum():.6g}, not to 1")


def log_likelihood(mixture: Mixture, features: np.ndarray) -> np.ndarray:
    """(N, d) to (N,) float64: log sum_k w_k N(x; mu_k, S_k).

    Raises MixtureError for features of another width, ValueError for values that are not finite.
    """
    from sklearn.mixture import GaussianMixture  # here, as in quality.py

    count, d = mixture.means.shape
    if features.ndim != 2 or features.shape[1] != d:
        raise MixtureError(
            f"features of shape {features.shape}; the mixture has {d} dimensions, so it belongs to another extractor"
        )
    if not np.isfinite(features).all():
        raise ValueError("features are not all finite")
    model = GaussianMixture(count, covariance_type=mixture.covariance_type)
    model.weights_, model.means_ = mixture.weights, mixture.means
    model.precisions_cholesky_ = mixture.precisions_cholesky
    with np.errstate(divide="ignore"):  # a component of weight 0 counts for nothing
        return model.score_samples(features.astype(np.float64))


def quality_scores(log_likelihoods: np.ndarray) -> np.ndarray:
    """(N,) to (N,) in 0..100: 100 clip(s / 300, 0, 1); their mean is QS. Numbers of two mixtures do not compare.

    Deviation: upstream drops the rest of N / 50 items without a word; here all count.
    """
    return 100 * np.clip(log_likelihoods / UPSTREAM_CEILING, 0, 1)


def save_mixture(path: Path, mixture: Mixture, *, source_sha256: str) -> None:
    """Write an .npz without pickles. source_sha256: digest of the file that the arrays came from."""
    arrays = {
        "weights": mixture.weights,
        "means": mixture.means,
        "precisions_cholesky": mixture.precisions_cholesky,
        "covariance_type": np.frombuffer(mixture.covariance_type.encode(), np.uint8),
        "source_sha256": np.frombuffer(source_sha256.encode(), np.uint8),
        "sha256": np.frombuffer(mixture_digest(mixture).encode(), np.uint8),
    }
    with whole_file(path) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def load_mixture(path: Path) -> Mixture:
    """Read a mixture that `save_mixture` wrote. Raises MixtureError."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            kind, digest = (bytes(arrays[name]).decode() for name in ("covariance_type", "sha256"))
            weights, means, roots = (
                arrays[name].astype(np.float64) for name in ("weights", "means", "precisions_cholesky")
            )
        mixture = Mixture(weights, means, roots, cast(CovarianceType, kind))  # validates them
    except FileNotFoundError:
        raise MixtureError(f"{path}: no such file; `pbe import-mixture` writes it from the published pickle") from None
    except MixtureError as error:
        raise MixtureError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise MixtureError(
            f"{path}: not a mixture ({' '.join(str(error).split())[:150]}); make one with `pbe import-mixture`"
        ) from None
    if mixture_digest(mixture) != digest:
        raise MixtureError(f"{path}: damaged: its arrays do not match its SHA-256")
    return mixture


def mixture_digest(mixture: Mixture) -> str:
    hasher = hashlib.sha256(mixture.covariance_type.encode())
    for array in (mixture.weights, mixture.means, mixture.precisions_cholesky):
        hasher.update(np.ascontiguousarray(array, "<f8").tobytes())
    return hasher.hexdigest()
