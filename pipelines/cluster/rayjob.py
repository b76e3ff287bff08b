"""rayjob: prints a KubeRay manifest for one stage: `python -m pipelines rayjob STAGE | kubectl apply -f -`.

For a cluster that exists only while a stage runs. The job's package goes to the storage, and infra/kuberay/rayjob.yaml,
filled in, to standard output; edit images, pools and sizes in that file. When the job has finished, `dvc repro` fetches
its results from the storage, as for every other job.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines.cluster.job_results import attempts_in_storage
from pipelines.cluster.working_dir import entrypoint, job_env, job_name, leave_mark, pack, refuse_what_cannot_travel
from pipelines.runtime.stage import Stage

TEMPLATE = Path("infra") / "kuberay" / "rayjob.yaml"
NAME_CHARS = 47  # KubeRay derives service and pod names from it


def main(stage: Stage) -> None:
    """Write the package and print the manifest. Raises StageError when the stage needs files of this machine."""
    refuse_what_cannot_travel(stage, to="Kubernetes")
    package = pack(stage)
    name = job_name(stage, package)
    job_id = f"{name}-{max(attempts_in_storage(stage, name), default=0) + 1}"
    data = package.zipped(job_id)
    leave_mark(stage)
    stage.store.write_bytes(f"jobs/{job_id}/package.zip", data)
    manifest = filled(yaml.safe_load((stage.root / TEMPLATE).read_text()), stage, job_id)
    print(yaml.dump(manifest, Dumper=_Plain, sort_keys=False), end="")
    print(
        f"{stage.title}: {len(data) / 1e3:,.0f} kB in {stage.store.full_uri(f'jobs/{job_id}')}; once the job has "
        f"finished, `dvc repro {stage.title}` fetches its results",
        file=sys.stderr,
    )


def filled(manifest: dict[str, Any], stage: Stage, job_id: str) -> dict[str, Any]:
    """Return the RayJob with this job's name, command and environment."""
    runtime = {"working_dir": stage.store.full_uri(f"jobs/{job_id}/package.zip"), "env_vars": job_env(stage, job_id)}
    return {
        **manifest,
        "metadata": {**manifest["metadata"], "name": kubernetes_name(job_id)},
        "spec": {
            **manifest["spec"],
            "entrypoint": entrypoint(stage, job_id),
            "runtimeEnvYAML": yaml.safe_dump(runtime, sort_keys=False),
        },
    }


def kubernetes_name(job_id: str) -> str:
    """Return a valid Kubernetes name: lower case, no underscores, shortened before its final digest and attempt."""
    name = job_id.replace("_", "-").lower()
    tail = "-".join(name.split("-")[-2:])
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - len(tail) - 1].rstrip('-')}-{tail}"


class _Plain(yaml.SafeDumper):
    """YAML dumper without anchors: shared nodes are written out each time."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
