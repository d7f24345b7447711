"""The app, as Django registers it."""

from __future__ import annotations

from django.apps import AppConfig


class PatchpilotConfig(AppConfig):
    """Its label makes its permissions ``patchpilot.view_chord`` and ``patchpilot.recover_chord``."""

    name = "patchpilot.contrib.django"
    label = "patchpilot"
    verbose_name = "Patchpilot"

    def ready(self) -> None:
        from patchpilot.contrib.django import checks  # noqa: F401 - registers them
