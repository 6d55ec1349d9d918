"""The client that talks to object storage, and what its errors mean to whoever has to mend them."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import botocore.config
import botocore.loaders
import botocore.session
from botocore import exceptions
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

import pgkeep
from pgkeep.adapters.destinations.s3 import Options
from pgkeep.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

CONNECT_SECONDS: Final = 10.0
# More than the threads that send parts, or ask for sizes.
_CONNECTIONS: Final = 16
# Whatever a server says goes into logs and state.
_TOLD_CHARACTERS: Final = 500
# What botocore and we run into where an answer lacks a field, or holds no number or date.
_NONSENSE: Final = (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, ResponseParserError)
_IS_IT_S3: Final = "is the endpoint object storage, and nothing in between that answers for it?"
_DOCUMENTED: Final = "docs/destinations/s3.md has the policy that is needed"

# Codes of the service (and of its imitations) to cause and remedy.
_REMEDIES: Final[Mapping[str, tuple[str, str]]] = {
    "InvalidAccessKeyId": (
        "the server does not know this access key",
        "was it rotated or removed? Set the new one, access key and secret together",
    ),
    "SignatureDoesNotMatch": (
        "the secret key does not belong to this access key",
        "set access key and secret again, without blanks; a proxy that changes requests causes this too",
    ),
    "ExpiredToken": ("the session token has expired", "renew the credentials, or use ones that renew themselves"),
    "InvalidToken": ("the session token is not valid", "set it together with its keys, or leave it out"),
    "RequestTimeTooSkewed": (
        "this machine's clock and the server's differ by more than it allows",
        "set the clock here (`timedatectl`, `chronyc makestep`) or there",
    ),
    "NoSuchBucket": ("the bucket does not exist", "create it, with Object Lock: docs/destinations/s3.md"),
    "InvalidBucketName": ("that can't be a bucket's name", "check the setting `bucket`"),
    "AccessDenied": ("the server denies it to these credentials", _DOCUMENTED),
    "AllAccessDisabled": ("the server has closed the account or the bucket", "ask its operator"),
    "PermanentRedirect": ("the bucket is in another region", "set the bucket's own region or endpoint"),
    "AuthorizationHeaderMalformed": ("the region is not the bucket's", "set the region that the server expects"),
    "IllegalLocationConstraintException": ("the bucket is in another region", "set the bucket's own region"),
    "InvalidRequest": (
        "the server finds the request invalid",
        "a lock needs a bucket that was made with Object Lock: docs/destinations/s3.md",
    ),
    "InvalidObjectState": ("the object is in an archive", "restore it from the archive class first (`restore-object`)"),
    "QuotaExceeded": ("the quota is used up", "raise it, or let what may go there go"),
    "SlowDown": ("the server asks for fewer requests", "it is overloaded or limits this account: try again later"),
    "BadDigest": ("the bytes that arrived are not those that were sent", "look at what is between here and there"),
    "XAmzContentSHA256Mismatch": (
        "the bytes that arrived are not those that were sent",
        "look at what is between here and there",
    ),
}
_ALIASES: Final[Mapping[str, str]] = {
    "ExpiredTokenException": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "AllAccessDisabledException": "AllAccessDisabled",
    "RequestExpired": "RequestTimeTooSkewed",
    "AccessForbidden": "AccessDenied",
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "503": "SlowDown",
    "ServiceUnavailable": "SlowDown",
    "InvalidDigest": "BadDigest",
    "XMinioStorageFull": "QuotaExceeded",
    "507": "QuotaExceeded",
    "InsufficientStorage": "QuotaExceeded",
}
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchVersion", "404", "NotFound", "405", "MethodNotAllowed"})
_UNSUPPORTED: Final = frozenset({"NotImplemented", "501", "MethodNotAllowed", "405", "UnsupportedOperation"})


class DeniedError(StorageError):
    """The credentials are in order, but may not do this; or there is nothing there, and they may not know that."""


def connect(options: Options, *, signs_bodies: bool = True) -> S3Client:
    """A client that several threads may use; files and environment are read for credentials anew each time.

    ``signs_bodies`` False: for requests whose body has a checksum in a header. That is signed, and to digest the body
    once more for the signature costs as much as all the rest. Raises ``ConfigurationError``.
    """
    try:
        session = botocore.session.Session(profile=options.profile)
        session.register_component("data_loader", _loader())
        region = options.region or session.get_config_variable("region")
        client = session.create_client(
            "s3",
            endpoint_url=options.endpoint,
            # Servers of one's own have no regions; a signature needs one all the same.
            region_name=region or ("us-east-1" if options.endpoint else None),
            verify=str(options.ca_file) if options.ca_file else None,
            aws_access_key_id=options.access_key_id,
            aws_secret_access_key=options.secret_access_key,
            aws_session_token=options.session_token,
            config=_config(options, signs_bodies=signs_bodies),
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"{options.label} can't be used like this: {error}") from error
    return cast("S3Client", client)


@functools.cache
def _loader() -> botocore.loaders.Loader:
    """It keeps the service's description, which takes longer to read than all the rest."""
    return botocore.loaders.create_loader()


def _config(options: Options, *, signs_bodies: bool) -> botocore.config.Config:
    return botocore.config.Config(
        connect_timeout=min(CONNECT_SECONDS, options.timeout_seconds),
        read_timeout=options.timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        s3={
            "addressing_style": "path" if options.path_style else "auto",
            **({} if signs_bodies else {"payload_signing_enabled": False}),
        },
        request_checksum_calculation=options.checksums,
        # What is read is compared with what it must be, by us.
        response_checksum_validation="when_required",
        user_agent_extra=f"pgkeep/{pgkeep.__version__}",
    )


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """The client's errors as ``StorageError`` (``DeniedError``) that name cause and remedy; ``doing`` names the object
    too, e.g. ``reading s3://bucket/key``."""
    try:
        yield
    except ClientError as error:
        raise _answered(error, doing) from error
    except BotoCoreError as error:
        raise _unanswered(error, doing) from error
    except RecursionError as error:
        # botocore follows a redirect by asking for the bucket's region, and the redirect of that one too.
        hint = "is the endpoint right? What is redirected to https must be given as https"
        raise StorageError(f"{doing} failed: the server redirects every request", hint) from error
    except _NONSENSE as error:
        what = f"{type(error).__name__}: {error}"[:_TOLD_CHARACTERS]
        raise StorageError(f"{doing} failed: the server's answer makes no sense ({what})", _IS_IT_S3) from error


def code(error: ClientError) -> str:
    """The service's code; the status as text where the answer had none (that of HEAD never has)."""
    answer: Mapping[str, Any] = error.response.get("Error", {})
    found = str(answer.get("Code") or status(error))[:_TOLD_CHARACTERS]
    return _ALIASES.get(found, found)


def status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: ClientError) -> bool:
    """No such object or version; a delete marker is none. A missing bucket is another matter."""
    return code(error) in _MISSING


def is_denied(error: ClientError) -> bool:
    return code(error) == "AccessDenied"


def is_unsupported(error: ClientError) -> bool:
    return code(error) in _UNSUPPORTED


def _answered(error: ClientError, doing: str) -> StorageError:
    name = code(error)
    told = str(error.response.get("Error", {}).get("Message") or "").strip()[:_TOLD_CHARACTERS]
    words = f"{name}, status {status(error)}" + (f": {told}" if told else "")
    cause, hint = _REMEDIES.get(name, ("the server answered with an error", ""))
    kind = DeniedError if name == "AccessDenied" else StorageError
    return kind(f"{doing} failed: {cause} ({words})", hint)


def _unanswered(error: BotoCoreError, doing: str) -> StorageError:
    for kinds, hint in _UNREACHED:
        if isinstance(error, kinds):
            return StorageError(f"{doing} failed: {_shown(error)}", hint)
    return StorageError(f"{doing} failed: {_shown(error)}")


_UNREACHED: Final[tuple[tuple[tuple[type[Exception], ...], str], ...]] = (
    (
        (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError),
        "set access key and secret, or a profile, or run where a role gives them",
    ),
    ((exceptions.SSLError,), "is the endpoint's certificate signed by an authority of one's own? Set its file"),
    ((exceptions.ParamValidationError,), "check the settings of this destination"),
    (
        (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError, exceptions.ProxyConnectionError),
        "is the endpoint right, and may this machine (or container) reach it?",
    ),
    ((exceptions.HTTPClientError,), "the connection broke again and again: look at the network and at the server"),
)


def _shown(error: BotoCoreError) -> str:
    """In one line: validation errors have several. None of them holds a key."""
    return re.sub(r"\s+", " ", str(error)).strip()
