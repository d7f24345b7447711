"""Celery's own integration tests, on stock Redis and on our backend, compared by name. Run by `make celery-suite`."""
