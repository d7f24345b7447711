"""The report of a run: a pure function of its journal, as JSON for machines and as Markdown for people."""

from patchpilot.report.build import SCHEMA_VERSION, build
from patchpilot.report.files import Files, write
from patchpilot.report.markdown import markdown

__all__ = ["SCHEMA_VERSION", "Files", "build", "markdown", "write"]
