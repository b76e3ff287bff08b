"""The tiny profile run to its end by `pipelines repro`, once; and copies of it for tests that change something."""

from pathlib import Path

import pytest

from tests.pipelines.project import Project, copy_project, make_project


@pytest.fixture(scope="session")
def repro(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Shared: no test may change its settings, code or data."""
    pytest.importorskip("skimage", reason="needs the sample extra")
    project = make_project(tmp_path_factory.mktemp("chain") / "my project")
    done = project.run_to_the_end("pipelines", "repro")
    project.terminal_log.write_text(done.stdout + done.stderr)
    return project


@pytest.fixture
def changeable(repro: Project, tmp_path: Path) -> Project:
    """A copy of it, whose settings, code and data are the test's own."""
    return copy_project(repro, tmp_path / "my project")
