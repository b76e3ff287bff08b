"""Time, cost and bottleneck of every stage for OpenImages on 1 to 64 GPUs: python infra/cost.py prints the tables.

Arithmetic on inputs that are measured here, cited, or given by the user; what is none of these is printed as not known.
Rates, sizes and counts come from infra/scaling.py, the run from a profile. Nothing here was run at this size.

The seconds of a step on one GPU are those of a published A100 rate, or yours: train with `workers: 1`, so that no time
of the link is in them, and give MLflow's forward_s + backward_s + optimizer_s as --step-s, backward_s as --backward-s.
A row is taken to cost the same however many a GPU has.
What ranks send was counted on real ones: python tests/benchmarks/link_bytes.py.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from infra.scaling import (  # noqa: E402
    A100_PHOTOS_PER_S,
    CHECKS_PER_S,
    DAY_S,
    GB,
    HOUR_S,
    INDEX_S,
    PAPER_DAYS,
    PAPER_GPUS,
    PAPER_RATE,
    PAPER_SIZED,
    PARAMETERS,
    PHOTO_BYTES,
    PHOTOS,
    PROFILES,
    TRIPLET_BYTES,
    materialize_core_s,
    row_bytes,
    table,
)

GPUS = (1, 2, 4, 8, 16, 32, 64)
STAGES = (0, 1, 2, 3)
# of an engine's gradients and weights, on the link too (python tests/benchmarks/link_bytes.py)
VALUE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "bf16_pure": 2}

# -- cited: README.md of github.com/mosaicml/diffusion at 066e68f, seconds of an A100 for a 512 px photo, with latents
# computed before; and "expect a 1.4x increase in time" where one photo and one text are encoded in the step too
A100_ROW_S = 8 / A100_PHOTOS_PER_S[8]
A100_ENCODE_S = 0.4 * A100_ROW_S
# -- cited: network/README.md of github.com/stas00/ml-engineering at 0030e63: all_reduce of nccl-tests on a node of A100
# with NVLink, 235 GB/s of bus bandwidth, which is what each GPU sends at a time
NVLINK_GBIT_S = 8 * 235
# -- cited: "Reduce throttling at the service level", user guide of Amazon Athena: S3 "has a limit of 5500 GET requests
# per second per partitioned prefix". All training photos of OpenImages have one prefix
S3_GETS_PER_S = 5500
# -- asked about, not claimed: what a node may have towards the others
LINKS_GBIT_S = (10, 25, 100, 400)


# ------------------------------------------------------------------------------------------------------- the link


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step. It receives as many."""

    gradients: float
    parameters: float

    @property
    def total(self) -> float:
        return self.gradients + self.parameters


def zero_paper(stage: int, *, ranks: int, size: float) -> Traffic:
    """By section 7 of the ZeRO paper (arXiv 1910.02054), for `size` bytes of gradients or of parameters.

    An all-reduce is a reduce-scatter and an all-gather, (N-1)/N of the size each. Stage 0 all-reduces gradients; 1 and
    2 reduce-scatter them and gather the new parameters; 3 reduce-scatters them and gathers parameters before the
    forward and the backward pass: 2, 2, 2 and 3 times (N-1)/N. Of one backward pass per step.
    """
    part = size * (ranks - 1) / ranks
    gradients, parameters = {0: (2, 0), 1: (1, 1), 2: (1, 1), 3: (1, 2)}[stage]
    return Traffic(gradients * part, parameters * part)


def traffic(stage: int, *, ranks: int, size: float, micro_batches: int = 1) -> Traffic:
    """As pbe/train/engine.py makes DeepSpeed 0.19.8 do it, for `size` bytes of gradients or of parameters.

    Buckets of gradients are all-reduced at every stage, 2 (N-1)/N of their size, also where a rank keeps its part
    alone: `use_multi_rank_bucket_allreduce` at 1 and 2, `__avg_scatter_contiguous_grads` at 3. Stages 0 and 1 add the
    micro-batches of a step up first and reduce once; 2 and 3 keep no whole gradients, so they reduce after each. Stages
    1 and 2 gather the new parameters once a step, (N-1)/N; 3 gathers them in every forward and again in every backward
    pass (less what stays from one to the other, at most two of GPU_BUCKET elements: an upper bound).
    """
    part = size * (ranks - 1) / ranks
    reductions = micro_batches if stage >= 2 else 1
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage]
    return Traffic(2 * reductions * part, gathers * part)


@dataclass(frozen=True)
class Links:
    """What one GPU sends at a time inside a node, one node to the others, and each node reads from storage."""

    gpu_gbit_s: float = NVLINK_GBIT_S
    node_gbit_s: float | None = None
    storage_gbit_s: float | None = None
    gpus_per_node: int = 8

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.gpus_per_node)

    def seconds(self, size: float, ranks: int) -> float:
        """For `size` bytes sent by each rank around a ring, which is as fast as its slowest hop.

        A ring visits all GPUs of a node before it leaves it, so what leaves a node is what one rank sends; several
        rings share the data and the sum stays. Latency is not counted, and no link reaches its nominal speed.
        """
        speed = self.gpu_gbit_s
        if self.nodes(ranks) > 1:
            assert self.node_gbit_s is not None
            speed = min(speed, self.node_gbit_s)
        return 8 * size / (speed * 1e9)

    def storage_s(self, size: float, ranks: int) -> float:
        """To read or write `size` bytes in all; 0 where the speed of storage is not given."""
        return 8 * size / (self.storage_gbit_s * 1e9 * self.nodes(ranks)) if self.storage_gbit_s else 0.0


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU per row; `backward_s` of them are the backward pass, None: not known apart."""

    row_s: float = A100_ROW_S
    backward_s: float | None = None


@dataclass(frozen=True)
class Run:
    """What a profile says about training."""

    batch: int
    micro_batch: int
    steps: int
    precision: str
    stage: int
    row_bytes: int

    def rows(self, gpus: int) -> int:
        return self.batch // gpus

    def micro_batches(self, gpus: int) -> int:
        """Per step. The global batch stays, so more GPUs have fewer rows each, in the end less than a micro-batch."""
        return -(-self.rows(gpus) // self.micro_batch)

    @property
    def gradient_bytes(self) -> int:
        return PARAMETERS * VALUE_BYTES[self.precision]


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step. window_s: the part of compute_s beside which gradients may travel."""

    compute_s: float
    window_s: float
    hideable_s: float
    exposed_s: float
    storage_s: float

    @property
    def link_s(self) -> float:
        return self.hideable_s + self.exposed_s

    @property
    def longest_s(self) -> float:
        """No overlap of link and compute. Storage is read ahead by a thread, so the slower of the two counts."""
        return max(self.compute_s + self.link_s, self.storage_s)

    @property
    def shortest_s(self) -> float:
        """All overlap that this code allows: what is hideable costs only what the window does not cover."""
        return max(self.compute_s + max(0.0, self.hideable_s - self.window_s) + self.exposed_s, self.storage_s)

    @property
    def bottleneck(self) -> str:
        parts = {"compute": self.compute_s, "link": self.link_s, "storage": self.storage_s}
        return max(parts, key=lambda name: parts[name])


def step(run: Run, *, gpus: int, links: Links, compute: Compute, stage: int | None = None) -> Step:
    """compute = rows of a GPU * row_s; link = bytes / speed of the slowest hop.

    What may be hidden beside what (overlap_comm): stage 0 reduces after the backward pass, nothing; 1 in the last
    micro-batch's backward pass, 2 in each, both gather parameters after the optimizer, exposed; 3 sends all of it
    beside forward and backward. Where the backward pass is not known apart, all of the compute stands for it: the
    lower bound.
    """
    stage = run.stage if stage is None else stage
    micro_batches = run.micro_batches(gpus)
    sent = traffic(stage, ranks=gpus, size=run.gradient_bytes, micro_batches=micro_batches)
    hideable = {0: 0.0, 1: sent.gradients, 2: sent.gradients, 3: sent.total}[stage]
    compute_s = run.rows(gpus) * compute.row_s
    backward_s = compute_s if compute.backward_s is None else run.rows(gpus) * compute.backward_s
    window_s = {0: 0.0, 1: backward_s / micro_batches, 2: backward_s, 3: compute_s}[stage]
    return Step(
        compute_s=compute_s,
        window_s=window_s,
        hideable_s=links.seconds(hideable, gpus),
        exposed_s=links.seconds(sent.total - hideable, gpus),
        storage_s=links.storage_s(run.batch * run.row_bytes, gpus),
    )


# --------------------------------------------------------------------------------------------------- other stages


@dataclass(frozen=True)
class Stage:
    """One stage on some machines: seconds by what they are spent on; the largest decides. Empty: not known."""

    name: str
    parts: dict[str, float]
    first_s: float = 0.0  # on one core, before the rest

    @property
    def seconds(self) -> float:
        return self.first_s + max(self.parts.values())

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Given:
    """What the user knows and nobody has measured or published: None is not known."""

    request_s: float | None = None
    encode_row_s: float | None = None
    edit_s: float | None = None
    judge_s: float | None = None


def cpu_stages(params: dict[str, Any], *, gpus: int, cores: int, links: Links, given: Given) -> list[Stage]:
    """ingest: one core reads the lists; then each photo is one request, its bytes, and a check of 1/CHECKS_PER_S core
    seconds. materialize: core seconds of infra/scaling.py. A bucket is one task: there are never more cores at work."""
    ingest, slots = params["ingest"], params["materialize"]["slots"]
    busy = min(cores, ingest["buckets"])
    tasks = min(cores / ingest["per_bucket"]["cpus"], ingest["buckets"])
    request_s = given.request_s or 0.0
    requests_s = max(PHOTOS / S3_GETS_PER_S, PHOTOS * request_s / (tasks * ingest["download"]["connections"]))
    triplets = PHOTOS * slots * TRIPLET_BYTES[params["materialize"]["jpeg_chroma"]]
    photos = PHOTOS * PHOTO_BYTES
    return [
        Stage(
            "ingest",
            {"CPU": PHOTOS / CHECKS_PER_S / busy, "requests": requests_s, "storage": links.storage_s(2 * photos, gpus)},
            first_s=INDEX_S,
        ),
        Stage(
            "materialize",
            {"CPU": materialize_core_s(slots) / busy, "storage": links.storage_s(photos + triplets, gpus)},
        ),
    ]


def gpu_stages(params: dict[str, Any], *, gpus: int, links: Links, given: Given) -> list[Stage]:
    """Rows over GPUs, nothing is sent between them. encode: a row is three photos through the autoencoder and
    reference_draws pictures through the backbone. edit: bench items times holes, references and seeds."""
    rows = PHOTOS * params["materialize"]["slots"]
    size = rows * (TRIPLET_BYTES[params["materialize"]["jpeg_chroma"]] + row_bytes(params))
    edits = edits_of(params)
    stages = []
    for name, count, each_s, moved in [
        ("encode", rows, given.encode_row_s, size),
        ("edit", edits, given.edit_s, 0),
        ("evaluate", edits, given.judge_s, 0),
    ]:
        parts = {"compute": count * each_s / gpus, "storage": links.storage_s(moved, gpus)} if each_s else {}
        stages.append(Stage(name, parts))
    return stages


def edits_of(params: dict[str, Any]) -> int:
    edit = params["edit"]
    return params["bench"]["max_items"] * len(edit["holes"]) * len(edit["references"]) * len(edit["seeds"])


# ------------------------------------------------------------------------------------------------------- printing


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"infra/cost.py: {message}")  # one line, not the usage before it


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def whole(text: str) -> int:
    value = positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return int(value)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PAPER_SIZED, default="openimages-8gpu", help="what is run")
    parser.add_argument("--gpus", type=whole, nargs="+", default=GPUS, help="how many; 1 to 64 by twos")
    parser.add_argument("--gpus-per-node", type=whole, default=8)
    parser.add_argument("--cores-per-gpu", type=whole, help="default: train.per_worker.cpus of the profile")
    parser.add_argument("--step-s", type=positive, help="seconds of a step of one GPU; default: the published rate")
    parser.add_argument("--step-rows", type=whole, help="rows in that step; default: those of a GPU in the profile")
    parser.add_argument("--backward-s", type=positive, help="seconds of it that are the backward pass")
    parser.add_argument("--zero-stage", type=int, choices=STAGES, help="default: the profile's")
    parser.add_argument("--precision", choices=VALUE_BYTES, help="default: the profile's")
    parser.add_argument(
        "--gpu-link-gbit-s", type=positive, default=NVLINK_GBIT_S, help="of a GPU inside a node; NVLink"
    )
    parser.add_argument(
        "--link-gbit-s", type=positive, nargs="+", default=LINKS_GBIT_S, help="what a node sends to others; several"
    )
    parser.add_argument("--storage-gbit-s", type=positive, help="what storage gives a node. No default")
    parser.add_argument("--request-s", type=positive, help="seconds until a photo's download ends. No default")
    parser.add_argument("--encode-row-s", type=positive, help="GPU seconds per row of encode. No default")
    parser.add_argument("--edit-s", type=positive, help="GPU seconds per edit. No default")
    parser.add_argument("--judge-s", type=positive, help="GPU seconds per edit of all judges. No default")
    parser.add_argument("--gpu-hour-price", type=positive, help="prints what GPUs cost. No default")
    parser.add_argument("--cpu-hour-price", type=positive, help="prints what cores cost. No default")
    args = parser.parse_args(arguments)
    if args.step_s is None and (args.step_rows or args.backward_s):
        parser.error("--step-rows and --backward-s say what is in --step-s, which is missing")
    if args.step_s is not None and args.backward_s is not None and args.backward_s > args.step_s:
        parser.error(f"--backward-s {args.backward_s:g} is a part of --step-s {args.step_s:g}, and cannot be more")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    params = yaml.safe_load((PROFILES / f"{args.profile}.yaml").read_text())
    train = params["train"]
    for gpus in args.gpus:
        if train["lanes"] % gpus:
            sys.exit(f"infra/cost.py: --gpus {gpus} does not divide the profile's {train['lanes']} lanes")
    run = Run(
        batch=train["batch"],
        micro_batch=train["micro_batch"],
        steps=train["steps"],
        precision=args.precision or train["precision"],
        stage=train["zero_stage"] if args.zero_stage is None else args.zero_stage,
        row_bytes=row_bytes(params),
    )
    if run.precision == "bf16_pure" and run.stage == 0:
        sys.exit("infra/cost.py: precision bf16_pure needs ZeRO stage 1, 2 or 3: DeepSpeed has it nowhere else")
    compute = Compute()
    if args.step_s:
        rows = args.step_rows or train["batch"] // train["workers"]
        compute = Compute(args.step_s / rows, args.backward_s / rows if args.backward_s else None)
    links = [
        Links(args.gpu_link_gbit_s, speed, args.storage_gbit_s, args.gpus_per_node)
        for speed in sorted(args.link_gbit_s)
    ]
    given = Given(args.request_s, args.encode_row_s, args.edit_s, args.judge_s)
    cores = args.cores_per_gpu or train["per_worker"]["cpus"]
    prices = (args.gpu_hour_price, args.cpu_hour_price)

    print(f"### What one GPU sends in a step, GB, {PARAMETERS:,} parameters\n")
    print(table(sent_rows()))
    whose = "your" if args.step_s else "the published"
    print(f"\n### Training, {args.profile}: ZeRO {run.stage}, {run.precision}, batch {run.batch}, {whose} rate\n")
    print(table(training_rows(run, args.gpus, links, compute, args.gpu_hour_price)))
    print("\n### The same by ZeRO stage: seconds of a step, and rows per GPU at which link and compute are equal\n")
    print(table(stage_rows(run, args.gpus, links, compute)))
    speed = links[-1].node_gbit_s
    print(f"\n### All stages: hours and bottleneck, {cores} cores per GPU, {speed:g} Gbit/s between nodes\n")
    print(table(all_rows(params, run, args.gpus, links[-1], compute, given, cores, prices)))
    print("\n### Next to what others published\n")
    print(table(published_rows(run, compute, args.gpus, links[-1])))
    return 0


def sent_rows() -> list[list[str]]:
    cases = [("fp32", 8, 1), ("fp32", 8, 4), ("fp32", 64, 1), ("bf16", 8, 1), ("bf16", 8, 4), ("bf16", 64, 1)]
    head = [
        f"{4 if precision == 'fp32' else 2} bytes, {ranks} GPUs, {micro} micro-batch{'es' if micro > 1 else ''}"
        for precision, ranks, micro in cases
    ]
    rows = [["ZeRO", "gradients x (N-1)/N, ZeRO paper", "here, m micro-batches", *head]]
    formula = {0: "2", 1: "2 + 1", 2: "2 m + 1", 3: "4 m"}
    for stage in STAGES:
        paper = zero_paper(stage, ranks=2, size=2)
        sizes = [
            traffic(stage, ranks=ranks, size=PARAMETERS * VALUE_BYTES[precision], micro_batches=micro).total
            for precision, ranks, micro in cases
        ]
        rows.append([f"{stage}", f"{paper.total:g}", formula[stage], *(f"{size / GB:.1f}" for size in sizes)])
    return rows


def training_rows(
    run: Run, counts: Sequence[int], links: Sequence[Links], compute: Compute, price: float | None
) -> list[list[str]]:
    rows = [["GPUs", "between nodes, Gbit/s", "rows per GPU, micro-batches", "compute, s", "link, s", "step, s",
             "rows/s", "days", "GPU-hours", "of linear", "storage must give", "bottleneck"]]  # fmt: skip
    if price:
        rows[0].append("cost")
    alone_s = run.batch * compute.row_s  # of one GPU, which sends nothing
    for gpus, link in cases(counts, links):
        took = step(run, gpus=gpus, links=link, compute=compute)
        low, high = took.shortest_s, took.longest_s
        fewest_h, most_h = (run.steps * seconds * gpus / HOUR_S for seconds in (low, high))
        rows.append(
            [
                f"{gpus}",
                f"{link.node_gbit_s:g}" if link.nodes(gpus) > 1 else "one node",
                f"{run.rows(gpus)}, {run.micro_batches(gpus)}",
                f"{took.compute_s:.3f}",
                f"{took.link_s:.3f}",
                span(low, high, ".3f"),
                span(run.batch / high, run.batch / low, ",.0f"),
                span(run.steps * low / DAY_S, run.steps * high / DAY_S, ".2f"),
                span(fewest_h, most_h, ",.0f"),
                span(100 * alone_s / gpus / high, 100 * alone_s / gpus / low, ".0f") + " %",
                f"{run.batch / low * run.row_bytes / 1e6:,.0f} MB/s",
                took.bottleneck,
            ]
        )
        if price:
            rows[-1].append(span(price * fewest_h, price * most_h, ",.0f"))
    return rows


def cases(counts: Sequence[int], links: Sequence[Links]) -> list[tuple[int, Links]]:
    """Each number of GPUs with each link between nodes, where there are several nodes."""
    return [(gpus, link) for gpus in counts for link in (links if links[0].nodes(gpus) > 1 else links[:1])]


def stage_rows(run: Run, counts: Sequence[int], links: Sequence[Links], compute: Compute) -> list[list[str]]:
    """Of the largest node and of the most GPUs."""
    inside = [gpus for gpus in counts if links[0].nodes(gpus) == 1]
    shown = [*inside[-1:], *(gpus for gpus in counts[-1:] if links[0].nodes(gpus) > 1)]
    rows = [["GPUs", "between nodes, Gbit/s", *(f"ZeRO {stage}" for stage in STAGES), "rows, ZeRO 1"]]
    for gpus, link in cases(shown, links):
        steps = [step(run, gpus=gpus, links=link, compute=compute, stage=stage) for stage in STAGES]
        speed = f"{link.node_gbit_s:g}" if link.nodes(gpus) > 1 else "one node"
        equal = steps[1].link_s / compute.row_s  # at stage 1 accumulation sends nothing more
        spans = (span(took.shortest_s, took.longest_s, ".3f") for took in steps)
        rows.append([f"{gpus}", speed, *spans, f"{equal:,.1f}"])
    return rows


def all_rows(
    params: dict[str, Any],
    run: Run,
    counts: Sequence[int],
    link: Links,
    compute: Compute,
    given: Given,
    cores_per_gpu: int,
    prices: tuple[float | None, float | None],
) -> list[list[str]]:
    rows = [["stage", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in counts)]]
    columns = []
    for gpus in counts:
        cores = gpus * cores_per_gpu
        column = {
            stage.name: told(stage, cores, prices[1])
            for stage in cpu_stages(params, gpus=gpus, cores=cores, links=link, given=given)
        }
        coding = {
            stage.name: told(stage, gpus, prices[0]) for stage in gpu_stages(params, gpus=gpus, links=link, given=given)
        }
        column["encode"] = coding.pop("encode")
        if given.encode_row_s is None:
            photos_s = 3 * PHOTOS * params["materialize"]["slots"] * A100_ENCODE_S / gpus
            column["encode, the photos alone, by a published ratio"] = told(
                Stage("", {"compute": photos_s}), gpus, prices[0]
            )
        took = step(run, gpus=gpus, links=link, compute=compute)
        low_h, high_h = (run.steps * seconds / HOUR_S for seconds in (took.shortest_s, took.longest_s))
        price = prices[0] * gpus if prices[0] else 0  # of an hour
        cost = f", {span(price * low_h, price * high_h, ',.0f')}" if price else ""
        column["train"] = f"{span(low_h, high_h, ',.1f')}, {took.bottleneck}{cost}"
        columns.append(column | coding)
    return [*rows, *([name, *(column[name] for column in columns)] for name in columns[0])]


def told(stage: Stage, machines: int, price: float | None) -> str:
    """Hours, bottleneck and, with a price, what that many GPUs or cores cost in that time."""
    if not stage.parts:
        return "not known"
    hours = stage.seconds / HOUR_S
    cost = f", {price * machines * hours:,.0f}" if price else ""
    return f"{hours:,.2f}, {stage.bottleneck}{cost}"


def published_rows(run: Run, compute: Compute, counts: Sequence[int], link: Links) -> list[list[str]]:
    """GPU-hours that the rows of this run take at each rate."""
    seen = run.batch * run.steps
    rows = [["", "GPUs", "rows/s", "rows/s and GPU", f"GPU-hours for {seen / 1e6:.1f} million rows"]]

    def add(name: str, gpus: int, low: float, high: float) -> None:
        fewest_h, most_h = (seen / rate * gpus / HOUR_S for rate in (high, low))
        rows.append(
            [
                name,
                f"{gpus}",
                span(low, high, ",.0f"),
                span(low / gpus, high / gpus, ".1f"),
                span(fewest_h, most_h, ",.0f"),
            ]
        )

    paper_rate = PAPER_RATE * PAPER_GPUS
    add(f"the paper: {PAPER_DAYS} days, V100", PAPER_GPUS, paper_rate, paper_rate)
    for gpus, rate in A100_PHOTOS_PER_S.items():
        add("published, A100, latents before", gpus, rate, rate)
    for gpus in counts:
        took = step(run, gpus=gpus, links=link, compute=compute)
        if gpus in A100_PHOTOS_PER_S:
            where = f", {link.node_gbit_s:g} Gbit/s" if link.nodes(gpus) > 1 else ""
            add(f"reckoned here{where}", gpus, run.batch / took.longest_s, run.batch / took.shortest_s)
    return rows


def span(low: float, high: float, form: str) -> str:
    """Both bounds, or one number where they print the same."""
    first, last = f"{low:{form}}", f"{high:{form}}"
    return first if first == last else f"{first} to {last}"


if __name__ == "__main__":
    sys.exit(main())
