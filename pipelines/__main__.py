"""`python -m pipelines STAGE [--variant NAME]`: run one stage here, or submit it as a Ray job.

With RAY_ADDRESS=http://... the heavy stages submit themselves to that cluster and bring their manifest back;
without it the same command runs on local Ray. Also: `repro` (what `make repro` runs: `check`, `dvc repro`, `summary`),
`status`, `params` (every setting as it is resolved) and `profile NAME --root DIR` (writes params.yaml from
infra/profiles).
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from pbe.errors import UserError, printable
from pbe.places import home_root
from pipelines.runtime import local_ray
from pipelines.runtime.cures import with_cure
from pipelines.runtime.environment import is_dashboard, prepare_driver
from pipelines.runtime.logs import stage_log
from pipelines.runtime.stage import CLUSTER_STAGES, STAGES, VARIANT_STAGES, Stage, StageError, open_stage


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in STAGES:
        stage_parser = commands.add_parser(name, help=f"run the {name} stage")
        if name in VARIANT_STAGES:
            stage_parser.add_argument("--variant", required=True)
        elif name == "baseline":
            stage_parser.add_argument("--baseline", required=True, dest="variant")
        stage_parser.add_argument("--as-job", metavar="ID", help=argparse.SUPPRESS)
    rayjob_parser = commands.add_parser("rayjob", help="a stage as a KubeRay manifest: ... | kubectl apply -f -")
    rayjob_parser.add_argument("stage", choices=CLUSTER_STAGES)
    rayjob_parser.add_argument("--variant")
    repro_parser = commands.add_parser(
        "repro",
        help="check, `dvc repro` with one Ray for all stages, summary",
        prefix_chars="\0",  # all that follows is DVC's, options too
        add_help=False,
    )
    repro_parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of dvc repro, such as a stage")
    commands.add_parser("check", help="check the settings and that the photos exist; `repro` runs this first")
    commands.add_parser("status", help="how far each stage is: parts, rejects, checkpoints, jobs, MLflow")
    commands.add_parser("summary", help="where the report is, headline numbers, MLflow command")
    params_parser = commands.add_parser("params", help="every resolved setting, with its unit and source")
    params_parser.add_argument("--diff", metavar="PROFILE", help="only what differs from a profile of infra/profiles")
    profile_parser = commands.add_parser("profile", help="write params.yaml from infra/profiles")
    profile_parser.add_argument("name")
    profile_parser.add_argument("--root", default="")
    args = parser.parse_args(argv)
    prepare_driver()
    try:
        _dispatch(args)
    except UserError as error:
        return _tell(error, with_cure(error).splitlines())  # a failed job's error quotes its log
    except OSError as error:  # a file or folder of the user that cannot be read or written
        return _tell(error, [" ".join(str(error).split())])
    except KeyboardInterrupt:
        print("pbe: interrupted; finished parts and checkpoints are kept; rerun the command to resume", file=sys.stderr)
        return 130
    return 0


def _tell(error: Exception, lines: Sequence[str]) -> int:
    """Print the lines of an error and its notes, which say where the logs are; return the exit status."""
    notes = getattr(error, "__notes__", [])
    print("pbe: error: " + "\n".join(map(printable, (*lines, *notes))), file=sys.stderr)
    return 1


def _dispatch(args: argparse.Namespace) -> None:
    # imported here: a stage must not pay for the others' imports (torch, ray, mlflow)
    if args.command == "check":
        from pipelines.commands.check import main as run_check

        return run_check()
    if args.command == "repro":
        from pipelines.commands.repro import main as run_repro

        return run_repro(args.arguments)
    if args.command == "summary":
        from pipelines.reporting.summary import main as run_summary

        return run_summary()
    if args.command == "status":
        from pipelines.commands.status import main as run_status

        return run_status()
    if args.command == "params":
        from pipelines.commands.params import main as run_params

        return run_params(args.diff)
    if args.command == "profile":
        from pipelines.commands.profile import main as run_profile

        return run_profile(args.name, args.root)
    if args.command == "rayjob":
        from pipelines.cluster.rayjob import main as run_rayjob

        if (args.stage in VARIANT_STAGES) != (args.variant is not None):
            needs = "needs --variant NAME" if args.variant is None else "has no variants; leave --variant out"
            raise StageError(f"rayjob: stage {args.stage} {needs}")
        return run_rayjob(open_stage(args.stage, args.variant))
    stage = open_stage(args.command, getattr(args, "variant", None))
    if args.as_job:  # the submitter keeps the log
        return _run_as_job(stage, args.as_job)
    with stage_log(home_root(), stage.title):
        _run(stage)


def _run(stage: Stage) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise StageError(f"RAY_ADDRESS={address} is for Ray Client; name the cluster's dashboard, http://host:8265")
    if stage.is_heavy and is_dashboard(address):
        from pipelines.cluster.submit import run_remotely

        run_remotely(stage, address)
    else:
        with local_ray.ended_with():
            _run_here(stage.name)(stage)
    if stage.name == "train":
        from pipelines.train import fetch_export

        fetch_export(stage)


def _run_as_job(stage: Stage, job_id: str) -> None:
    from pipelines.cluster.job_entry import check_cluster, send_outputs

    check_cluster(stage)
    _run_here(stage.name)(stage)
    send_outputs(stage, job_id)


def _run_here(name: str) -> Callable[[Stage], None]:
    import importlib

    return importlib.import_module(f"pipelines.{name}").main


if __name__ == "__main__":
    sys.exit(main())
