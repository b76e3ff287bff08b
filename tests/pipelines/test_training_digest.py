"""What names a training: everything that shapes its export, and nothing else."""

from dataclasses import replace

from pbe.store import make_manifest
from pbe.train.settings import TrainConfig
from pipelines.train import training_digest
from pipelines.train_weights import StartingPoint, StoredAdapter, StoredText
from tests.profiles import profile

START = StartingPoint(("parts/weights/unet-0", "parts/weights/image_encoder-0"), None, None, None)


def _cfg(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate(profile("tiny").train.model_dump() | changes)


def test_all_that_shapes_the_export_names_it_and_how_it_is_run_does_not() -> None:
    encoded = make_manifest("encode", config={}, version=1, units=[])
    other = replace(encoded, digest="of other rows")
    plain = training_digest(_cfg(), 7, encoded, None, START)
    shaped = [
        training_digest(_cfg(lr=1e-5), 7, encoded, None, START),
        training_digest(_cfg(), 8, encoded, None, START),
        training_digest(_cfg(), 7, other, None, START),
        training_digest(_cfg(), 7, encoded, other, START),
        training_digest(_cfg(), 7, encoded, None, replace(START, initial=None)),
        training_digest(_cfg(), 7, encoded, None, replace(START, initial=("parts/weights/unet-1", None))),
        training_digest(_cfg(), 7, encoded, None, replace(START, adapter=StoredAdapter("parts/weights/a", "base"))),
        training_digest(_cfg(), 7, encoded, None, replace(START, text=StoredText("parts/weights/text-0", 8))),
        training_digest(_cfg(), 7, encoded, None, replace(START, guidance_scale=3.0)),
        training_digest(_cfg(), 7, encoded, None, replace(START, guidance_scale=2.0)),
    ]
    assert len({plain, *shaped}) == 1 + len(shaped)
    elsewhere = replace(START, adapter=StoredAdapter("parts/weights/a", "the same base under another name"))
    assert training_digest(_cfg(), 7, encoded, None, elsewhere) == shaped[6]
    for same in ({"micro_batch": 1}, {"checkpoint_every": 3}, {"init": "models/moved"}):
        assert training_digest(_cfg(**same), 7, encoded, None, START) == plain, same
