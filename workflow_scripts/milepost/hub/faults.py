"""Failures of Hub requests: retry those that may pass, and turn the others into a one-line error."""

import sys
import time
from collections.abc import Callable
from json import JSONDecodeError
from typing import NoReturn, Protocol

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from milepost.common.errors import UserError, is_disk_full
from milepost.hub import environment

WAITS = (1, 2, 4, 8, 16, 30)  # seconds before each further try
LONGEST_WAIT = 600  # seconds; give up if the server asks for more
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
NOT_A_HUB = (FileMetadataError, JSONDecodeError, httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects)
NOT_A_HUB += (httpx.DecodingError,)


class Repository(Protocol):
    """A repository, whose ``str`` is ``model owner/name``."""

    licence: str | None

    @property
    def page(self) -> str: ...


def with_retries[Result](call: Callable[[], Result], repository: Repository, what: str) -> Result:
    """Call until it succeeds, waiting longer each time (or as long as the server asks); else raise a `UserError`."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, ValueError) as error:
            fault = _origin(error)
            asked = _asked_wait(fault)
            if wait is None or asked > LONGEST_WAIT or not _is_transient(fault):
                explain(fault, repository, what)
            wait = max(wait, asked)
            tqdm.write(f"{repository}: {what}: {_brief(fault)}: retrying in {wait} s", file=sys.stderr)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def hub_address() -> str:
    """The Hub's address for messages, without a password."""
    return environment.without_password(constants.ENDPOINT)


def _origin(error: Exception) -> Exception:
    """The fault behind the client's "not in the cache either"."""
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """The HTTP status of an error response; None if there was no response."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _asked_wait(error: Exception) -> int:
    """The seconds that the server asked to wait for, or 0."""
    asked = error.response.headers.get("Retry-After", "") if _status(error) else ""
    return int(asked) if asked.isdigit() else 0


def _is_transient(error: Exception) -> bool:
    """Whether a retry may help: the connection or the server failed, not the request."""
    if _status(error):
        return _status(error) in TRANSIENT_STATUSES
    if isinstance(error, httpx.TransportError):
        lasting = httpx.ProxyError | httpx.UnsupportedProtocol | httpx.LocalProtocolError
        return not isinstance(error, lasting) and not _is_untrusted(error)
    if isinstance(error, OfflineModeIsEnabled) or is_disk_full(error):
        return False
    # The client's own errors: a file of the wrong length, or the Xet service's connection.
    return isinstance(error, ConnectionError | TimeoutError | RuntimeError) or "Consistency check" in str(error)


def _is_untrusted(error: Exception) -> bool:
    """Whether the server was reached, but TLS failed or its certificate is not trusted."""
    return isinstance(error, httpx.ConnectError) and "[SSL: " in str(error)


def _brief(error: Exception) -> str:
    """An error in a few words, without addresses."""
    if _status(error):
        return f"the Hub answers {_status(error)}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _asked(error: Exception) -> str:
    """The server that was contacted (another one than the Hub after a redirect), and the proxy in between."""
    try:
        url = (error.response if _status(error) else error).request.url
        address = f"{url.scheme}://{url.netloc.decode()}"
    except (AttributeError, RuntimeError):  # there was no request
        address = constants.ENDPOINT
    proxy = environment.proxy_for(address)
    return environment.without_password(address) + (f" through the proxy {proxy}" if proxy else "")


def explain(error: Exception, repository: Repository, what: str) -> NoReturn:
    """Raise a `UserError` that explains a permanent failure; an error that is a bug is raised unchanged."""
    status, asked, cache = _status(error), _asked(error), constants.HF_HUB_CACHE
    token, home = environment.token_source(constants.HF_TOKEN_PATH), environment.cache_variable()
    subject = f"{repository}: {what}"
    if isinstance(error, GatedRepoError):
        terms = f"terms (licence: {repository.licence})" if repository.licence else "licence"
        message = (
            f"{repository}: access is gated: accept its {terms} at {repository.page} with your account, and set"
            " HF_TOKEN to a token of that account"
        )
    elif isinstance(error, RevisionNotFoundError):
        message = f"{subject} is not a branch, tag or commit there: see {repository.page}/tree/main"
    elif isinstance(error, RemoteEntryNotFoundError):
        message = f"{subject} does not exist at this commit: see {repository.page}/tree/main"
    elif isinstance(error, RepositoryNotFoundError):
        message = (
            f"{repository}: no such repository at {hub_address()}: check its name;"
            " if it is private, set HF_TOKEN to a token that may read it"
        )
    elif status == 401 and token:
        message = f"{repository}: the Hub refuses the token: check {token}, or remove it for a public repository"
    elif status == 401:
        message = f"{repository}: the Hub asks for a token: set HF_TOKEN"
    elif status == 403:
        message = f"{subject}: {asked} forbids it (403): check what the token may read, and what a firewall lets pass"
    elif status == 407 or isinstance(error, httpx.ProxyError):
        message = f"{subject}: can't reach {asked} ({_brief(error)}): check the proxy, its user and its password"
    elif isinstance(error, HFValidationError):
        message = f"{repository}: not a repository name: use owner/name"
    elif isinstance(error, httpx.LocalProtocolError | UnicodeError):  # its text may hold the token
        message = f"the token in {token} contains an invalid character: set it again, or remove it"
    elif _is_untrusted(error):
        message = (
            f"{subject}: no trusted connection to {asked} ({_brief(error)}): check the address, this machine's clock,"
            " and, where your network has its own certificates, set SSL_CERT_FILE to them"
        )
    elif isinstance(error, NOT_A_HUB):
        message = (
            f"{subject}: {asked} does not answer as a Hub does: check HF_ENDPOINT, the proxy, and whether this network"
            " requires you to log in first"
        )
    elif is_disk_full(error):
        message = f"{subject}: no space left in {cache}: make room and run again, or set {home} elsewhere"
    elif status == 429 or (status and status >= 500):
        message = f"{subject}: {asked} keeps answering {status}: run again later; complete files are kept"
    elif _is_transient(error):
        message = (
            f"{subject}: no answer from {asked} ({_brief(error)}): check the network and run again (complete files are"
            " kept), or set HF_HUB_OFFLINE=1 to use what the cache holds"
        )
    elif status:
        message = f"{subject}: {asked} answers {status}: check HF_ENDPOINT, and see {repository.page}"
    elif isinstance(error, OSError) and error.filename:
        message = (
            f"{subject}: {error.filename}: {error.strerror}: the cache lacks the file and can't be written: set {home}"
            " to a folder that can"
        )
    else:
        raise error
    raise UserError(message) from None
