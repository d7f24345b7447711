"""Recovery is a reconciliation: compare what PostgreSQL says should exist with what Valkey and the workers hold, and
re-create exactly what is missing, once.

``evidence`` reads, ``diagnose`` decides (purely), ``remedy`` acts (under a guard), ``sweep`` does one pass over all.
"""

from patchpilot.recovery.findings import Applied, Finding, Remedy, Window
from patchpilot.recovery.sweep import Recovery, Sweep
from patchpilot.workers.application import Site

__all__ = ["Applied", "Finding", "Recovery", "Remedy", "Site", "Sweep", "Window"]
