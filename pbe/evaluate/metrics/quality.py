"""qs_rank: how usual an edit's features are among real photos, as a percentile rank.

Source: GMM-GIQA (Gu et al. 2020, arXiv 2003.08932): the log-likelihood of an image's features under a
Gaussian mixture of real images. Upstream: eval_tool/gmm/gmm_score_coco.py.

This is NOT the paper's QS. That is 100 * mean(clip(log-likelihood / 300, 0, 1)) under one pickled mixture on
CLIP ViT-B/32 features: the 0..300 belongs to that mixture, and its covariance type and
fitting split are stated nowhere. GIQA's own README calls the absolute value meaningless and says to use
ranks. So we rank each edit among real photos the mixture has not seen: 50 is an average real photo, 0 is
below all of them. A rank is comparable between edits scored with the same photos, not between extractors or
data sets.
"""

from collections.abc import Callable

import numpy as np

# Fraction of each whitened axis' variance (1.0) added to every component's covariance. sklearn's 1e-6 lets a
# component collapse onto a few crops of one photo, and its likelihood grow without bound. Ours; no source.
REG_COVAR = 1e-2


def quality_ranks(
    edit_features: np.ndarray,
    *,
    fit_features: np.ndarray,
    real_features: np.ndarray,
    components: int,
    pca_dims: int,
    seed: int,
) -> np.ndarray:
    """(N, d) edit features to (N,) percentile ranks in 0..100, higher is more like a real photo; see quality_scale."""
    scale = quality_scale(
        fit_features=fit_features, real_features=real_features, components=components, pca_dims=pca_dims, seed=seed
    )
    return scale(edit_features)


def quality_scale(
    *, fit_features: np.ndarray, real_features: np.ndarray, components: int, pca_dims: int, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a function that ranks edits: (N, d) features to (N,) float64 in 0..100.

    fit_features (A, d): real photos, in any order, that fit a whitened PCA of min(pca_dims, A - 1, d) axes and then a
    mixture of `components` full covariances. real_features (B, d): other real photos, the scale; no row may
    be in both, or the mixture's overfit lowers every edit's rank. rank = 100 * (#below + #equal / 2) / B,
    log-likelihoods compared. A component has about pca_dims^2 / 2 numbers to learn from A / components rows:
    keep pca_dims small.
    Raises ValueError for wrong shapes, too few rows or values that are not finite; the scale does for its features.
    """
    # imported here: Ray's actors, which extract features and fit nothing, import this module too
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    dims = _dims(fit_features=fit_features, real_features=real_features)
    if components < 1 or pca_dims < 1:
        raise ValueError(f"components {components} and pca_dims {pca_dims} must be at least 1")
    if len(fit_features) < max(components, 2):
        raise ValueError(f"{len(fit_features)} fit_features cannot fit {components} components")
    if not len(real_features):
        raise ValueError("no real_features to rank among")
    if not np.ptp(fit_features, axis=0).any():
        raise ValueError("fit_features are all the same: nothing can be ranked by them")

    axes = min(pca_dims, len(fit_features) - 1, fit_features.shape[1])
    # "full" is the one deterministic solver for every shape.
    pca = PCA(axes, whiten=True, svd_solver="full").fit(fit_features.astype(np.float64))
    fit = pca.transform(fit_features)
    fit = fit[np.argsort(fit[:, 0], kind="stable")]  # the mixture's start depends on the order of its rows
    mixture = GaussianMixture(
        components, covariance_type="full", reg_covar=REG_COVAR, max_iter=500, n_init=4, random_state=seed
    ).fit(fit)
    real = np.sort(mixture.score_samples(pca.transform(real_features)))

    def ranks(edit_features: np.ndarray) -> np.ndarray:
        if _dims(edit_features=edit_features) != dims:
            raise ValueError(f"edit_features have {edit_features.shape[1]} dimensions, the real ones {dims}")
        if not len(edit_features):
            return np.empty(0, np.float64)
        edit = mixture.score_samples(pca.transform(edit_features))
        below, up_to = np.searchsorted(real, edit, side="left"), np.searchsorted(real, edit, side="right")
        return 100.0 * (below + up_to) / (2 * len(real))

    return ranks


def _dims(**features: np.ndarray) -> int:
    """Return the d that all have in common. Raises ValueError."""
    shapes = {x.shape[1:] for x in features.values()}
    if len(shapes) != 1 or any(x.ndim != 2 for x in features.values()):
        raise ValueError(f"features must be (n, d) with one d, got {sorted(str(x.shape) for x in features.values())}")
    if not all(np.isfinite(x).all() for x in features.values()):
        raise ValueError("features are not all finite")
    return next(iter(shapes))[0]
