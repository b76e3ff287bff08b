"""Batches: same rows and draws for any number of ranks and any restart; draws have the right distributions."""

import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch

from pbe.data.schema import array_bytes, array_shape, array_value, encoded_schema, holds_array, is_optional
from pbe.data.slots import group_rows, slot_files, slot_name
from pbe.places import repo_root
from pbe.store import Manifest, Store, StoreError, make_manifest
from pbe.train.data.batch import Batch, joined
from pbe.train.data.draws import RowForm, draw
from pbe.train.data.encoded import EncodedRows
from pbe.train.data.input import TrainInput, micro_batches, validation_batches
from pbe.train.data.order import Share
from pbe.train.data.prefetch import Prefetched
from pbe.train.data.processes import InputProcessError, Turn, in_processes
from pbe.train.data.reader import Group, RowReader, StoredRow
from pbe.train.settings import TrainConfig
from tests.train.ranks import tiny_config

LATENT, TOKENS = (2, 3, 3), (3, 1, 4)
ROWS_OF_SHARD, SLOTS, ROWS_PER_GROUP = (5, 0, 4, 1), 2, 2
SEED, CPU = 23, torch.device("cpu")
CONFIG = {"rows_per_group": ROWS_PER_GROUP, "codec": {"kind": "kl"}}


def config(**changes: object) -> TrainConfig:
    shares = {
        "hole_probs": {"box": 0.5, "bezier": 0.5},
        "pair_prob": 0.0,
        "condition_dropout_prob": 0.2,
        "context_dropout_prob": 0.1,
    }
    return tiny_config(**{"batch": 8, "micro_batch": 4, "streams": 4, "workers": 1, **shares, **changes})


CFG = config()


def _table(shard: int, slot: int, count: int, latent: tuple[int, int, int] = LATENT) -> pa.Table:
    schema, rng = encoded_schema(latent, TOKENS), np.random.default_rng([shard, slot])
    columns: dict[str, list] = {
        "image_id": [f"image{shard}_{index}" for index in range(count)],
        "slot": [slot] * count,
        "box_index": [0] * count,
    }
    for field in schema:
        if holds_array(field):
            shape = (count, *array_shape(field))
            values = rng.integers(0, 5, shape) / 4 if "mask_latent" in field.name else rng.standard_normal(shape)
            columns[field.name] = [array_bytes(field, value) for value in np.abs(values)]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


@pytest.fixture
def encoded(store: Store) -> Manifest:
    """Four shards of unequal size, one of them empty; two slots; ten rows per slot."""
    units = [
        store.write_unit(
            "encode",
            f"s{shard:04d}-x",
            {slot_name(slot): _table(shard, slot, count) for slot in range(SLOTS)},
            counts={"rows": count * SLOTS},
            rows_per_group=ROWS_PER_GROUP,
        )
        for shard, count in enumerate(ROWS_OF_SHARD)
    ]
    return make_manifest("encode", config=CONFIG, version=1, units=units)


def _steps(
    store: Store, encoded: Manifest, count: int, *, world: int = 1, rank: int = 0, micro: int = 4, start: int = 0
) -> list[list[Batch]]:
    """`count` optimizer steps of one rank: lists of micro-batches. Global batch 8, four streams."""
    source = EncodedRows(encoded, tokens="class", device=CPU)
    cfg, share = config(micro_batch=micro, workers=world), Share(rank, world, start)
    batches = micro_batches(store, source, cfg=cfg, seed=SEED, share=share)
    return [list(islice(batches, 8 // (world * micro))) for _ in range(count)]


def _row_bytes(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    """Each row of the batches, all fields, as bytes."""
    return [
        tuple(np.asarray(getattr(batch, field.name)[row]).tobytes() for field in fields(Batch))
        for batch in batches
        for row in range(len(batch.x0))
    ]


def _row(std: float = 0.5, token_shape: tuple[int, int, int] = TOKENS, *, extras: bool = False) -> pa.Table:
    """One row, in float32. extras: with an object's mask and a pair."""
    rng, schema = np.random.default_rng(1), encoded_schema(LATENT, token_shape, "float32")
    columns: dict[str, list] = {"image_id": ["a"], "slot": [0], "box_index": [0]}
    for field in schema:
        if field.metadata:
            value = rng.standard_normal(array_shape(field))
            stored = array_bytes(field, np.full_like(value, std) if "_std" in field.name else value)
            columns[field.name] = [stored if extras or not is_optional(field) else None]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _arrays(row: pa.Table) -> dict[str, np.ndarray]:
    arrays = (field for field in row.schema if field.metadata and row.column(field.name).null_count == 0)
    return {field.name: array_value(field, row.column(field.name)[0].as_py()) for field in arrays}


def _examples(
    count: int, cfg: TrainConfig = CFG, row: pa.Table | None = None, codec: str = "kl"
) -> dict[str, np.ndarray]:
    """One row's examples in `count` epochs, stacked by name."""
    encoded = make_manifest("encode", config=CONFIG | {"codec": {"kind": codec}}, version=1, units=[])
    source = EncodedRows(encoded, tokens=cfg.exemplar.tokens, device=CPU)
    draws = [partial(draw, "a", 0, epoch=epoch, cfg=cfg, seed=SEED) for epoch in range(count)]
    stored = StoredRow(Group(_row() if row is None else row), 0, (0, 0, 0))
    batch = source.prepare([(stored, drawn) for drawn in draws])
    return {field.name: np.asarray(getattr(batch, field.name)) for field in fields(Batch)}


def _no_units() -> Manifest:
    return make_manifest("encode", config=CONFIG, version=1, units=[])


# -- order and resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (2, 1), (4, 2)])
def test_any_number_of_ranks_gives_the_same_rows_with_the_same_draws(
    world: int, micro: int, store: Store, encoded: Manifest
) -> None:
    alone = _steps(store, encoded, 7)
    ranks = [_steps(store, encoded, 7, world=world, rank=rank, micro=micro) for rank in range(world)]
    for step, expected in enumerate(alone):
        together = [row for rank in ranks for row in _row_bytes(rank[step])]
        assert len(together) == 8
        streams = [
            _row_bytes(expected)[2 * stream : 2 * stream + 2] for stream in range(4)
        ]  # stream after stream, two rows each
        assert together == [row for rank in range(world) for stream in streams[rank::world] for row in stream]


@pytest.mark.parametrize("start", [1, 3, 10])
def test_starting_at_a_step_is_the_same_stream_from_that_step_on(start: int, store: Store, encoded: Manifest) -> None:
    whole = _steps(store, encoded, start + 4, world=2, rank=1, micro=2)
    resumed = _steps(store, encoded, 4, world=2, rank=1, micro=2, start=start)
    assert [_row_bytes(step) for step in resumed] == [_row_bytes(step) for step in whole[start:]]


def test_ten_rows_in_uneven_streams_all_come_and_a_second_visit_draws_anew(store: Store, encoded: Manifest) -> None:
    """40 steps of 8 rows: every one of the 10 x 2 rows comes several times, never with the same noise."""
    rows = [row for step in _steps(store, encoded, 40) for row in _row_bytes(step)]
    names = [field.name for field in fields(Batch)]
    noises = [row[names.index("noise")] for row in rows]
    assert len(set(noises)) == len(noises) == 320
    tokens = {row[names.index("exemplar_tokens")] for row in rows}
    assert len(tokens) == 10 * 2 * 2  # draws 1 and 2 of every row


def test_a_batch_has_the_declared_shapes_and_types(store: Store, encoded: Manifest) -> None:
    ((batch, other),) = _steps(store, encoded, 1)
    for b in (batch, other):
        for name in ("x0", "masked_latent", "noise"):
            assert getattr(b, name).shape == (4, *LATENT) and getattr(b, name).dtype == torch.float32
        assert b.keep_mask_latent.shape == (4, 1, 3, 3) and b.keep_mask_latent.dtype == torch.float32
        assert b.exemplar_tokens.shape == (4, 1, 4) and b.exemplar_tokens.dtype == torch.float32
        assert b.timestep.shape == (4,) and b.timestep.dtype == torch.int64
        assert b.drop_condition.shape == b.drop_context.shape == (4,)
        assert b.drop_condition.dtype == b.drop_context.dtype == torch.bool


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 2000, 1 << 30])
def test_the_reader_returns_every_row_as_stored_in_any_order(store: Store, encoded: Manifest, cache_bytes: int) -> None:
    files = slot_files(encoded)
    tables = {(s, f): store.read_table(file) for s, slot in enumerate(files) for f, file in enumerate(slot)}
    places = [(slot, file, row) for (slot, file), table in tables.items() for row in range(table.num_rows)]
    assert len(places) == sum(ROWS_OF_SHARD) * SLOTS
    reader, rng = RowReader(store, files, cache_bytes), np.random.default_rng(0)
    for index in rng.permutation(np.repeat(np.arange(len(places)), 2)):
        slot, file, row = places[index]
        found = reader.read(slot=slot, file=file, row=row)
        assert found.values() == tables[slot, file].slice(row, 1).to_pylist()[0]
        assert reader.groups.held_bytes <= max(
            cache_bytes, max(group.table.nbytes for group in reader.groups.values.values())
        )
        assert reader.groups.held_bytes == sum(group.table.nbytes for group in reader.groups.values.values())


def test_row_group_sizes_follow_from_the_rows(store: Store, encoded: Manifest) -> None:
    for slot in slot_files(encoded):
        assert [file.rows for file in slot] == list(ROWS_OF_SHARD)
        for file in slot:
            stored = pq.ParquetFile(store.path(file.path)).metadata
            groups = [stored.row_group(index).num_rows for index in range(stored.num_row_groups)]
            assert group_rows(file, ROWS_PER_GROUP) == [rows for rows in groups if rows]


# -- draws --------------------------------------------------------------------------------------------------------


def test_a_draw_is_a_function_of_seed_image_slot_and_epoch() -> None:
    def noise(image_id: str = "a", slot: int = 0, epoch: int = 0, seed: int = SEED) -> bytes:
        form = RowForm(("box", "bezier"), LATENT, stored_references=3, posterior_has_spread=True)
        made = draw(image_id, slot, form, epoch=epoch, cfg=CFG, seed=seed)
        return made.noise.tobytes()

    assert noise() == noise()
    assert len({noise(), noise(seed=24), noise(epoch=1), noise(slot=1), noise(image_id="b")}) == 5


@pytest.mark.parametrize("prob", [0.0, 0.1, 0.2, 1.0])
def test_dropout_has_its_share_and_the_two_kinds_are_independent(prob: float) -> None:
    drawn = _examples(3000, config(condition_dropout_prob=prob, context_dropout_prob=0.3))
    condition, context = drawn["drop_condition"], drawn["drop_context"]
    if prob in (0.0, 1.0):
        assert (condition == bool(prob)).all()
    else:
        assert condition.mean() == pytest.approx(prob, abs=4 * np.sqrt(prob * (1 - prob) / 3000))
        assert (condition & context).mean() == pytest.approx(0.3 * prob, abs=0.02)
    assert context.mean() == pytest.approx(0.3, abs=0.035)


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_the_hole_kind_has_its_share_and_mask_and_latent_go_together(prob: float) -> None:
    row = _arrays(_row(std=0.0))
    drawn = _examples(1000, config(hole_probs={"box": 1 - prob, "bezier": prob}), _row(std=0.0))
    bezier = np.array([np.array_equal(latent, row["bezier_masked_mean"]) for latent in drawn["masked_latent"]])
    assert bezier.mean() == pytest.approx(prob, abs=0.07 if prob == 0.5 else 0)
    for is_bezier, latent, keep in zip(bezier, drawn["masked_latent"], drawn["keep_mask_latent"], strict=True):
        kind = "bezier" if is_bezier else "box"
        np.testing.assert_array_equal(latent, row[f"{kind}_masked_mean"])
        np.testing.assert_allclose(keep, 1 - row[f"{kind}_hole_mask_latent"])  # polarity: 1 = known


def test_a_mask_and_a_pair_are_seen_by_their_shares_and_only_where_they_are() -> None:
    probs = {"box": 0.2, "bezier": 0.2, "segmentation": 0.6}
    cfg = config(hole_probs=probs, pair_prob=0.7, reference_augmentation=False)
    having, without = _row(std=0.0, extras=True), _row(std=0.0)
    arrays, drawn = _arrays(having), _examples(2000, cfg, having)
    latents = {kind: arrays[f"{kind}_masked_mean"] for kind in probs}
    kinds = [next(kind for kind in probs if np.array_equal(row, latents[kind])) for row in drawn["masked_latent"]]
    pair = (drawn["exemplar_tokens"] == arrays["pair_tokens"][0]).all(axis=(1, 2))
    own = (drawn["exemplar_tokens"] == arrays["exemplar_tokens"][0]).all(axis=(1, 2))
    assert {kind: kinds.count(kind) / 2000 for kind in probs} == pytest.approx(probs, abs=0.05)
    assert pair.mean() == pytest.approx(0.7, abs=0.05) and (pair ^ own).all()
    for row, kind in zip(drawn["keep_mask_latent"], kinds, strict=True):
        np.testing.assert_allclose(row, 1 - arrays[f"{kind}_hole_mask_latent"])
    other = _examples(2000, cfg, without)
    bezier = np.array([np.array_equal(row, latents["bezier"]) for row in other["masked_latent"]])
    box = np.array([np.array_equal(row, latents["box"]) for row in other["masked_latent"]])
    assert bezier.mean() == pytest.approx(0.5, abs=0.05) and (bezier ^ box).all()
    assert (other["exemplar_tokens"] == arrays["exemplar_tokens"][0]).all()
    for name in ("noise", "timestep", "drop_condition"):
        np.testing.assert_array_equal(drawn[name], other[name])


def test_x0_and_masked_latent_are_samples_of_their_posteriors_with_separate_noise() -> None:
    row, drawn = _arrays(_row()), _examples(4000, config(hole_probs={"box": 1.0, "bezier": 0.0}))
    parts = {
        "x0": (drawn["x0"] - row["source_mean"]) / 0.5,
        "masked": (drawn["masked_latent"] - row["box_masked_mean"]) / 0.5,
        "noise": drawn["noise"],
    }
    flat = np.stack([part.reshape(-1) for part in parts.values()])
    np.testing.assert_allclose(flat.mean(1), 0, atol=0.02)
    np.testing.assert_allclose(flat.std(1), 1, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(3), atol=0.02)


def test_a_posterior_without_spread_gives_its_mean_and_shares_all_other_draws() -> None:
    row, drawn, other = _arrays(_row()), _examples(50, row=_row(std=0.0), codec="patch"), _examples(50)
    assert np.array_equal(drawn["x0"], np.stack([row["source_mean"]] * 50))
    for name in ("noise", "timestep", "drop_condition", "drop_context", "keep_mask_latent", "exemplar_tokens"):
        np.testing.assert_array_equal(drawn[name], other[name])


def test_timesteps_are_uniform() -> None:
    times = _examples(4000)["timestep"]
    assert times.dtype == np.int64
    counts = np.bincount(times // 100, minlength=10)
    assert len(counts) == 10 and ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees, p = 0.001


def test_without_augmentation_the_clean_reference_is_read_and_with_it_never() -> None:
    tokens = _arrays(_row())["exemplar_tokens"]
    clean = _examples(300, config(reference_augmentation=False))["exemplar_tokens"]
    assert (clean == tokens[0]).all()
    augmented = _examples(600)["exemplar_tokens"]
    first, second = ((augmented == tokens[draw]).all((1, 2)) for draw in (1, 2))
    assert (first ^ second).all() and first.mean() == pytest.approx(0.5, abs=0.08)


def test_a_single_draw_is_the_clean_one_even_with_augmentation() -> None:
    row = _row(token_shape=(1, *TOKENS[1:]))
    np.testing.assert_array_equal(_examples(1, row=row)["exemplar_tokens"], _arrays(row)["exemplar_tokens"])


def test_the_class_token_is_the_first_of_those_stored() -> None:
    row, exemplar = _row(token_shape=(3, 5, 4)), CFG.exemplar.model_dump()
    one, every = (
        _examples(1, config(exemplar=exemplar | {"tokens": tokens}), row)["exemplar_tokens"]
        for tokens in ("class", "all")
    )
    assert one.shape == (1, 1, 4) and every.shape == (1, 5, 4)
    np.testing.assert_array_equal(every[:, :1], one)


# -- prefetch -----------------------------------------------------------------------------------------------------


def test_prefetching_keeps_the_order_and_stays_within_its_depth() -> None:
    made: list[int] = []
    ahead = threading.Event()

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if len(made) == 4:
                ahead.set()
            yield number

    prefetched = Prefetched(items(), depth=3)
    assert ahead.wait(10)  # three in the queue, the fourth waits for room
    assert len(made) == 4
    assert [prefetched.next() for _ in range(20)] == list(range(20))
    prefetched.close()


def test_prefetching_computes_in_one_thread_and_leaves_the_others_theirs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        prefetched = Prefetched(iter(torch.get_num_threads, None), depth=1)
        assert prefetched.next() == 1 and torch.get_num_threads() == 2
        with ThreadPoolExecutor() as later:
            assert later.submit(torch.get_num_threads).result() == 2
        prefetched.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [OSError("disk gone"), ValueError("bad row"), KeyboardInterrupt()])
def test_an_error_surfaces_in_the_consumer_after_the_items_before_it(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    prefetched = Prefetched(items(), depth=4)
    assert prefetched.next() == 1
    with pytest.raises(type(error)) as caught:
        prefetched.next()
    assert caught.value is error
    prefetched.close()


def test_the_end_of_the_items_is_an_error_not_a_wait() -> None:
    prefetched, outcome = Prefetched(iter([1]), depth=2), []

    def consume() -> None:
        prefetched.next()
        try:
            prefetched.next()
        except StopIteration:
            outcome.append("stopped")

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(5)
    assert outcome == ["stopped"]
    prefetched.close()


def test_close_ends_the_thread_even_when_the_queue_is_full() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 0

    before = set(threading.enumerate())
    prefetched = Prefetched(forever(), depth=1)
    (thread,) = set(threading.enumerate()) - before
    prefetched.next()
    prefetched.close()
    assert not thread.is_alive()


# -- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_prepare_the_same_batches_in_the_same_order(
    store: Store, encoded: Manifest, processes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = multiprocessing.active_children()
    batches = {count: _inputs(store, encoded, processes=count, start=1, count=9) for count in (0, processes)}
    assert len(batches[0]) == 9 and _row_bytes(batches[processes]) == _row_bytes(batches[0])
    assert multiprocessing.active_children() == before
    assert "terminate called" not in capfd.readouterr().err


def test_an_error_in_a_process_is_the_one_of_the_thread(store: Store, encoded: Manifest, tmp_path: Path) -> None:
    damaged = next(path for path in sorted(tmp_path.rglob("*.parquet")) if path.stat().st_size > 1000)
    damaged.write_bytes(damaged.read_bytes()[:500])
    said = []
    for processes in (0, 2):
        with pytest.raises(StoreError) as caught:
            _inputs(store, encoded, processes=processes, start=0, count=40)
        said.append(str(caught.value))
    assert said[0] == said[1] and "Traceback" not in said[1]


class UnpicklableError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def endless(turn: Turn, *, bytes_each: int = 1, fail: str = "") -> Iterator[bytes]:
    """Items for input processes, whose first turn fails after two."""
    for number in count(turn.first, turn.of):
        if fail and number >= 2 and turn.first == 0:
            raise UnpicklableError("two", "arguments") if fail == "unpicklable" else KeyError("the cause")
        yield number.to_bytes(2, "little") * bytes_each


@pytest.mark.parametrize(
    ("fail", "kind", "said"), [("unpicklable", RuntimeError, "two arguments"), ("key", KeyError, "in endless")]
)
def test_a_bug_in_a_process_ends_the_input_with_its_traceback(fail: str, kind: type[Exception], said: str) -> None:
    with closing(in_processes(partial(endless, fail=fail), 2)) as items:
        assert [next(items), next(items)] == [b"\0\0", b"\1\0"]
        with pytest.raises(kind) as caught:
            next(items)
    assert said in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_a_killed_process_is_an_error_that_names_the_setting() -> None:
    with closing(in_processes(endless, 1)) as items:
        next(items)
        [process] = multiprocessing.active_children()
        process.kill()
        with pytest.raises(InputProcessError, match=r"train\.input_processes was killed"):
            for _ in items:
                pass


def test_processes_end_with_a_training_process_that_is_killed() -> None:
    """While their pipe is full: DataLoader alone leaves them waiting for ever."""
    code = (
        "import multiprocessing, os, time; from functools import partial\n"
        "from pbe.train.data.processes import in_processes; from tests.train.test_batches import endless\n"
        "items = in_processes(partial(endless, bytes_each=100_000), 2); next(items); time.sleep(2)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True); os.kill(os.getpid(), 9)"
    )
    env = os.environ | {"PYTHONPATH": str(repo_root())}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=100)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _inputs(store: Store, encoded: Manifest, *, processes: int, start: int, count: int) -> list[Batch]:
    """The first micro-batches of one rank's TrainInput, which is closed."""
    cfg = config(micro_batch=4, input_processes=processes)
    source = EncodedRows(encoded, tokens="class", device=CPU)
    with closing(TrainInput(store, source, cfg=cfg, seed=SEED, share=Share(0, 1, start))) as opened:
        return [opened.next() for _ in range(count)]


# -- what an epoch costs ------------------------------------------------------------------------------------------


class _CountingStream(io.RawIOBase):
    """Passes reads on and adds their bytes to `reads`."""

    def __init__(self, stream: pa.NativeFile, reads: list[int]) -> None:
        super().__init__()
        self._stream, self._reads = stream, reads

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(None if size < 0 else size)
        self._reads.append(len(data))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._stream.seek(offset, whence)
        return self._stream.tell()

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


class _CountingFiles:
    """A store's filesystem whose files count what is read of them."""

    def __init__(self, files: pafs.FileSystem) -> None:
        self._files = files
        self.reads: list[int] = []

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_CountingStream(self._files.open_input_file(path), self.reads), mode="r")


BIG_LATENT, BIG_ROWS_PER_GROUP = (4, 32, 32), 4


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """Two slots of 64 rows of 50 kB, in four shards and groups of four rows: two groups for each of eight streams."""
    store = Store(str(tmp_path_factory.mktemp("big")))
    units = [
        store.write_unit(
            "encode",
            f"s{shard:04d}-x",
            {slot_name(slot): _table(shard, slot, 16, latent=BIG_LATENT) for slot in range(2)},
            counts={"rows": 32},
            rows_per_group=BIG_ROWS_PER_GROUP,
        )
        for shard in range(4)
    ]
    return store, make_manifest(
        "encode", config=CONFIG | {"rows_per_group": BIG_ROWS_PER_GROUP}, version=1, units=units
    )


def _epoch(
    store: Store, encoded: Manifest, monkeypatch: pytest.MonkeyPatch, world: int, cache_bytes: int
) -> tuple[int, list[set[str]]]:
    """Bytes that all ranks together read for slot 0, and the names of each global batch's rows. Batch 16, 8 streams."""
    counting = _CountingFiles(store._fs)
    reader = lambda store, files, _, **rest: RowReader(store, files, cache_bytes, **rest)  # noqa: E731
    monkeypatch.setattr(store, "_fs", counting)
    monkeypatch.setattr("pbe.train.data.input.RowReader", reader)
    batches: list[set[str]] = [set() for _ in range(4)]
    for rank in range(world):
        stream = micro_batches(
            store,
            EncodedRows(encoded, tokens="class", device=CPU),
            cfg=config(batch=16, micro_batch=2, streams=8, workers=world),
            seed=SEED,
            share=Share(rank, world, 0),
        )
        for names in batches:
            for batch in islice(stream, 16 // (world * 2)):
                names.update(batch.rows)
    return sum(counting.reads), batches


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["no cache", "cache"])
def test_an_epoch_reads_each_file_once_however_many_ranks_share_it(
    big: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    store, encoded = big
    stored = sum(file.bytes for file in slot_files(encoded)[0])
    batches_of_world = {}
    for world in (1, 2, 8):
        with monkeypatch.context() as patched:
            read, batches_of_world[world] = _epoch(store, encoded, patched, world, cache_bytes)
        assert 0.9 * stored < read <= 1.1 * stored, f"{world} ranks read {read / stored:.2f} of the slot's bytes"
    assert batches_of_world[1] == batches_of_world[2] == batches_of_world[8]
    assert all(len(names) == 16 for names in batches_of_world[1])
    assert len(set().union(*batches_of_world[1])) == 64


def test_the_reader_forgets_footers_beyond_its_bound(store: Store, encoded: Manifest) -> None:
    files = slot_files(encoded)
    reader = RowReader(store, files, 0, footer_bytes=1)
    for slot in (0, 1):
        for file in (0, 2):
            assert reader.read(slot=slot, file=file, row=0).values()["image_id"] == f"image{file}_0"
            assert list(reader.footers.values) == [(slot, file)]
            assert reader.footers.held_bytes == len(reader.footers.values[slot, file].data)


def test_groups_of_the_newest_rows_stay_whatever_they_weigh(store: Store, encoded: Manifest) -> None:
    """Files 0 and 2 of slot 0, groups of two rows."""
    reader = RowReader(store, slot_files(encoded), 0, keep_rows=4)
    for file, row in ((0, 0), (0, 2), (2, 0), (0, 2)):
        reader.read(slot=0, file=file, row=row)
    assert list(reader.groups.values) == [(0, 2, 0), (0, 0, 1)]


# -- validation rows ---------------------------------------------------------------------------------------------------


def _validation(store: Store, encoded: Manifest, rows: int) -> Batch:
    source, cfg = EncodedRows(encoded, tokens="class", device=CPU), config(validation_rows=rows)
    return joined(list(validation_batches(store, source, cfg=cfg, seed=SEED)))


def test_validation_rows_are_whole_groups_spread_over_the_slot(store: Store, encoded: Manifest) -> None:
    names = [row.split()[0] for row in _validation(store, encoded, 4).rows]
    # groups of two rows: the first, one from the middle and the last; the latter two have one row
    assert names == ["image0_0", "image0_1", "image0_4", "image3_0"]
    assert [row.split()[0] for row in _validation(store, encoded, 4).rows] == names


def test_validation_rows_are_all_rows_where_there_are_no_more(store: Store, encoded: Manifest) -> None:
    assert len(set(_validation(store, encoded, 1000).rows)) == sum(ROWS_OF_SHARD)


def test_validation_draws_spread_timesteps_alternate_holes_and_drop_nothing(store: Store, encoded: Manifest) -> None:
    rows = _validation(store, encoded, 10)
    assert rows.timestep.tolist() == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert not (rows.drop_condition | rows.drop_context).any()
    stored = store.read_table(slot_files(encoded)[0][0])
    for number, kind in enumerate(("box", "bezier")):
        hole = array_value(
            stored.schema.field(f"{kind}_hole_mask_latent"), stored.column(f"{kind}_hole_mask_latent")[number].as_py()
        )
        np.testing.assert_array_equal(rows.keep_mask_latent[number], 1 - hole)
    clean = array_value(stored.schema.field("exemplar_tokens"), stored.column("exemplar_tokens")[0].as_py())[0]
    np.testing.assert_array_equal(rows.exemplar_tokens[0], clean)
