"""A training step must not make the CPU wait for the GPU more often than once or twice, however many micro-batches it
has. There is no GPU here: what would wait is counted, and the arithmetic is run on tensors without values."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pbe.diffusion.schedule import alphas_cumprod
from pbe.diffusion.scheduler_config import scheduler_config
from pbe.model.unet import new_network
from pbe.store import Manifest, Store
from pbe.train.checkpoints import Run
from pbe.train.data.batch import Batch
from pbe.train.engine import step_engine
from pbe.train.loss import Diffusion, row_losses
from tests.gpu.stops import stops_of_steps
from tests.train.ranks import ARCH, RankDiedError, run_ranks, tiny_config, tiny_spec

pytestmark = pytest.mark.timeout(180)


def stops_per_step(spec: Any) -> list[Counter[str]]:
    return stops_of_steps(torch.device("cpu"), spec)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stops_of_a_step_do_not_grow_with_its_micro_batches(place: tuple[Path, Store, Manifest], stage: int) -> None:
    folder, store, encoded = place
    stops = {}
    for micro_batch in (8, 2):
        cfg = tiny_config(micro_batch=micro_batch, zero_stage=stage, log_every=100)
        spec = tiny_spec(store, encoded, cfg, f"stops-{stage}-{micro_batch}")
        [stops[micro_batch]] = run_ranks(stops_per_step, spec, world=1, tmp=folder)
    assert stops[8] == stops[2]
    for step in stops[8]:
        ours = {place: count for place, count in step.items() if place.startswith("pbe/")}
        theirs = {place.split(":")[0] for place in set(step) - set(ours)}
        assert theirs <= {"deepspeed/runtime/utils.py"}  # it looks at its gradient norm
        # of values that have arrived by then: the count of broken losses, the norm of the step before
        assert [place.split(":")[0] for place in ours] == ["pbe/train/finite.py"] and sum(ours.values()) == 2


def test_forward_and_backward_read_no_value() -> None:
    """Reading a meta tensor raises."""
    cfg = tiny_config(min_snr_gamma=5.0)
    with torch.device("meta"):
        network = new_network(ARCH)
        rows = 2
        shape = (rows, ARCH.latent_channels, ARCH.latent_px, ARCH.latent_px)
        batch = Batch(
            x0=torch.empty(shape),
            masked_latent=torch.empty(shape),
            keep_mask_latent=torch.empty(rows, 1, *shape[2:]),
            exemplar_tokens=torch.empty(rows, 1, ARCH.backbone_width),
            noise=torch.empty(shape),
            timestep=torch.empty(rows, dtype=torch.int64),
            drop_condition=torch.empty(rows, dtype=torch.bool),
            drop_context=torch.empty(rows, dtype=torch.bool),
            rows=("a", "b"),
        )
        grey = torch.empty(1, *shape[1:])
    alpha_bar = alphas_cumprod(scheduler_config(cfg.beta_schedule, cfg.objective)).to("meta")
    losses = row_losses(network, batch, Diffusion(cfg, grey, alpha_bar, torch.device("cpu")))
    losses.mean().backward()
    assert losses.device.type == "meta"


def train_with_an_infinite_norm(spec: Any, bad_step: int) -> None:
    from pbe.train import worker

    steps = iter(range(1, 1000))

    def with_one_infinite(engine: Any) -> torch.Tensor | None:
        norm = step_engine(engine)
        if norm is None:
            return None
        return torch.tensor(float("inf")) if next(steps) == bad_step else norm

    with patch.object(worker, "step_engine", with_one_infinite):
        worker.train_worker(spec, torch.device("cpu"))


@pytest.mark.parametrize("bad_step", [3, 4], ids=["before a save", "between saves"])
def test_an_infinite_gradient_stops_before_anything_is_saved(
    place: tuple[Path, Store, Manifest], bad_step: int
) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(checkpoint_every=3, log_every=100), f"norm-{bad_step}")
    with pytest.raises(RankDiedError, match=f"gradient norm is inf at step {bad_step}, although the loss is finite"):
        run_ranks(train_with_an_infinite_norm, spec, bad_step, world=1, tmp=folder)
    assert [saved.step for saved in Run(store, f"norm-{bad_step}").checkpoints()] == ([] if bad_step == 3 else [3])
