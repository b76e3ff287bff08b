"""One program that runs, measures and checks on a GPU what trains or edits: `make gpu`, or python -m tests.gpu.

The whole is bounded to eight minutes; on an H100 all but `compile` should fit, which takes what is left. Cases run in a
process of their own, each within a time limit; results are written after every case, so that a run that is cut keeps
what it has. `--device cpu` rehearses all parts with tiny sizes: its speeds mean nothing. Ends with 1 when a case failed
or broke a bound of parity.

Parts: card, ladder, cards, peers, stops, encode, edit, parity, doctor, speedrun, compile.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.process import CaseError, DeviceProcess
from tests.gpu.report import HEADINGS, HIDDEN, failures, missed, write_results

ROOT = Path(__file__).resolve().parents[2]
PARTS = tuple(HEADINGS)
Rows = Iterator[dict[str, Any]]


@dataclass
class Run:
    """What the parts share: processes, sizes, a folder and the time that is left."""

    device: str
    work: Path
    out: Path
    deadline: float  # by time.monotonic()
    peak_flops: float | None = None
    doctor: subprocess.Popen[str] | None = None
    _ladder: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from tests.gpu.sizes import PAPER_SIZES, TINY_SIZES

        self.sizes = PAPER_SIZES if self.device == "cuda" else TINY_SIZES
        self.here = DeviceProcess(self.device, self.out / f"{self.device}.log")
        # where a checkpoint goes to that a GPU wrote; and Ray's driver, whose environment must stay its own
        self.cpu = DeviceProcess("cpu", self.out / "cpu.log")
        self.ray = DeviceProcess(self.device, self.out / "ray.log")

    @property
    def ladder(self) -> Any:
        from tests.gpu.ladder import Ladder

        if self._ladder is None:
            self._ladder = Ladder(self.here, self.work, self.sizes, self.peak_flops, self.limit)
        return self._ladder

    def limit(self, seconds: float) -> float:
        """Time limit of a case in seconds: the given one, or what is left if that is less."""
        return max(1.0, min(seconds, self.deadline - time.monotonic()))

    def row(self, case: str, function: Callable[..., Any], *args: Any, limit_s: float) -> dict[str, Any]:
        """The row of a case with one result; a failure goes into the row."""
        try:
            return {"case": case, **self.here.result(function, *args, limit_s=self.limit(limit_s))}
        except CaseError as error:
            return {"case": case, "failed": str(error)}

    def rows(self, case: str, function: Callable[..., Any], *args: Any, limit_s: float) -> Rows:
        """The rows that a function yields."""
        try:
            yield from self.here.results(function, *args, limit_s=self.limit(limit_s))
        except CaseError as error:
            yield {"case": case, "failed": str(error)}

    def close(self) -> None:
        for process in (self.here, self.cpu, self.ray):
            process.close()
        if self.doctor is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.doctor.pid, signal.SIGKILL)
            self.doctor.communicate()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts")
    parser.add_argument("--out", type=Path, help="folder for GPU.md, gpu.json and logs; default: reports/gpu")
    parser.add_argument("--seconds", type=float, help="all is over after so many; default: 470, on the cpu 3600")
    args = parser.parse_args(argv)
    out = (args.out or ROOT / "reports" / ("gpu" if args.device == "cuda" else "gpu-rehearsal")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    since = time.monotonic()
    deadline = since + (args.seconds or (470 if args.device == "cuda" else 3600))
    with tempfile.TemporaryDirectory(prefix="pbe-gpu-") as folder:
        run = Run(args.device, Path(folder), out, deadline)
        try:
            results = measure(run, args.only)
        finally:
            run.close()
    problems = failures(results)
    for problem in [*problems, *missed(results)]:
        print(f"gpu: {problem}", file=sys.stderr)
    print(f"gpu: {out / 'GPU.md'}, {time.monotonic() - since:.0f} s")
    return 1 if problems else 0


def measure(run: Run, parts: list[str]) -> dict[str, Any]:
    from tests.gpu.card import about_machine
    from tests.gpu.training import write_encoded_rows

    since = time.monotonic()
    results: dict[str, Any] = {"machine": {"device": run.device}, "seconds": 0.0, "parts": {}}
    for process in (run.here, run.cpu, *([run.ray] if "parity" in parts else [])):
        process.start()
    try:
        results["machine"] = run.here.result(about_machine, limit_s=run.limit(90))
        if {"ladder", "cards", "peers", "stops", "compile"} & set(parts):
            run.cpu.result(write_encoded_rows, run.work, run.sizes, limit_s=run.limit(90))
    except CaseError as error:
        raise SystemExit(f"gpu: nothing can be measured here: {error}") from None
    if results["machine"].get("datasheet_bf16_tflops"):
        run.peak_flops = 1e12 * results["machine"]["datasheet_bf16_tflops"]
    for part in PARTS:
        if part not in parts:
            continue
        if part == "parity" and "doctor" in parts:
            _start_doctor(run)  # in parallel, because neither is timed
        rows = results["parts"][part] = []
        for row in _until(run.deadline, part, COMMANDS[part](run)):
            rows.append(row)
            results["seconds"] = time.monotonic() - since
            print(f"{results['seconds']:4.0f} s  {part}: {_line(row)}", flush=True)
            write_results(run.out, results)
    return results


def _until(deadline: float, part: str, rows: Rows) -> Rows:
    """All rows until the time is up, then one that says so. If a part fails, the next one still runs."""
    while True:
        if time.monotonic() > deadline:
            yield {"case": "the rest", "failed": "not run: the time was up"}
            return
        try:
            yield next(rows)
        except StopIteration:
            return
        except Exception as error:
            yield {"case": part, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            return


def _line(row: dict[str, Any]) -> str:
    shown = {key: value for key, value in row.items() if key not in ("case", *HIDDEN) and value is not None}
    texts = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()]
    return ", ".join([str(row["case"]), *texts])


# -- parts -------------------------------------------------------------------------------------------------------------


def card(run: Run) -> Rows:
    from tests.gpu.card import measure_card

    for row in run.rows("card", measure_card, run.sizes, limit_s=60):
        if run.peak_flops is None and row["case"] == "matrix product, bf16":
            run.peak_flops = 1e12 * row["tflops"]
        yield row


def ladder(run: Run) -> Rows:
    yield from run.ladder.climb()


def cards(run: Run) -> Rows:
    from infra.memory import CARDS
    from tests.gpu.cards import measure_profile

    for name in CARDS:
        yield run.row(name, measure_profile, run.work, run.sizes, name, limit_s=120)


def peers(run: Run) -> Rows:
    from tests.gpu.peers import LARGEST_MICRO_BATCH, in_turns

    best = run.ladder.best
    cfg = best.changed({"micro_batch": min(best.micro_batch, LARGEST_MICRO_BATCH)}).config(run.sizes)
    for peer in ("bare", "official"):
        yield run.row(peer, in_turns, run.work, run.sizes, cfg, peer, limit_s=120)


def stops(run: Run) -> Rows:
    from tests.gpu.editing import stops_of_edits
    from tests.gpu.training import stops_of_training

    cfg = run.ladder.best.changed({"accumulation": 4, "kernels": {"compile": False}}).config(run.sizes)
    yield run.row("training", stops_of_training, run.work, run.sizes, cfg, limit_s=90)
    yield run.row("editing", stops_of_edits, run.sizes, limit_s=60)


def encode(run: Run) -> Rows:
    from tests.gpu.encoding import measure_encode

    for precision in ("fp32", "tf32", "bf16"):
        yield from run.rows(f"encode, {precision}", measure_encode, run.sizes, precision, limit_s=60)


def edit(run: Run) -> Rows:
    from tests.gpu.editing import measure_edits

    yield from run.rows("edit", measure_edits, run.sizes, limit_s=80)


def parity(run: Run) -> Rows:
    from tests.gpu.parity import parity

    yield from parity(run.device, run.here, run.cpu, run.ray, run.work)


def _start_doctor(run: Run) -> None:
    options = ["--gpu"] if run.device == "cuda" else ["--ranks", "1"]
    run.doctor = subprocess.Popen(
        [sys.executable, "-m", "pbe.cli", "doctor", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def doctor(run: Run) -> Rows:
    """Findings that are not `ok`, and all of the device. Findings about packages and DVC are not GPU failures."""
    if run.doctor is None:
        _start_doctor(run)
    assert run.doctor is not None
    out, errors = run.doctor.communicate(timeout=run.limit(150))
    lines = [line for line in out.splitlines() if line[:4] in ("ok  ", "warn", "fail")]
    of_device = ("GPU", "driver", "sdpa", "nccl", "training drill")
    for line in lines:
        level, _, rest = line.partition(" ")
        check, _, found = rest.strip().partition(": ")
        if level == "ok" and not check.startswith(of_device):
            continue
        row = {"case": check, "level": level, "found": found}
        yield row | ({"failed": found} if level == "fail" and check.startswith(of_device) else {})
    if not lines:
        yield {"case": "pbe doctor", "failed": (errors.strip().splitlines() or ["it said nothing"])[-1]}


def speedrun(run: Run) -> Rows:
    from tests.gpu.speedrun import measure_speedrun

    plain = {"kernels": {"compile": False}}
    cases = {"without the perceptual loss, not compiled": {**plain, "perceptual_weight": 0.0}, "not compiled": plain}
    for case, changes in {**cases, "as the profile": {}}.items():
        yield run.row(case, measure_speedrun, run.work, run.sizes, changes, limit_s=150)


def compiled(run: Run) -> Rows:
    """Each runs in a fresh process: after another shape, torch would compile for shapes of any size."""
    from tests.gpu.editing import measure_compiled_edits
    from tests.gpu.peers import LARGEST_MICRO_BATCH, in_turns

    run.here.close()
    yield run.ladder.compiled()
    for count in reversed(run.sizes.edits):
        run.here.close()
        yield from run.rows("edit", measure_compiled_edits, run.sizes, count, limit_s=150)
    run.here.close()
    best = run.ladder.best
    small = {"micro_batch": min(best.micro_batch, LARGEST_MICRO_BATCH), "kernels": {"compile": True}}
    yield run.row("bare", in_turns, run.work, run.sizes, best.changed(small).config(run.sizes), "bare", limit_s=240)


COMMANDS: dict[str, Callable[[Run], Rows]] = {
    "card": card,
    "ladder": ladder,
    "cards": cards,
    "peers": peers,
    "stops": stops,
    "encode": encode,
    "edit": edit,
    "parity": parity,
    "doctor": doctor,
    "speedrun": speedrun,
    "compile": compiled,
}

if __name__ == "__main__":
    sys.exit(main())
