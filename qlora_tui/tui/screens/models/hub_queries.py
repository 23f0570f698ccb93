"""Queries of the Model screen: details of a model on the Hub, and whether a typed path is a model."""

from __future__ import annotations

from pathlib import Path

from textual.content import Content

from qlora_tui.catalog.hub_files import plan_download
from qlora_tui.catalog.lookup import fetch_architecture
from qlora_tui.demo.wheel_download import SMOLLM2
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.models.model_facts import HubFacts


def fetch_hub_facts(model_id: str) -> HubFacts:
    """Fetch architecture and file sizes in a few requests; an error is in ``problem``."""
    try:
        plan = plan_download(model_id)
        architecture = fetch_architecture(model_id, plan.commit)
    except UserError as problem:
        return HubFacts(None, 0, 0, problem)
    return HubFacts(architecture, plan.total_bytes, plan.done_bytes)


def validate_model_path(text: str) -> str:
    """Return why a typed path cannot be used, or an empty string."""
    path = Path(text.strip()).expanduser()
    if not text.strip() or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return ""
    if path.is_file():
        return f"{path.name} is neither a folder nor a .gguf file."
    return f"{path} does not exist."


def demo_name() -> str:
    """Name of the demo's model."""
    return SMOLLM2.name


def demo_model() -> list[Content]:
    """Describe the demo model and its download."""
    size = f"{format_bytes(SMOLLM2.download_bytes)} from the package index"
    return [
        Content.assemble(
            (f"▸ {key_name('models.download')}  ", "$accent bold"), (f"Download {size}", "bold")
        ),
        Content("llama, 135M parameters, license apache-2.0"),
        Content("Small enough to train on a CPU in minutes."),
        Content.styled(f"Converted, it takes {format_bytes(SMOLLM2.converted_bytes)}.", "dim"),
    ]
