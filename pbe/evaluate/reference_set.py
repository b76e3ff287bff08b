"""Reference statistics of one extractor, computed once from real images: Frechet, KID, CMMD and quality."""

from collections.abc import Mapping

import numpy as np

from pbe.evaluate.metrics.cmmd import cmmd_to_reference
from pbe.evaluate.metrics.frechet import FeatureStatistics, frechet_to_reference
from pbe.evaluate.metrics.kid import kid_to_reference
from pbe.evaluate.metrics.mixture import Mixture, log_likelihood, quality_scores
from pbe.evaluate.metrics.quality import quality_scale
from pbe.evaluate.metrics.retrieval import Candidates
from pbe.evaluate.score_features import ReferenceSet


def make_reference_set(
    extractor: str,
    *,
    real_images: np.ndarray,
    statistics: FeatureStatistics,
    bench_photos: np.ndarray,
    photo_holes: Mapping[str, np.ndarray],
    exemplars: Candidates,
    mixture: Mixture | None,
    upstream_region: bool,
    cmmds_network: bool,
    components: int,
    pca_dims: int,
    seed: int,
) -> ReferenceSet:
    """Build the reference set of one extractor.

    real_images (M, d): features of the real images; statistics: their statistics. bench_photos (N, d): features of the
    bench's unedited photos, among which qs_rank ranks the edits; with a `mixture`, qs replaces qs_rank. photo_holes,
    exemplars: as in ReferenceSet. Raises ValueError for too few rows or values that are not finite.
    """
    if mixture is None:
        quality = quality_scale(
            fit_features=real_images, real_features=bench_photos, components=components, pca_dims=pca_dims, seed=seed
        )
    else:
        quality = lambda features: quality_scores(log_likelihood(mixture, features))  # noqa: E731
    return ReferenceSet(
        name=extractor,
        frechet=frechet_to_reference(statistics),
        kid=kid_to_reference(real_images),
        cmmd=cmmd_to_reference(real_images),
        quality=quality,
        has_mixture=mixture is not None,
        upstream_region=upstream_region,
        cmmds_network=cmmds_network,
        photo_holes=photo_holes,
        exemplars=exemplars,
    )
