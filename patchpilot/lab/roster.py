"""The roster: what has to be cleaned up, on disk, so that anybody can do it when its owner is gone.

Whoever starts a server writes it down here at once; `down`, the watchdog and a later `up` read it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from patchpilot.errors import Corrupt
from patchpilot.lab.processes import Identity, end, until


class Roster:
    """The processes and directories of one lab, kept in a file that is replaced as a whole at every change.

    :param path: the file; its directory has to exist. A file that is there already is read.
    :raises Corrupt: if the file is there and is not a roster.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._processes: dict[Identity, tuple[str, signal.Signals]] = {}
        self._directories: list[Path] = []
        if path.is_file():
            self._read()

    @property
    def processes(self) -> dict[str, Identity]:
        """The processes by name, in the order in which they were started; of several with one name, the youngest."""
        with self._lock:
            return {name: identity for identity, (name, _) in self._processes.items()}

    def add(self, name: str, pid: int, number: signal.Signals = signal.SIGTERM) -> Identity:
        """Write a process down.

        :param number: the signal that ends it in good order.
        """
        identity = Identity.of(pid)
        with self._lock:
            self._processes[identity] = (name, number)
            self._write()
        return identity

    def drop(self, identity: Identity) -> None:
        """Strike a process that has ended."""
        with self._lock:
            self._processes.pop(identity, None)
            self._write()

    def add_directory(self, directory: Path) -> Path:
        """Write a directory down that has to be removed in the end."""
        with self._lock:
            self._directories.append(directory.absolute())
            self._write()
        return directory

    def drop_directory(self, directory: Path, *, patience: float = 5.0) -> None:
        """Remove a directory and strike it."""
        _remove(directory, patience)
        with self._lock:
            self._directories = [kept for kept in self._directories if kept != directory.absolute()]
            self._write()

    def end(self, *, patience: float = 5.0) -> None:
        """End every process on the roster, this one excepted, and remove the directories. The roster itself stays.

        May be called by several processes at once, and again after it was interrupted.
        """
        mortal = [(who, number) for who, (_, number) in self._processes.items() if who.pid != os.getpid()]
        end(reversed(mortal), patience=patience)
        for directory in self._directories:
            _remove(directory, patience)

    def clean(self, *, patience: float = 5.0) -> None:
        """As :meth:`end`, and remove the roster too."""
        self.end(patience=patience)
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            self._processes = {
                Identity(row["pid"], row["started"]): (row["name"], signal.Signals(row["signal"]))
                for row in content["processes"]
            }
            self._directories = [Path(directory) for directory in content["directories"]]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{self.path}: not a lab's list of processes: {error}") from None

    def _write(self) -> None:
        rows = [
            {"name": name, "pid": identity.pid, "started": identity.started, "signal": int(number)}
            for identity, (name, number) in self._processes.items()
        ]
        content = {"processes": rows, "directories": [str(directory) for directory in self._directories]}
        replace(self.path, json.dumps(content, indent=1))


def replace(path: Path, text: str) -> None:
    """Write a file that only its owner may read, so that a reader sees the old text or the new one and never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def _remove(directory: Path, patience: float) -> None:
    # A killed PostgreSQL's children need a moment to notice and may still write.
    until(lambda: _removed(directory), seconds=patience, what=f"{directory} was removed")


def _removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()
