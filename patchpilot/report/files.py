"""The report's files, written so that each is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from patchpilot.engine.journal import Journal
from patchpilot.errors import NeedsOperator
from patchpilot.postgres.journal import Run
from patchpilot.report.build import build
from patchpilot.report.html import html
from patchpilot.report.markdown import markdown

KINDS = ("json", "markdown", "html")
"""What each file is, in the order in which they are written: the source of truth first."""


def write(report: dict[str, Any], directory: Path) -> tuple[Path, ...]:
    """Write ``<directory>/<run id>/report.json``, ``report.md`` and ``report.html``, and return their paths.

    :raises NeedsOperator: the directory cannot be written.
    """
    paths = _paths(directory, report["run_id"])
    for path, text in zip(paths, _texts(report), strict=True):
        try:
            _replace(path, text)
        except OSError as error:
            raise NeedsOperator(f"cannot write {path}: {error.strerror}: check the setting `reports`") from error
    return paths


class Files:
    """The report of one run on disk. What a phase of the run asks for: see ``phases.desk.Reports``.

    :param directory: where all reports are; each run has a folder of its own there.
    """

    def __init__(self, journal: Journal, run: Run, directory: Path) -> None:
        self._journal, self._run, self._directory = journal, run, directory

    def current(self) -> dict[str, str] | None:
        """The paths and the digest of the files, if they say what the journal says; else None."""
        texts = _texts(build(self._journal.entries(), self._run))
        paths = _paths(self._directory, self._run.id)
        if any(_read(path) != text for path, text in zip(paths, texts, strict=True)):
            return None
        return self._described(texts[0])

    def write(self) -> dict[str, str]:
        """Write the files, and return what :meth:`current` will."""
        report = build(self._journal.entries(), self._run)
        write(report, self._directory)
        return self._described(_texts(report)[0])

    def _described(self, text: str) -> dict[str, str]:
        paths = _paths(self._directory, self._run.id)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {**dict(zip(KINDS, map(str, paths), strict=True)), "sha256": digest}


def _paths(directory: Path, run_id: str) -> tuple[Path, ...]:
    return tuple(directory / run_id / f"report.{end}" for end in ("json", "md", "html"))


def _texts(report: dict[str, Any]) -> tuple[str, ...]:
    return json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n", markdown(report), html(report)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # then it is written anew, or that says what is wrong
        return None


def _replace(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step: a reader sees the old file or the new one, after a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
