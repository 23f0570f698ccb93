"""What goes wrong with a hub, in words a user can act on.

Only status and model name go into a message: the client's own texts carry request addresses, which may be
signed, so none of them is repeated. No token can reach a message or a log from here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_tui.errors import UserError


@contextmanager
def translate_hub_errors(model_id: str = "") -> Iterator[None]:
    """Turn what the client raises inside into a UserError."""
    import huggingface_hub.errors as hub_errors

    try:
        yield
    except UserError:
        raise
    except hub_errors.HfHubHTTPError as error:
        raise _http_problem(error, model_id) from None
    except hub_errors.OfflineModeIsEnabled:
        raise UserError(
            "The hub is switched off",
            what="HF_HUB_OFFLINE is set, so nothing is asked of the hub.",
            fix="Unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) and start again.",
        ) from None
    except (network_error(), ConnectionError) as error:
        raise unreachable(type(error).__name__) from None
    except OSError as error:
        raise _disk_problem(error) from None


def network_error() -> type[Exception]:
    """The base of what the client's HTTP library raises: httpx's in huggingface_hub 1, httpx2's in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__mro__[1]
    assert issubclass(base, Exception)
    return base


def is_permanent(error: Exception) -> bool:
    """Whether asking again is of no use: the hub answered, and it is neither busy nor in trouble."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return False
    status: int = error.response.status_code
    return status < 500 and status != 429


def unreachable(reason: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        "The hub cannot be reached",
        what=f"There is no connection to {constants.ENDPOINT} ({reason}).",
        why="The network is down, or a firewall or proxy is in the way.",
        fix="Check the network and try again. Models on this machine can be used without it.",
    )


def _http_problem(error: Any, model_id: str) -> UserError:
    """``error``: an HfHubHTTPError. Its response has the status and, from the hub, a code."""
    import huggingface_hub.errors as hub_errors

    status = error.response.status_code
    if isinstance(error, hub_errors.GatedRepoError):
        return _gated(status, model_id)
    if status == 401 and not isinstance(error, hub_errors.RepositoryNotFoundError):
        return UserError(
            "The hub does not accept the token",
            what="The Hugging Face token on this machine is not valid.",
            why="It has expired or was revoked, or HF_TOKEN is set wrongly.",
            fix="Log in again with: hf auth login",
        )
    if isinstance(error, hub_errors.EntryNotFoundError):
        return UserError(
            "The model lacks a file",
            what=f"{model_id} on {_endpoint()} has no such file as its config.json or an index it needs.",
            fix="Choose another model, or another copy of it.",
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return UserError(
            "The model has no such revision",
            what=f"{model_id} on {_endpoint()} has no branch, tag or commit of this name.",
            fix="The hub lists them under Files and versions; main is what is meant without one.",
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        return UserError(
            "The model is not on the hub",
            what=f"There is no model {model_id!r} on {_endpoint()}, or it is private.",
            fix="Check its name. For a private model log in first, with: hf auth login",
        )
    if status == 403:
        return UserError(
            "The hub forbids it",
            what=f"The token on this machine may not read {model_id or 'this'}.",
            why="A fine-grained token reads only what it was given.",
            fix=f"Give the token read access on {_endpoint()}/settings/tokens, or log in with: hf auth login",
        )
    if status == 429:
        return _rate_limited(error.response)
    return UserError(
        "The hub is in trouble",
        what=f"{_endpoint()} answered with status {status}.",
        fix="Try again in a few minutes.",
    )


def _gated(status: int, model_id: str) -> UserError:
    page = f"{_endpoint()}/{model_id}"
    if status == 401:
        return UserError(
            "The model is gated",
            what=f"{model_id} is given only to those who have accepted its licence.",
            why="There is no Hugging Face token on this machine.",
            fix=f"Accept the licence at {page}, then log in with: hf auth login",
        )
    return UserError(
        "The model is gated",
        what=f"The account of the token on this machine may not download {model_id}.",
        why="Its licence is not accepted, or its publisher has not granted access yet.",
        fix=f"Accept the licence at {page} with that account (hf auth whoami names it), then try again.",
    )


def _rate_limited(response: Any) -> UserError:
    seconds = response.headers.get("Retry-After", "")
    wait = f"Wait {seconds} seconds" if seconds.isdigit() else "Wait a few minutes"
    return UserError(
        "The hub asks for a pause",
        what="Too many requests came from this address or account.",
        fix=f"{wait} and try again. Logged-in users may ask more often: hf auth login",
    )


def _disk_problem(error: OSError) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError(
            "The disk is full",
            what="There is no space left where models are kept.",
            fix="Free some space, or set HF_HOME to a larger disk, and start again: what is there is kept.",
        )
    return UserError(
        "The model cannot be written",
        what=f"{error.filename or 'The cache'}: {error.strerror or type(error).__name__}.",
        fix="Check that the folder can be written to, or set HF_HOME to another.",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
