"""PostgreSQL: the durable record.

``connection`` and ``queries`` are what workers load, and import nothing but psycopg. SQL lives in ``sql/*.sql``, by
name; the schema in ``migrations/*.sql``.
"""
