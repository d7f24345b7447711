"""The report of a run: a pure function of its journal, as JSON for machines, as Markdown and as HTML for people."""

from patchpilot.report.build import SCHEMA_VERSION, build
from patchpilot.report.files import KINDS, Files, write
from patchpilot.report.html import html
from patchpilot.report.markdown import markdown

__all__ = ["KINDS", "SCHEMA_VERSION", "Files", "build", "html", "markdown", "write"]
