"""Key pairs (Curve25519), the directory they lie in, and enrolment tokens.

NAME.key         a secret key of this machine: a node's, or ``coordinator``'s; 0600
NAME.pub         its public key, to be handed to the coordinator
coordinator.pub  on a node: the coordinator that it trusts

The directory is 0700.  What others could have read is refused, not used.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from protocol.errors import KeyStoreError

COORDINATOR = "coordinator"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"  # as protocol.parts.NodeName
KEY_BYTES = 32
SEED_BYTES = 16
CHECK_BYTES = 3
CREDENTIALS = "CREDENTIALS_DIRECTORY"  # of a systemd service, by LoadCredential=
TOKEN_PREFIX = "swt1-"  # noqa: S105 - what a token begins with is no secret


@dataclass(frozen=True)
class KeyPair:
    """A key pair; ``public`` is in hex, ``secret`` raw and never shown."""

    public: str
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> KeyPair:
        """The pair that a secret key belongs to."""
        public = zmq.curve_public(z85.encode(secret))
        return cls(z85.decode(public).hex(), secret)

    @classmethod
    def new(cls) -> KeyPair:
        return cls.of(z85.decode(zmq.curve_keypair()[1]))


@dataclass(frozen=True)
class Identity:
    """What a node needs to connect: its own key pair, and whom it trusts (hex)."""

    own: KeyPair
    coordinator: str


@dataclass(frozen=True)
class Token:
    """A one-time admission for nothing but handing in a node's own public key.

    Attributes:
        coordinator: public key in hex; the token's bearer trusts it.
        seed: what the temporary key pair is derived from.
    """

    coordinator: str
    seed: bytes = field(repr=False)

    @classmethod
    def new(cls, coordinator: str) -> Token:
        return cls(coordinator, secrets.token_bytes(SEED_BYTES))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token.

        Raises:
            KeyStoreError: it is none, or a letter is wrong; the line does not repeat it.
        """
        wrong = KeyStoreError("this is no enrolment token, or not all of it: copy it again")
        try:
            data = base64.b64decode(text.removeprefix(TOKEN_PREFIX), altchars=b"-_", validate=True)
        except ValueError:
            raise wrong from None
        token = cls(data[:KEY_BYTES].hex(), data[KEY_BYTES : KEY_BYTES + SEED_BYTES])
        if token.text != text:
            raise wrong
        return token

    @property
    def text(self) -> str:
        """As it is handed to a person."""
        body = bytes.fromhex(self.coordinator) + self.seed
        return TOKEN_PREFIX + base64.urlsafe_b64encode(body + _check(body)).decode()

    @property
    def identity(self) -> Identity:
        """What its bearer connects as."""
        secret = _digest(self.seed, b"token key", KEY_BYTES)
        return Identity(KeyPair.of(secret), self.coordinator)


def _check(body: bytes) -> bytes:
    return _digest(body, b"token check", CHECK_BYTES)


def _digest(data: bytes, person: bytes, nbytes: int) -> bytes:
    return hashlib.blake2b(data, digest_size=nbytes, person=person).digest()


def host_name() -> str:
    """This host's name, as far as a node may be called so."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).lstrip("._-")[:63] or "node"


# --- files -----------------------------------------------------------------------


def default_directory() -> Path:
    """``$SEEDWIRE_KEYS``, what systemd handed over, or where XDG puts what a user configures."""
    for name in ("SEEDWIRE_KEYS", CREDENTIALS):
        if found := os.environ.get(name):
            return Path(found)
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "seedwire" / "keys"


def prepare(directory: Path) -> None:
    """Make the directory if it is not there; then nobody else may look into it.

    Raises:
        KeyStoreError: it cannot be made, or others can read it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_if_open(directory, "700")
    except OSError as error:
        raise KeyStoreError(f"cannot keep keys in {directory}: {error.strerror}") from error


def make(directory: Path, name: str, force: bool = False) -> KeyPair:
    """Make a key pair and its two files.

    Raises:
        KeyStoreError: there is one of this name already, unless ``force``; or it cannot be written.
    """
    prepare(directory)
    pair, path = KeyPair.new(), directory / f"{name}.key"
    if force:
        path.unlink(missing_ok=True)
    try:
        write_secret(path, f"seedwire-secret {pair.secret.hex()} {name}\n")
        write_public(directory / f"{name}.pub", pair.public, name)
    except FileExistsError:
        raise KeyStoreError(f"{path} is there already: --force makes a new one") from None
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from error
    return pair


def load(directory: Path, name: str) -> KeyPair | None:
    """A key pair of this machine, or None if it has none of this name.

    Raises:
        KeyStoreError: the key is damaged, or others could have read it.
    """
    path = directory / f"{name}.key"
    if not path.exists():
        return None
    _refuse_if_open(directory, "700")
    _refuse_if_open(path, "600")
    return KeyPair.of(_field(path, "seedwire-secret")[0])


def write_secret(path: Path, text: str) -> None:
    """Write a new file that nobody else has ever been able to read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def pinned(directory: Path) -> str | None:
    """The public key of the coordinator that is trusted here, or None.

    Raises:
        KeyStoreError: it is damaged.
    """
    path = directory / f"{COORDINATOR}.pub"
    return read_public(path)[0] if path.exists() else None


def pin(directory: Path, public: str) -> None:
    """Trust a coordinator from now on.

    Raises:
        KeyStoreError: another one is trusted already, or it cannot be written down.
    """
    path, known = directory / f"{COORDINATOR}.pub", pinned(directory)
    if known not in (None, public):
        other = "another coordinator than the token's is trusted"
        raise KeyStoreError(f"{path}: {other}: move it away, or give another --keys")
    if known is None:
        prepare(directory)
        try:
            write_public(path, public, COORDINATOR)
        except OSError as error:
            raise KeyStoreError(f"cannot write {path}: {error.strerror}") from error


def write_public(path: Path, public: str, name: str) -> None:
    """Write a public key for others to read; whoever reads meanwhile sees all of it or none."""
    part = path.with_suffix(".part")
    part.write_text(f"seedwire-public {public} {name}\n")
    part.replace(path)


def read_public(path: Path) -> tuple[str, str]:
    """A public key in hex, and the name that it was made for.

    Raises:
        KeyStoreError: the file is not there, or holds none.
    """
    key, name = _field(path, "seedwire-public")
    return key.hex(), name


def read_secret_text(path: Path) -> str:
    """A file whose whole text is a secret, such as a token.

    Raises:
        KeyStoreError: it is not there, or others could have read it.
    """
    try:
        _refuse_if_open(path, "600")
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        raise KeyStoreError(f"cannot read {path}: {error}") from error


def _field(path: Path, kind: str) -> tuple[bytes, str]:
    try:
        words = path.read_text().split()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise KeyStoreError(f"cannot read {path}: {why}") from error
    try:
        if len(words) == 3 and words[0] == kind and len(words[1]) == 2 * KEY_BYTES:
            return bytes.fromhex(words[1]), words[2]
    except ValueError:
        pass
    raise KeyStoreError(f"{path} is damaged or no key: want one line, {kind} and 64 hex digits")


def _refuse_if_open(path: Path, mode: str) -> None:
    """What others may read or change may be known to them, or theirs.

    systemd lets a service read its credentials through an access control list, whose mask shows
    as permissions of the group, which has none; they cannot be written.
    """
    handed = os.environ.get(CREDENTIALS)
    forbidden = 0o027 if handed and path.is_relative_to(handed) else 0o077
    if stat.S_IMODE(path.stat().st_mode) & forbidden:
        raise KeyStoreError(f"{path} is open to other users: chmod {mode} {path}")
