"""The schema, forward only.

Each ``NNNN_name.sql`` is applied once, in order, and recorded with its checksum. A file that was applied must never
change: write the next one.
"""
