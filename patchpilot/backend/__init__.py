"""What lives in users' workers: results, chords, the outbox and the fence. Small, fast and boring.

Importing this loads Celery, redis-py and psycopg, and nothing else of patchpilot but its PostgreSQL connection.
"""

from patchpilot.backend.backend import Backend

__all__ = ["Backend"]
