"""The ElastiCache API: boto3 on one side, frozen facts on the other.

Nothing outside this package sees a botocore exception or a response dictionary.
"""

from patchpilot.elasticache.client import ElastiCache, connect

__all__ = ["ElastiCache", "connect"]
