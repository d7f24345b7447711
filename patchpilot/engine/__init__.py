"""A resumable state machine that knows no node, no chord and no cloud.

Read :mod:`~patchpilot.engine.plan` for what a step is, :mod:`~patchpilot.engine.journal` for what is remembered, and
:mod:`~patchpilot.engine.runner` for the one loop that drives both.
"""
