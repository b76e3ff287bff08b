"""infra/cost.py: its laws, real ranks against what it reckons, and infra/SCALING.md holds what it prints."""

import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import yaml

from infra.cost import (
    GPUS,
    NVLINK_GBIT_S,
    STAGES,
    VALUE_BYTES,
    Compute,
    Given,
    Links,
    Run,
    Stage,
    cpu_stages,
    gpu_stages,
    main,
    step,
    traffic,
    zero_paper,
)
from infra.scaling import (
    A100_PHOTOS_PER_S,
    HOUR_S,
    PARAMETERS,
    PHOTOS,
    PROFILES,
    cpu_hours,
    encoded_bytes,
    row_bytes,
)
from pbe.config import load_params
from pbe.train.settings import TrainConfig
from tests.benchmarks.link_bytes import TINY_BUCKET, Case, cases, measured, sent_bytes

ROOT = Path(__file__).resolve().parents[2]
PROFILE = yaml.safe_load((PROFILES / "openimages-8gpu.yaml").read_text())
RUN = Run(batch=256, micro_batch=8, steps=100, precision="fp32", stage=1, row_bytes=1000)


# -- real ranks


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel what sockets have sent")
def test_two_real_ranks_send_what_is_reckoned(tmp_path: Path) -> None:
    """ZeRO 2 and 3 with accumulation are where DeepSpeed is furthest from the paper; the drill has all stages."""
    wanted = [Case(1, micro_batches=2), Case(2, "bf16", 2), Case(3, micro_batches=2, bucket=TINY_BUCKET)]
    _assert_sent(wanted, world=2, tmp=tmp_path)


@pytest.mark.drill
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks_send_what_is_reckoned(world: int, tmp_path: Path) -> None:
    _assert_sent(cases(), world=world, tmp=tmp_path)


def _assert_sent(wanted: list[Case], *, world: int, tmp: Path) -> None:
    count, sent = measured(wanted, world=world, tmp=tmp)
    for case, size in zip(wanted, sent, strict=True):
        print(f"{case}: {size / 1e6:.2f} MB sent, {case.reckoned(count, world) / 1e6:.2f} reckoned")
    assert sent == pytest.approx([case.reckoned(count, world) for case in wanted], rel=0.03)


def test_bytes_of_a_connection_are_counted() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        before = sent_bytes()
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as other:
            client.sendall(b"x" * 50_000)
            got = 0
            while got < 50_000:
                got += len(other.recv(65536))
            assert sent_bytes() - before == pytest.approx(50_000, abs=10)


# -- the link


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_sends_nothing(stage: int) -> None:
    assert traffic(stage, ranks=1, size=1e9, micro_batches=4).total == 0
    assert zero_paper(stage, ranks=1, size=1e9).total == 0


def test_the_papers_volumes() -> None:
    """2, 2, 2 and 3 times the parameters as ranks grow: stage 3 sends 1.5 of stage 2."""
    volumes = [zero_paper(stage, ranks=10**9, size=1).total for stage in STAGES]
    assert volumes == pytest.approx([2, 2, 2, 3])


def test_the_volumes_of_this_code() -> None:
    def volume(stage: int, micro_batches: int) -> float:
        return traffic(stage, ranks=10**9, size=1, micro_batches=micro_batches).total

    assert [volume(stage, 1) for stage in STAGES] == pytest.approx([2, 3, 3, 4])
    assert [volume(stage, 4) for stage in STAGES] == pytest.approx([2, 3, 9, 16])


@pytest.mark.parametrize(("stage", "micro_batches"), list(product(STAGES, (1, 4))))
def test_never_less_than_the_paper_and_more_with_more_ranks(stage: int, micro_batches: int) -> None:
    sent = [traffic(stage, ranks=ranks, size=1e9, micro_batches=micro_batches).total for ranks in GPUS]
    assert all(less < more for less, more in pairwise(sent))
    assert all(here >= zero_paper(stage, ranks=ranks, size=1e9).total for here, ranks in zip(sent, GPUS, strict=True))


def test_every_precision_of_training_has_its_bytes() -> None:
    options = TrainConfig.model_json_schema()["properties"]["precision"]["enum"]
    assert set(VALUE_BYTES) == set(options)


def test_a_link_between_nodes_counts_where_there_are_several() -> None:
    links = Links(node_gbit_s=8)
    assert links.seconds(1e9, 16) == 1
    assert links.seconds(1e9, 8) == 8 / NVLINK_GBIT_S
    assert Links(gpu_gbit_s=4, node_gbit_s=8).seconds(1e9, 16) == 2


# -- a step


def test_a_step_is_the_sum_of_its_parts_or_what_overlap_leaves() -> None:
    took = step(RUN, gpus=16, links=Links(node_gbit_s=100), compute=Compute(0.01, 0.006))
    rows, sent = 16, traffic(1, ranks=16, size=4 * PARAMETERS, micro_batches=2)
    assert took.compute_s == pytest.approx(rows * 0.01)
    assert took.link_s == pytest.approx(8 * sent.total / 100e9)
    assert took.longest_s == pytest.approx(took.compute_s + took.link_s)
    hidden = min(rows * 0.006 / 2, 8 * sent.gradients / 100e9)  # beside the second of two backward passes
    assert took.shortest_s == pytest.approx(took.longest_s - hidden)


def test_stage_0_hides_nothing_and_stage_3_may_hide_all() -> None:
    fast = Links(node_gbit_s=10_000)
    alone = step(RUN, gpus=8, links=fast, compute=Compute(1.0), stage=0)
    assert alone.shortest_s == alone.longest_s > alone.compute_s
    full = step(RUN, gpus=8, links=fast, compute=Compute(1.0), stage=3)
    assert full.shortest_s == full.compute_s


@pytest.mark.parametrize(("stage", "gpus"), list(product(STAGES, GPUS)))
def test_a_faster_link_never_costs_time(stage: int, gpus: int) -> None:
    steps = [step(RUN, gpus=gpus, links=Links(node_gbit_s=speed), compute=Compute(), stage=stage)
             for speed in (10, 25, 100, 400)]  # fmt: skip
    assert all(took.compute_s <= took.shortest_s <= took.longest_s for took in steps)
    for slow, fast in pairwise(steps):
        assert fast.shortest_s <= slow.shortest_s and fast.longest_s <= slow.longest_s


def test_storage_that_is_slow_is_the_bottleneck() -> None:
    took = step(RUN, gpus=8, links=Links(storage_gbit_s=1e-4), compute=Compute())
    assert took.bottleneck == "storage" and took.longest_s == pytest.approx(256 * 1000 * 8 / 1e5)


def test_one_gpu_has_the_published_rate() -> None:
    took = step(RUN, gpus=1, links=Links(), compute=Compute())
    assert RUN.batch / took.longest_s == pytest.approx(A100_PHOTOS_PER_S[8] / 8)


@pytest.mark.parametrize("name", ["openimages", "openimages-8gpu"])
def test_micro_batches_are_those_of_the_profile(name: str) -> None:
    train = load_params(PROFILES / f"{name}.yaml").train
    run = Run(train.batch, train.micro_batch, train.steps, train.precision, train.zero_stage, 0)
    assert run.micro_batches(train.workers) == train.accumulation_steps


# -- the other stages


def test_stages_agree_with_the_first_half() -> None:
    assert row_bytes(PROFILE) == encoded_bytes(6)
    slots = PROFILE["materialize"]["slots"]
    for cores in (1, 64):
        ingest, materialize = cpu_stages(PROFILE, gpus=1, cores=cores, links=Links(), given=Given())
        hours = {row[0]: row[1 + (1, 4, 8, 16, 40).index(slots)] for row in cpu_hours()[1:]}
        assert f"{materialize.seconds * cores / HOUR_S:.1f}" == hours["materialize"]
        assert f"{ingest.parts['CPU'] * cores / HOUR_S:.1f}" == hours["ingest: check of the photos"]
        assert f"{ingest.first_s / HOUR_S:.2f}" == hours["ingest: index"]


def test_a_stage_takes_what_its_slowest_part_takes() -> None:
    stage = Stage("x", {"CPU": 3.0, "storage": 5.0}, first_s=1.0)
    assert stage.seconds == 6 and stage.bottleneck == "storage"


def test_more_tasks_than_buckets_help_nobody() -> None:
    few, many = (cpu_stages(PROFILE, gpus=1, cores=cores, links=Links(), given=Given())[1] for cores in (3500, 7000))
    assert few.seconds == many.seconds


def test_what_nobody_gave_is_not_known() -> None:
    stages = gpu_stages(PROFILE, gpus=8, links=Links(), given=Given())
    assert [stage.parts for stage in stages] == [{}, {}, {}]
    encode = gpu_stages(PROFILE, gpus=8, links=Links(), given=Given(encode_row_s=0.1))[0]
    assert encode.seconds == pytest.approx(PHOTOS * 8 * 0.1 / 8)


# -- the program


def test_the_guide_holds_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    guide = (ROOT / "infra" / "SCALING.md").read_text()
    _, _, rest = guide.partition("<!-- python infra/cost.py -->\n\n")
    held, end, _ = rest.partition("\n<!-- end of python infra/cost.py -->")
    assert end and held == printed


def test_own_numbers_come_in(capsys: pytest.CaptureFixture[str]) -> None:
    """32 rows in 2 s: 16 rows/s, so 272,350 steps of 256 rows are 1,210.4 GPU-hours; at 2 each 2,421."""
    arguments = "--gpus 1 --step-s 2 --step-rows 32 --gpu-hour-price 2 --cpu-hour-price 0.5"
    arguments += " --encode-row-s 0.1 --edit-s 3 --judge-s 1"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "| 16 |" in printed and "| 1,210 |" in printed and "2,421" in printed
    assert "not known" not in printed and "your rate" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--step-s", "0"], "--step-s: 0 is not above 0"),
        (["--step-s", "nan"], "--step-s: nan is not above 0"),
        (["--link-gbit-s", "fast"], "--link-gbit-s: 'fast' is no number"),
        (["--gpus", "3"], "--gpus 3 does not divide the profile's 64 lanes"),
        (["--gpus", "1.5"], "--gpus: 1.5 is no whole number"),
        (["--zero-stage", "4"], "--zero-stage: invalid choice"),
        (["--profile", "mine"], "--profile: invalid choice"),
        (["--backward-s", "1"], "--step-s, which is missing"),
        (["--step-s", "1", "--backward-s", "2"], "--backward-s 2 is a part of --step-s 1"),
        (["--gpu-hour-price", "-1"], "--gpu-hour-price"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = stopped.value.code
    assert isinstance(message, str) and says in message and "\n" not in message


def test_the_program_ends_with_an_error_code() -> None:
    command = [sys.executable, str(ROOT / "infra" / "cost.py"), "--gpus", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
