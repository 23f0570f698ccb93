"""Search on the Hub, and configs of its models. Uses the server in ``HF_ENDPOINT``.

Requests go through ``huggingface_hub``'s session and errors, but not through its ``HfApi``. Measured at
commit 7720e8a0 (huggingface_hub 2.4, 2 cores): ``HfApi`` reports a refused connection or a status of
500 after 23 s (here 0.2 s), waits forever for a server that never responds (here 15 s), and reads a
response of any length (1 GiB took 2.4 GiB of memory; here at most ``MAX_BYTES``). Both report offline mode
at once.

``huggingface_hub`` takes 0.12 s to import, so every function here imports it when called; it reads
``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` once, at that import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import __version__
from qlora_tui.catalog.config_parser import MAX_CONFIG_BYTES
from qlora_tui.catalog.hub_errors import translate_hub_errors
from qlora_tui.catalog.hub_responses import TooLong, open_response, raise_for_status, read_body
from qlora_tui.catalog.model_validation import CONFIG, check_model_type
from qlora_tui.decoding import Count, decode_json
from qlora_tui.errors import UserError

MAX_BYTES = 16 << 20
"""Most bytes of a list of results or files: some hundred thousand entries."""
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
    """Parameter count on the Hub: a tied head that is stored twice counts twice."""
    downloads: int
    """Downloads in the last month."""
    gated: bool
    """Whether its license must be accepted on the Hub first, which needs a token."""
    license: str | None
    model_type: str | None
    modified: str
    """ISO date, or empty."""
    refusal: UserError | None
    """Why it cannot be trained here, as far as the Hub's data shows; None if it can."""


def search_models(query: str, limit: int = 30) -> list[HubModel]:
    """Return models with ``query`` in the name and safetensors weights, most downloaded first.

    Raises UserError when the Hub does not respond.
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
    """Return one result; None for an invalid entry, so that it does not hide the others."""
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

    Raises UserError when it does not exist, is gated, or the Hub does not respond.
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

    Raises UserError when the request fails, or the response is not JSON or longer than ``max_bytes``.
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

    ``huggingface_hub.utils.build_hf_headers`` sends a request of its own for a list of coding agents, and
    reads a response of any length.
    """
    from huggingface_hub import constants, get_token

    headers = {"user-agent": f"qlora-tui/{__version__}"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return headers | ({"authorization": f"Bearer {token}"} if token else {})


def endpoint() -> str:
    """Return the base URL of the Hub. Raises UserError when ``HF_ENDPOINT`` is not a web address."""
    from huggingface_hub import constants

    address: str = constants.ENDPOINT
    if not address.startswith(("http://", "https://")):
        raise UserError(
            "HF_ENDPOINT is not a web address",
            what=f"HF_ENDPOINT is {address!r}.",
            fix="Set it to an address that starts with https://, or unset it to use huggingface.co.",
        )
    return address


def validate_model_id(model_id: str) -> str:
    """Return ``model_id`` if it is a valid Hub id. Raises UserError otherwise."""
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
