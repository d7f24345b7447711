"""Real servers to rehearse on: PostgreSQL, a replicated Valkey that loses writes when told to, and an ElastiCache API.

It shares no code with the adapters it is there to test.
"""
