"""The Celery workers of one site, as the pilot sees them: who is there, who answers, who consumes, what is queued."""

from patchpilot.workers.facts import Depth, Fleet, Worker
from patchpilot.workers.workers import Workers

__all__ = ["Depth", "Fleet", "Worker", "Workers"]
