"""Who may use a page that others can reach: a file with one line per user, name:salt:hash. It holds no password."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from pathlib import Path

from pbe.errors import UserError
from pbe.store import write_whole

SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # 16 MiB and some 30 ms per try: about 20 tries a second in all
PASSWORD_CHARACTERS_MIN = 10


class UsersError(UserError, ValueError):
    """The file of users, or a new user, is unsuitable."""


def add_user(path: Path, name: str, password: str) -> None:
    """Add the user, or replace the password. The file is readable by its owner alone. Raises UsersError."""
    if not name or ":" in name or not name.isprintable():
        raise UsersError(f"{name!r}: a user's name has no colon and no control character")
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise UsersError(f"the password needs {PASSWORD_CHARACTERS_MIN} characters or more")
    users = _read(path) if path.exists() else {}
    salt = secrets.token_bytes(16)
    users[name] = salt, _hash(password, salt)
    text = "".join(f"{user}:{own_salt.hex()}:{digest.hex()}\n" for user, (own_salt, digest) in users.items())
    write_whole(path.resolve(), text.encode(), mode=0o600)


def open_users(path: Path) -> Callable[[str, str], bool]:
    """Whether a name and a password belong together. Raises UsersError, which names file and line."""
    users = _read(path)
    if not users:
        raise UsersError(f"{path}: no user; `pbe page --add-user NAME --auth-file {path}` adds one")
    nobody = bytes(16), bytes(64)  # an unknown name takes as long as a known one

    def known(name: str, password: str) -> bool:
        salt, digest = users.get(name, nobody)
        return hmac.compare_digest(_hash(password, salt), digest)

    return known


def _read(path: Path) -> dict[str, tuple[bytes, bytes]]:
    if not path.is_file():
        raise UsersError(f"{path}: not there; `pbe page --add-user NAME --auth-file {path}` makes it")
    if path.stat().st_mode & 0o077:
        raise UsersError(f"{path}: others can read or change it; run `chmod 600 {path}`")
    users = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsersError(f"{path}: not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        try:
            name, salt, digest = line.split(":")
            users[name] = bytes.fromhex(salt), bytes.fromhex(digest)
        except ValueError:
            raise UsersError(
                f"{path}, line {number}: not name:salt:hash; `pbe page --add-user NAME --auth-file {path}` writes it"
            ) from None
    return users


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)
