"""A training of no steps, which one process exports without ranks, leaves what ranks would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from pbe.model.weight_store import open_backbone, open_codec
from pbe.store import Manifest, Store
from pbe.train.checkpoints import RAW, Run
from pbe.train.export import export_initial, export_trained
from pbe.train.network import initial_network
from pbe.train.spec import TrainSpec
from tests.train.golden import part_spec, store_base
from tests.train.ranks import run_ranks, tiny_config, tiny_spec, train

pytestmark = pytest.mark.timeout(300)

Place = tuple[Path, Store, Manifest]


def _random(place: Place, golden: object) -> TrainSpec:
    _, store, encoded = place
    return tiny_spec(store, encoded, tiny_config(steps=0, zero_stage=3, workers=2), "random")


def _pretrained(place: Place, golden: object) -> TrainSpec:
    return replace(_random(place, golden), initial=store_base(place[1]), run_name="pretrained", seed=5)


def _lora(place: Place, golden: object) -> TrainSpec:
    return part_spec(*place[1:], store_base(place[1]), "lora", "lora", steps=0, zero_stage=3, workers=2)


@pytest.mark.parametrize("spec_of", [_random, _pretrained, _lora], ids=lambda found: found.__name__.strip("_"))
def test_no_steps_leave_what_ranks_would(
    place: Place, golden: list[float], spec_of: Callable[[Place, object], TrainSpec]
) -> None:
    folder, store, _ = place
    spec = spec_of(place, golden)
    run_ranks(train, spec, world=2, tmp=folder)
    export_initial(replace(spec, run_name=f"{spec.run_name}-alone"))
    on_ranks, alone = (Run(store, name) for name in (spec.run_name, f"{spec.run_name}-alone"))
    files = store.list_files(f"{on_ranks.folder}/export")
    assert files == store.list_files(f"{alone.folder}/export") and "unet/diffusion_pytorch_model.safetensors" in files
    for name in files:
        of_ranks, of_one = (store.read_bytes(f"{run.folder}/export/{name}") for run in (on_ranks, alone))
        assert of_ranks == of_one, name
    for name in ("finished.json", "history.json"):
        assert on_ranks.read_json(name) == alone.read_json(name)


def test_the_average_and_the_last_step_share_their_encoder(place: Place) -> None:
    """A CLIP has 1.2 GB, which a remote storage would send twice."""
    _, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(), "both")
    tensors = initial_network(spec, store, None).state_dict()
    with patch("pbe.train.export.open_backbone", wraps=open_backbone) as opened:
        codec = open_codec(store, encoded.config["codec"])
        export_trained(spec, store, {"": tensors, RAW: tensors}, codec, None, history=[])
    assert opened.call_count == 1 and Run(store, "both").finished(with_raw=True) is not None
