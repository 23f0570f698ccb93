"""Hub errors, translated into messages a user can act on.

Only status and model name go into a message: the client's own texts contain request addresses, which may be
signed, so they are not repeated. No token can reach a message or a log from here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_tui.errors import UserError


@contextmanager
def translate_hub_errors(model_id: str = "") -> Iterator[None]:
    """Convert the client's exceptions inside the block to UserError."""
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
    """Return whether retrying is useless: an HTTP error other than 429 or 5xx."""
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
        fix="Check the network and try again. Models on this machine can be used without it.",
    )


def _http_problem(error: Any, model_id: str) -> UserError:
    """Build the error for an HfHubHTTPError. Its response has the status and, from the Hub, a code."""
    import huggingface_hub.errors as hub_errors

    status = error.response.status_code
    if isinstance(error, hub_errors.GatedRepoError):
        return _gated(status, model_id)
    if status == 401 and not isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(
            "Hugging Face token rejected",
            what="The Hugging Face token on this machine is not valid.",
            why="It has expired or was revoked, or HF_TOKEN is wrong.",
            fix="Log in again with: hf auth login",
        )
    if isinstance(error, hub_errors.EntryNotFoundError):
        return UserError(
            "File missing from the model",
            what=f"{model_id} on {_endpoint()} has no config.json, or lacks an index it needs.",
            fix="Choose another model, or another copy of it.",
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return UserError(
            "Revision not found",
            what=f"{model_id} on {_endpoint()} has no branch, tag or commit of this name.",
            fix="The Hub lists revisions under Files and versions; the default is main.",
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
            what=f"The token on this machine may not read {model_id or 'this'}.",
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
        what=f"The account of the token on this machine may not download {model_id}.",
        why="Its license is not accepted, or its publisher has not granted access yet.",
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
            fix="Free some space, or set HF_HOME to a larger disk, and resume the download.",
        )
    return UserError(
        "Cannot write the model",
        what=f"{error.filename or 'The cache'}: {error.strerror or type(error).__name__}.",
        fix="Check that the folder can be written to, or set HF_HOME to another.",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
