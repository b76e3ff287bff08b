"""A copy of the project in a folder of its own, with its own git, DVC, storage and MLflow database."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.commands.profile import profile_text

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S, ATTEMPTS = 600, 3  # of one command; on an idle machine none takes half of it
# the tests' own settings must not leak in from the developer's shell
FOREIGN = ("RAY_ADDRESS", "PBE_STORAGE", "MLFLOW_TRACKING_URI", "DVC_ROOT")


VARIANTS, BASELINES = ("full", "untrained"), ("copy_paste", "poisson")  # of profile tiny


@dataclass(frozen=True)
class Project:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ".venv" / "bin" / "python"

    @property
    def terminal_log(self) -> Path:
        """Where what the first `pipelines repro` has printed is kept."""
        return self.folder / "logs" / "terminal.txt"

    def environment(self, **more: str) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        env |= {"PATH": f"{self.python.parent}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(self.folder)}
        return env | more

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m COMMAND...` here; its output goes into the error when it fails and `check` is set.

        When it takes too long, all that it started ends with it: a stage would go on without its `dvc repro`.
        """
        arguments, pipe = [str(self.python), "-m", *command], subprocess.PIPE
        environment = self.environment(**env)
        with subprocess.Popen(
            arguments, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            except BaseException:
                kill_tree(process)
                raise
        result = subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
        if check and result.returncode:
            raise AssertionError(f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    def run_to_the_end(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `run`, but a command that takes too long, on a machine that does much else, is given again: it resumes."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self.run(*command)
            except subprocess.TimeoutExpired:
                continue
        return self.run(*command)

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        """Run `python -m COMMAND...` in the background, in a process group of its own."""
        command = (str(self.python), "-u", "-m", *command)
        env = self.environment(**env)
        with (self.folder / "started.log").open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True)

    def started_log(self) -> str:
        """What the process of the last `start` has printed so far."""
        return (self.folder / "started.log").read_text()

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)

    def edit_params(self, old: str, new: str) -> None:
        path = self.folder / "params.yaml"
        text = path.read_text()
        assert old in text, f"{old!r} is not in params.yaml"
        path.write_text(text.replace(old, new))

    def set_params(self, **changes: Any) -> None:
        """Set keys of params.yaml, named with __ for the dot: train__steps=12. Comments are lost."""
        path = self.folder / "params.yaml"
        raw = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            *sections, key = name.split("__")
            node = raw
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = value
        path.write_text(yaml.safe_dump(raw, sort_keys=False))

    def part_times(self, stage: str) -> dict[str, int]:
        """Modification time in ns of every file of the stage's parts."""
        folder = self.folder / ".store" / "parts" / stage
        return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def metrics(project: Project) -> dict:
    """What the evaluate stage has left."""
    return json.loads((project.folder / "data" / "evaluate" / "metrics.json").read_text())


def make_project(folder: Path, profile: str = "tiny", root: str = "") -> Project:
    """Copy what git tracks (and what it would, new files) to `folder`, with the profile as params.yaml.

    root: of a profile that needs one.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    project = Project(folder)
    # an interpreter inside the folder, as `make` makes it (its path has the folder's space), with our packages
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    packages = next((folder / ".venv" / "lib").glob("python*/site-packages"))
    ours = sysconfig.get_path("purelib")
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    (folder / "params.yaml").write_text(profile_text(ROOT / "infra" / "profiles", profile, root))
    project.git("init", "-q")
    project.git("add", "-A")
    project.git("commit", "-qm", "start")
    return project


def copy_project(project: Project, folder: Path) -> Project:
    """With storage, MLflow database and DVC's state. Artifacts of its MLflow runs stay with the first project's."""
    shutil.copytree(project.folder, folder, symlinks=True)
    return Project(folder)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL the process and all it started (raylet, workers), as a machine that loses power would."""
    parent = psutil.Process(process.pid)
    # the parent first: DVC would see its stage die and be killed while it writes that down
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=20)
    process.wait(timeout=20)
