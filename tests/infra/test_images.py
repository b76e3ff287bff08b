"""Images and the MLflow stack, offline: Dockerfiles, what .dockerignore lets in, the compose file.

As in test_manifests.py: a function lists what is wrong, finds nothing in the committed file, each mistake in a copy.
"""

import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from docker.utils import exclude_paths

from tests.infra.test_manifests import RAY, changed

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SECRET = re.compile(r"(^|_)(KEY|SECRET|TOKEN|PASSWORD|CREDENTIALS?)(_|$)", re.IGNORECASE)


# -- Dockerfiles ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, its lines joined."""

    word: str
    rest: str


def steps(text: str) -> list[Step]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        Step(word.upper(), " ".join(rest.split())) for word, _, rest in (x.partition(" ") for x in joined.splitlines())
    ]


def dockerfile_problems(text: str, ignore: str, root: Path = ROOT) -> list[str]:
    all_steps = steps(text)
    problems = []
    for step in all_steps:
        words = step.rest.split()
        if step.word == "FROM" and not re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", words[0]):
            problems.append(f"FROM {words[0]}: not pinned")
        if step.word == "ADD":
            problems.append("ADD: COPY takes no URLs and unpacks nothing")
        if step.word in ("ARG", "ENV"):
            names = re.findall(r"([A-Za-z_][A-Za-z0-9_]*)(?==|$|\s)", step.rest)
            problems += [f"{step.word} {name}: a secret stays in the layers" for name in names if SECRET.search(name)]
        if step.word == "RUN":
            script = re.sub(r"^(--\S+ )*", "", step.rest)
            problems += subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True).stderr.splitlines()
        if step.word == "RUN" and re.search(r"https?://", step.rest):
            problems.append("RUN: fetches from an address that is written out")
        if step.word == "RUN" and "pip install" in step.rest and not re.search(r"requirements\.lock|-e \.", step.rest):
            problems.append("RUN pip install: without requirements.lock")
    sources = [source for step in all_steps if step.word == "COPY" for source in step.rest.split()[:-1]]
    let_in = exclude_paths(str(root), [line for line in ignore.splitlines() if line.strip() and line[0] != "#"])
    for source in sources:
        if not (root / source).exists():
            problems.append(f"COPY {source}: is not there")
        elif source not in let_in:
            problems.append(f"COPY {source}: .dockerignore keeps it out")
    users = [step.rest for step in all_steps if step.word == "USER"]
    if not users or not re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", users[-1]):
        problems.append("the last USER is not a uid above 0, which is what runAsNonRoot can check")
    return problems


IGNORE = (ROOT / ".dockerignore").read_text()
DOCKERFILES = [INFRA / "docker" / "Dockerfile", INFRA / "mlflow" / "Dockerfile"]
DOCKERFILE = DOCKERFILES[0].read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles(path: Path) -> None:
    assert dockerfile_problems(path.read_text(), IGNORE) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("FROM python:3.11-slim-bookworm", "FROM python", "not pinned"),
        ("FROM python:3.11-slim-bookworm", "FROM python:latest", "not pinned"),
        ("COPY pbe pbe", "ADD https://example.com/pbe.tar.gz /opt/", "ADD"),
        ("COPY pbe pbe", "COPY pbee pbe", "COPY pbee: is not there"),
        ("COPY pbe pbe", "COPY tests tests", "COPY tests: .dockerignore keeps it out"),
        ("COPY pbe pbe", "RUN wget https://example.com/x", "written out"),
        ("ARG TORCH_INDEX=", "ARG AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY: a secret"),
        (
            "ENV NO_ALBUMENTATIONS_UPDATE=1",
            "ENV MLFLOW_TRACKING_PASSWORD=x NO_ALBUMENTATIONS_UPDATE=1",
            "PASSWORD: a secret",
        ),
        ("    fi \\\n", "", " unexpected"),
        ("pip install -r requirements.lock", "pip install ray", "RUN pip install"),
        ("USER 1000:1000", "USER root", "last USER"),
        ("USER 1000:1000", "USER pbe", "last USER"),
        ("USER 1000:1000\n", "", "last USER"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_found(old: str, new: str, told: str) -> None:
    assert old in DOCKERFILE
    text = DOCKERFILE.replace(old, new)
    if "pip install" in old:
        text = text.replace("\"$(grep '^torch==' requirements.lock)\"", "torch").replace(
            "/opt/pbe/requirements.lock", ""
        )
    assert told in " ".join(dockerfile_problems(text, IGNORE))


def test_the_names_of_images_carry_the_ray_version() -> None:
    for path in (*DOCKERFILES, INFRA / "README.md", *INFRA.glob("kuberay/*.yaml"), INFRA / "ray-cluster-aws.yaml"):
        assert set(re.findall(r":ray([0-9.]+[0-9])", path.read_text())) <= {RAY}, path


def test_nothing_that_is_secret_or_large_reaches_the_docker_daemon(tmp_path: Path) -> None:
    kept_out = [
        ".env",
        "prod.env",
        "key.pem",
        ".git/config",
        ".venv/bin/python",
        ".store/parts/a",
        "data/ingest/x.json",
    ]
    kept_out += [
        "mlflow.db",
        "models/full/unet.safetensors",
        "pbe/.env",
        "pbe/prod.env",
        "pbe/__pycache__/a.pyc",
        "notes.txt",
    ]
    kept_out += ["infra/mlflow/.env", "infra/profiles/.env", "pipelines/key.pem", ".dvc/config.local"]
    for name in ["pbe/store.py", "pbe/data/sample/photos.csv", *kept_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    let_in = exclude_paths(str(tmp_path), [line for line in IGNORE.splitlines() if line.strip() and line[0] != "#"])
    assert {"pbe/store.py", "pbe/data/sample/photos.csv"} <= let_in
    assert not let_in & set(kept_out)


def test_what_the_image_holds_is_enough_to_run_a_stage(tmp_path: Path) -> None:
    """The tree that COPY makes, without the repository around it."""
    let_in = exclude_paths(str(ROOT), [line for line in IGNORE.splitlines() if line.strip() and line[0] != "#"])
    sources = [source for step in steps(DOCKERFILE) if step.word == "COPY" for source in step.rest.split()[:-1]]
    for name in sorted(let_in):
        if (ROOT / name).is_file() and any(name == source or name.startswith(f"{source}/") for source in sources):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    program = (
        "import pathlib, pbe, pipelines.materialize, pipelines.cluster.submit\n"
        "from pipelines.runtime.stage import CLUSTER_STAGES, open_stage, versions\n"
        "assert pathlib.Path(pbe.__file__).is_relative_to(pathlib.Path.cwd())\n"
        "print(all(open_stage(name, 'full') and versions(name) for name in CLUSTER_STAGES))"
    )
    for arguments in (["-c", program], ["-m", "pipelines", "check"]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout in ("True\n", "")


# -- the MLflow stack ----------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())
EXAMPLE = (INFRA / "mlflow" / ".env.example").read_text()
REFERENCE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def compose_problems(compose: dict[str, Any], example: str) -> list[str]:
    schema = yaml.safe_load((Path(__file__).parent / "compose.schema.json").read_text())
    problems = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(compose)]
    if problems:
        return problems
    for name, service in compose["services"].items():
        if "image" in service and not re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", service["image"]):
            problems.append(f"{name}: {service['image']} is not pinned")
        if (
            "build" in service
            and not (INFRA / "mlflow" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        ):
            problems.append(f"{name}: there is no {service['build']['dockerfile']}")
        problems += [
            f"{name}: port {port} is open to the network"
            for port in service.get("ports", ())
            if port[:10] != "127.0.0.1:"
        ]
        if "healthcheck" not in service:
            problems.append(f"{name}: no healthcheck")
        if "no-new-privileges:true" not in service.get("security_opt", ()):
            problems.append(f"{name}: may gain privileges")
        for other, wait in service.get("depends_on", {}).items():
            if other not in compose["services"] or wait["condition"] != "service_healthy":
                problems.append(f"{name}: does not wait until {other} is healthy")
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            there = (INFRA / "mlflow" / source).is_file() if source.startswith(".") else source in compose["volumes"]
            problems += [] if there else [f"{name}: volume {source} is not there"]
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key) and not REFERENCE.fullmatch(value):
                problems.append(f"{name}: {key} is written out")
    problems += server_problems(compose["services"]["mlflow"]["command"])
    wanted = {m[1] for m in REFERENCE.finditer(yaml.safe_dump(compose, width=10_000)) if m[2] != ":-"}
    filled = dict(line.split("=", 1) for line in example.splitlines() if line and not line.startswith("#"))
    if wanted != filled.keys():
        problems.append(f".env.example has {sorted(filled)}, the compose file wants {sorted(wanted)}")
    return problems + [f".env.example: {key} has a value" for key, value in filled.items() if value]


@functools.cache
def server_options() -> set[str]:
    """What `mlflow server` of the locked version takes, asked of the program: its modules warn when imported."""
    command = [sys.executable, "-m", "mlflow", "server", "--help"]
    return set(re.findall(r"--[a-z-]+", subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def server_problems(command: str) -> list[str]:
    text = REFERENCE.sub(lambda match: match[3], command)
    if not text.startswith("mlflow server "):
        return [f"{command} is not `mlflow server`"]
    problems = [f"mlflow server has no {x}" for x in re.findall(r"--[a-z-]+", text) if x not in server_options()]
    hosts = re.search(r"--allowed-hosts (\S+)", text)
    if not hosts or any(host.startswith("*") for host in hosts[1].split(",")) or "--disable-security" in text:
        problems.append("mlflow answers to any name")
    if "--serve-artifacts" not in text or "--artifacts-destination s3://" not in text:
        problems.append("clients would need keys for the artifacts")
    return problems


def test_compose_file() -> None:
    assert compose_problems(COMPOSE, EXAMPLE) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("services/s3/imgae", "x", "imgae"),
        ("services/s3/image", "dxflrs/garage", "not pinned"),
        ("services/s3/ports/0", "3900:3900", "open to the network"),
        ("services/s3/ports/0", "0.0.0.0:3900:3900", "open to the network"),
        ("services/s3/volumes/0", "./garage.tml:/etc/garage.toml", "garage.tml is not there"),
        ("services/s3/healthcheck", None, "no healthcheck"),
        ("services/s3/environment/GARAGE_RPC_SECRET", "0123456789abcdef", "written out"),
        ("services/s3/environment/GARAGE_RPC_SECRET", "${GARAGE_SECRET:?}", ".env.example has"),
        ("services/postgres/environment/POSTGRES_PASSWORD", "mlflow", "written out"),
        ("services/postgres/healthcheck/interval", 5, "is not of type 'string'"),
        ("services/postgres/volumes/0", "pgdata:/var/lib/postgresql/data", "pgdata is not there"),
        ("services/mlflow/build/dockerfile", "Dockerfile.full", "there is no"),
        ("services/mlflow/depends_on/s3/condition", "service_started", "is healthy"),
        ("services/mlflow/command", "mlflow server --alowed-hosts x", "--alowed-hosts"),
        ("services/mlflow/command", "mlflow server --serve-artifacts --artifacts-destination s3://b", "any name"),
        ("services/mlflow/command", "mlflow server --allowed-hosts *", "any name"),
        ("services/mlflow/command", "mlflow server --allowed-hosts a --disable-security-middleware", "any name"),
        ("services/mlflow/command", "mlflow server --allowed-hosts a --no-serve-artifacts", "need keys"),
    ],
)
def test_a_mistake_in_the_compose_file_is_found(path: str, value: Any, told: str) -> None:
    assert told in " ".join(compose_problems(changed(COMPOSE, path, value), EXAMPLE))


def test_an_example_with_a_password_is_found() -> None:
    filled = EXAMPLE.replace("POSTGRES_PASSWORD=\n", "POSTGRES_PASSWORD=hunter2\n")
    assert compose_problems(COMPOSE, filled) == [".env.example: POSTGRES_PASSWORD has a value"]


def test_git_ignores_the_filled_file_and_keeps_the_example() -> None:
    command = ["git", "check-ignore", "infra/mlflow/.env", "infra/mlflow/.env.example", "pbe.env"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["infra/mlflow/.env", "pbe.env"]


@pytest.mark.parametrize("path", sorted(p for p in INFRA.rglob("*") if p.is_file() and "__pycache__" not in p.parts))
def test_no_file_of_infra_holds_a_credential(path: Path) -> None:
    if path.name == ".env":
        pytest.skip("yours, and ignored by git")
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:$]+:[^@\s$]+@", text)
