"""botocore's exceptions, translated in one place to the reaction they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from botocore import exceptions as boto
from botocore.session import get_session

from patchpilot.errors import NeedsOperator, PatchpilotError, Refused, Throttled, Transient

# botocore's own list (botocore.retries.standard) and the one that ElastiCache alone uses and the SDK does not retry.
_THROTTLED = frozenset({
    "APICallRateForCustomerExceeded",
    "BandwidthLimitExceeded", "EC2ThrottledException", "LimitExceededException", "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException", "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException",
    "SlowDown", "ThrottledException", "Throttling", "ThrottlingException", "TooManyRequestsException",
    "TransactionInProgressException",
})  # fmt: skip

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
"""The credentials were good once; fresh ones may lie where these came from."""

_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})

_ADVICE = {
    **dict.fromkeys(EXPIRED, "the AWS credentials have expired: renew them, then run the same command again"),
    **dict.fromkeys(
        ("InvalidClientTokenId", "UnrecognizedClientException", "AuthFailure", "InvalidAccessKeyId",
         "MissingAuthenticationToken", "IncompleteSignature", "OptInRequired"),
        "AWS does not accept these credentials: check aws.profile, aws.credentials_file and the environment",
    ),
    **dict.fromkeys(
        ("SignatureDoesNotMatch", "RequestExpired"),
        "AWS does not accept the signature: check the secret key, and this machine's clock",
    ),
    "ReplicationGroupNotFoundFault": (
        "there is no such replication group in this region and account: check replication_group and aws.region"
    ),
    "CacheClusterNotFound": "a node of the replication group is gone: look at the group in the console",
    "ServiceUpdateNotFoundFault": "there is no such service update: check --update",
}  # fmt: skip

_UNREACHABLE = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
)


_UNRENEWED = (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError)


@contextmanager
def translated(action: str, region: Callable[[], str | None], *, renewable: bool = False) -> Iterator[None]:
    """Raise our errors in place of botocore's.

    :param action: what was asked, for the message: the name of the API call.
    :param region: where; an unreachable endpoint in a region that nobody knows is a spelling mistake.
    :param renewable: whether these credentials have been accepted before. Whoever renewed them until now will do so
        again, a little late: wait for it.
    :raises Throttled: AWS did nothing, because we ask too often.
    :raises Transient: unreachable, failing on AWS's side, or waiting for credentials.
    :raises Refused: AWS refuses this one request, for want of a permission or because of what it asks.
    :raises NeedsOperator: everything else; the line says what to do.
    """
    try:
        yield
    except boto.ClientError as error:
        raise _client_error(action, error, renewable=renewable) from error
    except boto.EndpointConnectionError as error:
        # With an endpoint of the user's own the region may have any name.
        if ".amazonaws." in str(error) and _is_unknown(region()):
            raise NeedsOperator(f"{action}: there is no AWS region {region()!r}: check aws.region") from error
        raise Transient(f"{action}: {_line(error)}") from error
    except _UNREACHABLE as error:
        raise Transient(f"{action}: {_line(error)}") from error
    except boto.NoRegionError as error:
        raise NeedsOperator("no AWS region: set aws.region, or AWS_REGION in the environment") from error
    except boto.ProfileNotFound as error:
        raise NeedsOperator(f"{_line(error)}: check aws.profile and aws.credentials_file") from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, *_UNRENEWED) as error:
        if renewable:
            raise Transient(f"{action}: waiting for AWS credentials to be renewed ({_line(error)})") from error
        raise NeedsOperator(
            f"no complete AWS credentials ({_line(error)}): set aws.profile or aws.credentials_file, or log in"
        ) from error
    except boto.BotoCoreError as error:
        raise NeedsOperator(f"{action}: {_line(error)}") from error


def code_of(error: boto.ClientError) -> str:
    """The error code on the wire."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _client_error(action: str, error: boto.ClientError, *, renewable: bool) -> PatchpilotError:
    code, status = code_of(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{action}: {code}: {error.response.get('Error', {}).get('Message', '')}".replace("\n", " ").strip()
    if code in _THROTTLED:
        return Throttled(f"AWS is throttling us ({said})")
    if code in _DENIED:
        return Refused(f"AWS denies access: give this role the permission named here ({said})")
    if code in EXPIRED and renewable:
        return Transient(f"waiting for AWS credentials to be renewed ({said})")
    if code in _ADVICE:
        return NeedsOperator(f"{_ADVICE[code]} ({said})")
    if status >= 500:
        return Transient(f"AWS has trouble of its own ({said})")
    return Refused(f"AWS refuses ({said})")


def _is_unknown(region: str | None) -> bool:
    session = get_session()
    partitions = session.get_available_partitions()
    return region not in {known for name in partitions for known in session.get_available_regions("elasticache", name)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
