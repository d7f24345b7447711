"""Patch the Valkey or Redis cluster under Celery workers live, lose nothing, and prove it."""

__version__ = "0.1.0"
