"""Searches the Hub, and reads configs of its models within limits. Uses the server in ``HF_ENDPOINT``.

Requests use ``huggingface_hub``'s session and errors, but not its ``HfApi``. ``HfApi`` reports a refused
connection or a status of 500 after 23 s (here 0.2 s), and waits forever for a server that never responds
(here 15 s). It reads responses of any length, even those of errors and redirects (huggingface_hub 2.4;
measured at commit 7720e8a0). ``translate_hub_errors`` converts exceptions to errors for the user.

``huggingface_hub`` takes 0.12 s to import, so every function here imports it when called; it reads
``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` once, at that import.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from qlora_tui import __version__
from qlora_tui.catalog.config_parser import MAX_CONFIG_BYTES
from qlora_tui.catalog.model_validation import CONFIG, check_model_type
from qlora_tui.decoding import Count, decode_json
from qlora_tui.errors import UserError

MAX_BYTES = 16 << 20
"""Maximum size of a list of results or files in bytes: a few hundred thousand entries."""
_ANY_JSON = msgspec.json.Decoder[Any](Any)
EXPANDED_FIELDS = ("downloads", "gated", "safetensors", "tags", "config", "lastModified")


class _Safetensors(Struct):
    total: Count | None = None


class _Result(Struct, rename="camel"):
    """Fields of one model in a search result."""

    id: str
    downloads: Count | None = None
    gated: bool | str | None = None
    tags: list[str] | None = None
    config: dict[str, Any] | None = None
    safetensors: _Safetensors | None = None
    last_modified: str | None = None


class HubModel(Struct, frozen=True):
    """One result of a search."""

    id: str
    parameters: int | None
    """Number of parameters according to the Hub. If a tied head is stored separately, it counts twice."""
    downloads: int
    """Number of downloads in the last month."""
    gated: bool
    """Whether the user needs a token, and must first accept the model's license on the Hub."""
    license: str | None
    model_type: str | None
    modified: str
    """Date of the last change in ISO format; empty if unknown."""
    refusal: UserError | None
    """Why the model cannot be trained here, as far as the Hub's data shows; None if it can."""


def search_models(query: str, limit: int = 30) -> list[HubModel]:
    """Return models with ``query`` in the name and safetensors weights, most downloaded first.

    Raises UserError if the Hub does not respond.
    """
    params = {
        "search": query,
        "filter": ["transformers", "safetensors"],
        "sort": "downloads",
        "limit": limit,
        "expand": list(EXPANDED_FIELDS),
    }
    answer = get_json("api/models", params)
    if not isinstance(answer, list):
        raise not_a_hub_problem()
    models = [model for entry in answer if (model := _parse_model(entry)) is not None]
    if answer and not models:
        raise not_a_hub_problem()
    return models


def _parse_model(entry: Any) -> HubModel | None:
    """Return one result; None for an invalid entry, which must not hide the others."""
    try:
        result = msgspec.convert(entry, _Result)
    except msgspec.ValidationError:
        return None
    config = result.config or {}
    model_type = config.get("model_type")
    return HubModel(
        id=result.id,
        parameters=result.safetensors.total if result.safetensors else None,
        downloads=result.downloads or 0,
        gated=bool(result.gated),
        license=next((tag[8:] for tag in result.tags or () if tag.startswith("license:")), None),
        model_type=model_type if isinstance(model_type, str) else None,
        modified=(result.last_modified or "")[:10],
        refusal=check_model_type(config, result.id),
    )


def fetch_config(model_id: str, revision: str = "main") -> dict[str, Any]:
    """Download the model's ``config.json`` without writing to the cache.

    Raises UserError if the file does not exist, the model is gated, or the Hub does not respond.
    """
    path = f"{validate_model_id(model_id)}/resolve/{revision}/{CONFIG}"
    config = get_json(path, model_id=model_id, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise not_a_hub_problem()
    return config


def get_json(
    path: str, params: Mapping[str, Any] | None = None, model_id: str = "", max_bytes: int = MAX_BYTES
) -> Any:
    """Request ``path`` and return its JSON response.

    Raises UserError if the request fails, or the response is not JSON or longer than ``max_bytes``.
    """
    with (
        translate_hub_errors(model_id),
        open_response(f"{endpoint()}/{path}", request_headers(), params) as response,
    ):
        raise_for_status(response)
        try:
            return decode_json(read_body(response, max_bytes), _ANY_JSON)
        except (msgspec.DecodeError, TooLong):
            raise not_a_hub_problem() from None


def request_headers() -> dict[str, str]:
    """Return the headers of every request: the user agent, and the token if there is one.

    ``huggingface_hub.utils.build_hf_headers`` is not used, because it requests a list of coding agents and
    reads a response of any length.
    """
    from huggingface_hub import constants, get_token

    headers = {"user-agent": f"qlora-tui/{__version__}"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return headers | ({"authorization": f"Bearer {token}"} if token else {})


def endpoint() -> str:
    """Return the base URL of the Hub. Raises UserError if ``HF_ENDPOINT`` is not a web address."""
    from huggingface_hub import constants

    address: str = constants.ENDPOINT
    if not address.startswith(("http://", "https://")):
        raise UserError(
            "HF_ENDPOINT is not a web address",
            what=f"HF_ENDPOINT is {address!r}.",
            fix="Set HF_ENDPOINT to an address that starts with https://, or unset it to use huggingface.co.",
        )
    return address


def validate_model_id(model_id: str) -> str:
    """Return ``model_id`` if it is a valid Hub ID. Raises UserError otherwise."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

    try:
        validate_repo_id(model_id)
    except HFValidationError:
        raise UserError(
            "Invalid model name",
            what=f"{model_id[:80]!r} is not of the form publisher/model.",
            fix="Search for the model on the Model screen, or copy its name from its page on the Hub.",
            exit_code=2,
        ) from None
    return model_id


def not_a_hub_problem() -> UserError:
    """Build the error for a response that does not come from a model Hub."""
    return UserError(
        "The response is not from a model Hub",
        what=f"{endpoint()} did not respond like a Hub.",
        why="A login page of the network or a proxy may have responded instead.",
        fix="Open the address in a browser on this machine's network, or check HF_ENDPOINT.",
    )


TIMEOUT_S = 15
"""Seconds allowed for connecting, and for each wait for data."""
_HEADERS_S = 60.0
"""Seconds allowed until all headers of a response have arrived."""
_WINDOW_S = 30.0
_LEAST_BYTES = 30 << 10
"""Minimum number of bytes that a response must deliver in each window of ``_WINDOW_S`` seconds. A slower
response is abandoned.
"""
_MAX_REDIRECTS = 10
T = TypeVar("T")
_USED_HEADERS = ("x-error-code", "x-error-message", "x-request-id", "retry-after")
"""Headers with which ``huggingface_hub`` distinguishes errors, and that error messages use."""


class TooLong(Exception):
    """Raised if a body is longer than its limit."""


class TooSlow(ConnectionError):
    """Raised if a response begins or continues too slowly to end in reasonable time."""


@contextmanager
def open_response(
    url: str, headers: Mapping[str, str], params: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Open the response for ``url``, following redirects. Its body is not compressed, and not yet read.

    Raises the client's exceptions, and ConnectionError for a response that exceeds the limits.
    """
    from huggingface_hub import get_session

    client = get_session()
    request = client.build_request(
        "GET",
        url,
        params=dict(params or {}),
        headers={**headers, "Accept-Encoding": "identity"},
        timeout=TIMEOUT_S,
    )
    for _ in range(_MAX_REDIRECTS + 1):
        response = _within(_HEADERS_S, partial(client.send, request, stream=True, follow_redirects=False))
        try:
            if response.next_request is None:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise ConnectionError("an unrequested compressed response")
                yield response
                return
            request = response.next_request
        finally:
            response.close()
    raise ConnectionError("too many redirections")


def raise_for_status(response: Any) -> None:
    """Raise the client's error for an error status, without reading the body."""
    from huggingface_hub import hf_raise_for_status

    if response.status_code < 400:
        return
    headers = {name: response.headers[name] for name in _USED_HEADERS if name in response.headers}
    hf_raise_for_status(type(response)(response.status_code, headers=headers, request=response.request))


def pieces(response: Any) -> Iterator[bytes]:
    """Yield the body of a response as it arrives. Raises TooSlow."""
    began, size = time.monotonic(), 0
    for part in response.iter_bytes():
        yield part
        size += len(part)
        now = time.monotonic()
        if now - began < _WINDOW_S:
            continue
        if size < _LEAST_BYTES:
            raise TooSlow(f"only {size:,} bytes in {now - began:.0f} seconds")
        began, size = now, 0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call in another thread, and return its result. Raises TooSlow after ``seconds``."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="request", daemon=True).start()
    wait([done], timeout=seconds)
    if not done.done():
        raise TooSlow(f"no response in {seconds:.0f} seconds")
    return done.result()


def read_body(response: Any, max_bytes: int) -> bytes:
    """Read the body of a response. Raises TooLong if it is longer than ``max_bytes``."""
    parts, size = [], 0
    for part in pieces(response):
        size += len(part)
        if size > max_bytes:
            raise TooLong(f"more than {max_bytes >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


@contextmanager
def translate_hub_errors(model_id: str = "") -> Iterator[None]:
    """Convert the client's exceptions and errors of the disk in this context to UserError."""
    import huggingface_hub.errors as hub_errors

    try:
        yield
    except UserError:
        raise
    except hub_errors.HfHubHTTPError as error:
        raise _http_problem(error, model_id) from None
    except hub_errors.OfflineModeIsEnabled:
        raise UserError(
            "Hub access is turned off",
            what="HF_HUB_OFFLINE is set, so no request is sent to the Hub.",
            fix="Unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) and start again.",
        ) from None
    except (network_error(), ConnectionError) as error:
        raise unreachable(type(error).__name__) from None
    except OSError as error:
        raise _disk_problem(error) from None


def network_error() -> type[Exception]:
    """Return the base exception of the client's HTTP library: httpx in huggingface_hub 1, httpx2 in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__mro__[1]
    assert issubclass(base, Exception)
    return base


def is_permanent(error: Exception) -> bool:
    """Return whether retrying is useless, as after an HTTP error other than 429 or 5xx."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return False
    status: int = error.response.status_code
    return status < 500 and status != 429


def unreachable(reason: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        "Cannot reach the Hub",
        what=f"There is no connection to {constants.ENDPOINT} ({reason}).",
        why="The network is down, or a firewall or proxy is in the way.",
        fix="Check the network and try again. Models on this machine can be used without the Hub.",
    )


def _http_problem(error: Any, model_id: str) -> UserError:
    """Build the error for an HfHubHTTPError, whose response has the status and, from the Hub, a code."""
    import huggingface_hub.errors as hub_errors

    status = error.response.status_code
    if isinstance(error, hub_errors.GatedRepoError):
        return _gated(status, model_id)
    if status == 401 and not isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(
            "Hugging Face token rejected",
            what="The Hugging Face token on this machine is not valid.",
            why="The token has expired or was revoked, or HF_TOKEN is wrong.",
            fix="Log in again with: hf auth login",
        )
    if isinstance(error, hub_errors.EntryNotFoundError):
        return UserError(
            "File missing from the model",
            what=f"{model_id} on {_endpoint()} has no config.json, or lacks the index of its weights.",
            fix="Choose another model, or another repository with this model.",
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return UserError(
            "Revision not found",
            what=f"The requested branch, tag or commit of {model_id} does not exist on {_endpoint()}.",
            fix="Choose a revision that the Hub lists under Files and versions; the default is main.",
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        return UserError(
            "Model not found on the Hub",
            what=f"The model {model_id!r} does not exist on {_endpoint()}, or it is private.",
            fix="Check its name. For a private model, log in first with: hf auth login",
        )
    if status == 403:
        return UserError(
            "Access denied by the Hub",
            what=f"The token on this machine is not allowed to read {model_id or 'this repository'}.",
            why="A fine-grained token can read only the repositories it was granted.",
            fix=f"Give the token read access on {_endpoint()}/settings/tokens, or log in with: hf auth login",
        )
    if status == 429:
        return _rate_limited(error.response)
    return UserError(
        "Hub server error",
        what=f"{_endpoint()} answered with status {status}.",
        fix="Try again in a few minutes.",
    )


def _gated(status: int, model_id: str) -> UserError:
    page = f"{_endpoint()}/{model_id}"
    if status == 401:
        return UserError(
            "The model is gated",
            what=f"{model_id} can be downloaded only after you accept its license.",
            why="There is no Hugging Face token on this machine.",
            fix=f"Accept the license at {page}, then log in with: hf auth login",
        )
    return UserError(
        "The model is gated",
        what=f"The account that owns the token on this machine is not allowed to download {model_id}.",
        why="The account has not accepted the model's license, or the publisher has not granted access yet.",
        fix=f"Accept the license at {page} with that account (hf auth whoami names it), then try again.",
    )


def _rate_limited(response: Any) -> UserError:
    seconds = response.headers.get("Retry-After", "")
    wait = f"Wait {seconds} seconds" if seconds.isdigit() else "Wait a few minutes"
    return UserError(
        "Rate limited by the Hub",
        what="Too many requests came from this address or account.",
        fix=f"{wait} and try again. Logged-in users have a higher limit: hf auth login",
    )


def _disk_problem(error: OSError) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError(
            "The disk is full",
            what="There is no space left on the disk of the model cache.",
            fix="Free some space, or set HF_HOME to a folder on a larger disk, and resume the download.",
        )
    return UserError(
        "Cannot write the model",
        what=f"{error.filename or 'The cache'}: {error.strerror or type(error).__name__}.",
        fix="Check that the folder can be written to, or set HF_HOME to another folder.",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
