"""Offline tests of the images and the MLflow stack: what .dockerignore lets in, the compose file, server options."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docker.utils import exclude_paths

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCKERFILES = [INFRA / "docker" / "Dockerfile", INFRA / "mlflow" / "Dockerfile"]
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip() and line[0] != "#"]
COMPOSE = INFRA / "mlflow" / "compose.yaml"


def _instructions(path: Path, word: str) -> list[str]:
    """The arguments of each `word` instruction in a Dockerfile, with continued lines joined."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    return re.findall(rf"^{word} (.*)$", text.replace("\\\n", " "), re.MULTILINE)


def _copied(path: Path) -> list[str]:
    return [source for rest in _instructions(path, "COPY") for source in rest.split()[:-1]]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_copy_existing_files_and_run_valid_shell(path: Path) -> None:
    assert set(_copied(path)) <= exclude_paths(str(ROOT), IGNORE)
    for rest in _instructions(path, "RUN"):
        subprocess.run(["sh", "-n"], input=re.sub(r"^(--\S+ )*", "", rest), text=True, check=True)


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
    let_in = exclude_paths(str(tmp_path), IGNORE)
    assert {"pbe/store.py", "pbe/data/sample/photos.csv"} <= let_in
    assert not let_in & set(kept_out)


def test_what_the_image_holds_is_enough_to_run_a_stage(tmp_path: Path) -> None:
    """Runs in the tree that COPY makes, outside the repository."""
    let_in, sources = exclude_paths(str(ROOT), IGNORE), _copied(DOCKERFILES[0])
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
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# -- the MLflow stack


def test_compose_reads_its_file() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    command = ["docker", "compose", "-f", str(COMPOSE), "--env-file", "/dev/stdin", "config", "-q"]
    filled = re.sub(r"=$", "=x", COMPOSE.with_name(".env.example").read_text(), flags=re.MULTILINE)
    subprocess.run(command, input=filled, text=True, check=True)


def test_the_stack_asks_for_the_variables_of_the_example_and_is_open_to_this_machine_alone() -> None:
    wanted = set(re.findall(r"\$\{(\w+)[:}](?!-)", COMPOSE.read_text()))
    lines = COMPOSE.with_name(".env.example").read_text().splitlines()
    filled = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert filled == dict.fromkeys(wanted, "")  # no secret in git
    for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_mlflow_server_has_the_options_that_the_stack_gives() -> None:
    command = [sys.executable, "-m", "mlflow", "server", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(r"--[a-z-]+", yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]["command"]))
    assert used and used <= set(re.findall(r"--[a-z-]+", known))


def test_git_ignores_the_filled_file_and_keeps_the_example() -> None:
    command = ["git", "check-ignore", "infra/mlflow/.env", "infra/mlflow/.env.example", "pbe.env"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["infra/mlflow/.env", "pbe.env"]


@pytest.mark.parametrize("path", sorted(p for p in INFRA.rglob("*") if p.is_file() and "__pycache__" not in p.parts))
def test_no_file_of_infra_holds_a_credential(path: Path) -> None:
    if path.name == ".env":
        pytest.skip("your own file, which git ignores")
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:$]+:[^@\s$]+@", text)
