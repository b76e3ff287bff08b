"""The file of users: passwords are hashed, and what is wrong with the file is said by line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pbe.page.users import UsersError, add_user, open_users


def test_users_are_known_by_their_own_password_alone(tmp_path: Path) -> None:
    path = tmp_path / "users"
    add_user(path, "ada", "correct horse")
    add_user(path, "béla", "battery staple")
    add_user(path, "ada", "another horse")
    known = open_users(path)
    assert known("ada", "another horse") and known("béla", "battery staple")
    assert (
        not known("ada", "correct horse") and not known("ada", "battery staple") and not known("eve", "another horse")
    )
    assert "horse" not in path.read_text() and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("ada:secret\n", 0o600, "line 1: not name:salt:hash"),
        ("", 0o600, "no user"),
        ("ada:00:11\n", 0o644, "chmod 600"),
    ],
)
def test_an_unsuitable_file_is_refused(tmp_path: Path, text: str, mode: int, said: str) -> None:
    path = tmp_path / "users"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(UsersError, match=said):
        open_users(path)
    with pytest.raises(UsersError, match="not there"):
        open_users(tmp_path / "none")


@pytest.mark.parametrize(("name", "password"), [("", "long enough!"), ("a:b", "long enough!"), ("ada", "short")])
def test_unsuitable_users_are_refused(tmp_path: Path, name: str, password: str) -> None:
    with pytest.raises(UsersError):
        add_user(tmp_path / "users", name, password)
    assert not (tmp_path / "users").exists()


def test_a_full_disk_keeps_the_users_who_were_there(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    path = tmp_path / "users"
    add_user(path, "ada", "correct horse")
    full_disk(200)
    with pytest.raises(OSError, match="File too large"):
        add_user(path, "bela", "battery staple")
    assert open_users(path)("ada", "correct horse") and [file.name for file in tmp_path.iterdir()] == ["users"]
