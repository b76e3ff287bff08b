"""What a resume does with damaged, foreign, half-written and remote checkpoints. Real ranks, real files."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.store import Manifest, Store
from pbe.train.checkpoints import MARKER, Run
from pbe.train.engine import EngineError, to_universal
from tests.train.ranks import (
    FillDiskAt,
    KillAt,
    RankDiedError,
    loss_curve,
    run_ranks,
    take_said,
    tiny_config,
    tiny_encoded,
    tiny_spec,
    train,
)

pytestmark = pytest.mark.timeout(240)


def _killed(place: tuple[Path, Store, Manifest], name: str, *, world: int = 1, log_every: int = 1) -> Run:
    """A run that was killed when it had logged step 19 or a later one, with checkpoints of steps 8 and 16."""
    folder, store, encoded = place
    cfg = tiny_config(workers=world, checkpoint_every=8, log_every=log_every)
    with pytest.raises(RankDiedError):
        run_ranks(train, tiny_spec(store, encoded, cfg, name, on_progress=KillAt(19)), world=world, tmp=folder)
    run = Run(store, name)
    assert [found.step for found in run.checkpoints()] == [8, 16]
    return run


@pytest.fixture(scope="module")
def kept(place: tuple[Path, Store, Manifest]) -> tuple[Run, Path]:
    """The run `killed`, and a copy of its folder."""
    run = _killed(place, "killed")
    copy = place[0] / "killed"
    shutil.copytree(run.store.path(run.folder), copy)
    return run, copy


@pytest.fixture
def killed(kept: tuple[Run, Path]) -> Run:
    """The run as the kill left it."""
    run, copy = kept
    shutil.rmtree(run.store.path(run.folder))
    shutil.copytree(copy, run.store.path(run.folder))
    return run


@pytest.fixture(scope="module")
def finished(place: tuple[Path, Store, Manifest]) -> str:
    """Name of a run that has done 30 steps, at one learning rate after the warm-up."""
    folder, store, encoded = place
    run_ranks(train, tiny_spec(store, encoded, tiny_config(final_lr_frac=1.0), "finished"), world=1, tmp=folder)
    return "finished"


def _optimizer_file(run: Run, step: int) -> Path:
    folder = Path(run.store.path(run.folder)) / "checkpoints" / f"step-{step:08d}"
    return next(folder.rglob("*optim_states.pt"))


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def _remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_byte, "has the wrong sha256"),
        pytest.param(_cut_short, "has 1000 bytes instead of", marks=pytest.mark.slow),
        pytest.param(_remove, "is missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    place: tuple[Path, Store, Manifest],
    golden: list[float],
    killed: Run,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    """Later checkpoints are written, and the newest are kept, including the last step."""
    folder, store, encoded = place
    (folder / "said.txt").unlink(missing_ok=True)
    damage(_optimizer_file(killed, 16))
    cfg = tiny_config(checkpoint_every=8, keep_checkpoints=2)
    run_ranks(train, tiny_spec(store, encoded, cfg, killed.name), world=1, tmp=folder)
    out = take_said(folder)
    assert said in out
    assert "skipping this checkpoint" in out
    assert "resuming from step 8" in out
    np.testing.assert_allclose(loss_curve(store, killed.name), golden, rtol=0, atol=1e-5)
    assert [found.step for found in killed.checkpoints()] == [24, 30]


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (exec, (f"import pathlib; pathlib.Path({str(self.target)!r}).touch()",))


def test_code_in_a_checkpoint_is_not_executed(place: tuple[Path, Store, Manifest], killed: Run) -> None:
    """Whoever writes to the storage chooses hashes too; DeepSpeed reads its files with pickle."""
    folder, store, encoded = place
    file, marker = _optimizer_file(killed, 16), f"checkpoints/step-00000016/{MARKER}"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "more": _Attack(folder / "owned")}, file)
    listed = killed.read_json(marker)
    assert listed is not None
    name = next(name for name in listed["files"] if name.endswith(file.name))
    listed["files"][name] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    killed.write_json(marker, listed)
    with pytest.raises(RankDiedError, match=r"EngineError: .*optim_states\.pt: names __builtin__\.exec, which is not"):
        run_ranks(train, tiny_spec(store, encoded, tiny_config(), killed.name), world=1, tmp=folder)
    with pytest.raises(EngineError, match="may be code"):
        to_universal(file.parent.parent, folder / "universal")
    assert not (folder / "owned").exists() and not (folder / "universal").exists()


@pytest.mark.slow
def test_when_every_checkpoint_is_damaged_one_line_says_so(place: tuple[Path, Store, Manifest], killed: Run) -> None:
    folder, store, encoded = place
    for step in (8, 16):
        _flip_a_byte(_optimizer_file(killed, step))
    with pytest.raises(
        RankDiedError, match=r"CheckpointError: every checkpoint is damaged: .*step-00000016.*step-00000008"
    ):
        run_ranks(train, tiny_spec(store, encoded, tiny_config(), killed.name), world=1, tmp=folder)


@pytest.mark.slow
def test_a_checkpoint_without_marker_does_not_count_and_its_files_do_not_mix(
    place: tuple[Path, Store, Manifest], golden: list[float]
) -> None:
    """A log point that the kill cut in two is whole again: that of step 20 begins before the checkpoint of step 16."""
    folder, store, encoded = place
    rare = {"log_every": 5, "checkpoint_every": 8}
    run = _killed(place, "half", world=2, log_every=5)
    half = Path(store.path(run.folder)) / "checkpoints" / "step-00000016"
    (half / MARKER).unlink()
    (half / "engine" / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"of another world")
    cfg = tiny_config(workers=2, **rare)
    with pytest.raises(RankDiedError):
        run_ranks(train, tiny_spec(store, encoded, cfg, "half", on_progress=KillAt(19)), world=2, tmp=folder)
    assert "resuming from step 8" in take_said(folder)
    assert not list(half.rglob("*rank_7*"))
    # the conversion for another world would have read it
    run_ranks(train, tiny_spec(store, encoded, tiny_config(**rare), "half"), world=1, tmp=folder)
    points = [*np.reshape(golden[:-1], (6, 5)).mean(1), golden[-1]]
    np.testing.assert_allclose(loss_curve(store, "half"), points, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_resume_from_goes_on_under_other_settings(place: tuple[Path, Store, Manifest], finished: str) -> None:
    """30 steps and 10 more in a separate run equal 40 at once; ZeRO 1 on two ranks may do the 10."""
    folder, store, encoded = place
    constant = {"final_lr_frac": 1.0}
    longer = tiny_config(steps=40, **constant)
    run_ranks(train, tiny_spec(store, encoded, longer, "longer", origin=(finished, 30)), world=1, tmp=folder)
    run_ranks(train, tiny_spec(store, encoded, longer, "at-once"), world=1, tmp=folder)
    np.testing.assert_allclose(loss_curve(store, "longer"), loss_curve(store, "at-once"), rtol=0, atol=1e-5)
    third = tiny_config(steps=40, zero_stage=1, workers=2, **constant)
    run_ranks(train, tiny_spec(store, encoded, third, "third", origin=(finished, 30)), world=2, tmp=folder)
    np.testing.assert_allclose(loss_curve(store, "third"), loss_curve(store, "at-once"), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"weight_decay": 20.0}, {"adam_betas": (0.0, 0.5)}, {"grad_clip": 1e-6}], ids=str)
def test_resume_from_takes_the_optimizers_settings_too(
    place: tuple[Path, Store, Manifest], finished: str, changes: dict[str, object]
) -> None:
    """DeepSpeed's checkpoint has those of the run before. The first step shows no difference yet."""
    folder, store, encoded = place
    longer = tiny_config(steps=33, final_lr_frac=1.0)  # a cosine's last steps would show next to nothing
    curves = []
    for name, cfg in (("plain", longer), ("changed", longer.model_copy(update=changes))):
        spec = tiny_spec(store, encoded, cfg, f"{name}-{next(iter(changes))}", origin=(finished, 30))
        run_ranks(train, spec, world=1, tmp=folder)
        curves.append(loss_curve(store, spec.run_name)[30:33])
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-6)
    assert abs(curves[0][2] - curves[1][2]) > 1e-4


def test_resume_from_checkpoints_that_are_gone_trains_nothing(place: tuple[Path, Store, Manifest]) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(steps=40), "orphan", origin=("pruned", 30))
    with pytest.raises(RankDiedError, match=r"CheckpointError: train.resume_from = pruned@30: that run no longer has"):
        run_ranks(train, spec, world=1, tmp=folder)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(place: tuple[Path, Store, Manifest], finished: str) -> None:
    folder, store, encoded = place
    spec = tiny_spec(store, encoded, tiny_config(steps=40), "wide", origin=(finished, 30))
    wide = replace(spec, arch=replace(spec.arch, unet=spec.arch.unet.model_copy(update={"context_width": 16})))
    with pytest.raises(RankDiedError, match=r"EngineError: .*this checkpoint does not match the settings"):
        run_ranks(train, wide, world=1, tmp=folder)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(
    place: tuple[Path, Store, Manifest], golden: list[float]
) -> None:
    folder, store, encoded = place
    cfg = tiny_config(checkpoint_every=8)
    full = tiny_spec(store, encoded, cfg, "full-disk", on_progress=FillDiskAt(12))
    with pytest.raises(RankDiedError, match=r"EngineError: .*cannot write the checkpoint"):
        run_ranks(train, full, world=1, tmp=folder)
    assert [found.step for found in Run(store, "full-disk").checkpoints()] == [8]
    run_ranks(train, tiny_spec(store, encoded, cfg, "full-disk"), world=1, tmp=folder)
    assert "resuming from step 8" in take_said(folder)
    np.testing.assert_allclose(loss_curve(store, "full-disk"), golden, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_through_s3_and_on_another_number_of_ranks(s3: str, tmp_path: Path, golden: list[float]) -> None:
    store = Store(f"{s3}/training")
    encoded = tiny_encoded(store)
    cfg = tiny_config(workers=2, checkpoint_every=8)
    with pytest.raises(RankDiedError):
        run_ranks(train, tiny_spec(store, encoded, cfg, "remote", on_progress=KillAt(19)), world=2, tmp=tmp_path)
    marker = Run(store, "remote").checkpoints()[0]
    assert len([name for name in marker.files if name.endswith("optim_states.pt")]) == 2
    run_ranks(train, tiny_spec(store, encoded, tiny_config(checkpoint_every=8), "remote"), world=1, tmp=tmp_path)
    assert "written by 2 ranks" in take_said(tmp_path)
    np.testing.assert_allclose(loss_curve(store, "remote"), golden, rtol=0, atol=1e-5)
    assert json.loads(store.read_bytes("runs/remote/finished.json"))["steps"] == 30
