"""Exports a recipe as a job for another scheduler: a folder with the recipe, its data and a job file.

The templates of job files in ``job_files/`` install the program, download the model, train, and keep the run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from string import Template
from typing import Literal, TypeAlias

import msgspec

from qlora_tui import __version__
from qlora_tui.data.sources import every_source, is_hub_dataset
from qlora_tui.errors import UsageError
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump

Scheduler: TypeAlias = Literal["slurm", "skypilot", "dstack", "modal"]
FILES: dict[Scheduler, tuple[str, str]] = {
    "slurm": ("job.sh", "sbatch job.sh"),
    "skypilot": ("job.yaml", "sky launch -c NAME job.yaml"),
    "dstack": ("job.dstack.yml", "dstack apply -f job.dstack.yml"),
    "modal": ("job.py", "modal run job.py"),
}
"""Name of each scheduler's job file, and the command that starts the job."""
_TEMPLATES = Path(__file__).with_name("job_files")
_GPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 40


class _Template(Template):
    delimiter = "@@"


def write_job(recipe: Recipe, scheduler: Scheduler, gpu: str, folder: Path) -> None:
    """Write the recipe, its data and the scheduler's job file into an empty folder.

    Args:
        recipe: Recipe that the job trains.
        scheduler: Scheduler of the job file.
        gpu: Kind of GPU to rent, such as ``L4``. Not used for Slurm.
        folder: Output folder.

    Raises:
        UsageError: The recipe needs files that exist only on this machine.
        OSError: Data cannot be read, or the folder cannot be written.
    """
    if scheduler != "slurm":  # Slurm nodes share the files of the login node
        _require_portable(recipe)
    if not _GPU.fullmatch(gpu):
        raise UsageError(
            "Unknown GPU name",
            what=f"{gpu!r} is not a name such as L4 or H100.",
            fix="Name a GPU that the scheduler offers.",
        )
    copied = _with_copied_data(with_absolute_paths(recipe), folder)
    (folder / "recipe.toml").write_text(dump(copied), encoding="utf-8")
    # Python and YAML read a JSON string like a shell reads a quoted word.
    quote = json.dumps if scheduler == "modal" else shlex.quote
    text = _Template((_TEMPLATES / f"{scheduler}.txt").read_text(encoding="utf-8")).substitute(
        name=_name(recipe),
        package=quote(f"qlora-tui=={__version__}"),
        model=quote(copied.model.id),
        revision=quote(recipe.model.revision),
        gpus=str(recipe.training.gpus or 1),
        accelerator=gpu,
    )
    (folder / FILES[scheduler][0]).write_text(text, encoding="utf-8")


def _require_portable(recipe: Recipe) -> None:
    """Raise UsageError if the recipe names a model or an adapter on this machine."""
    model = recipe.model.id
    if not model or model.startswith(("/", "~", ".")) or Path(model).exists():
        raise UsageError(
            "The job could not fetch the model",
            what=f"{model or 'An empty model.id'} is not a model id on the Hub, such as "
            "Qwen/Qwen2.5-7B-Instruct.",
            fix="Name the model by its id: --set model.id=…, or in the recipe.",
        )
    if recipe.lora.init_from:
        raise UsageError(
            "The job would lack the adapter",
            what=f"The recipe starts from {recipe.lora.init_from}, which is on this machine.",
            fix="Clear “Start from” (lora.init_from).",
        )


def _with_copied_data(recipe: Recipe, folder: Path) -> Recipe:
    """Copy the local data next to the recipe; return the recipe with the paths of the copies."""
    places: dict[str, str] = {}
    for number, source in enumerate(every_source(recipe.data), 1):
        path = Path(source.path).expanduser()
        if source.path in places or is_hub_dataset(source.path):
            continue
        place = places[source.path] = f"data/{number}-{path.name}"
        (folder / "data").mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / place)
    data = recipe.data
    sources = tuple(
        msgspec.structs.replace(source, path=places.get(source.path, source.path)) for source in data.sources
    )
    validation = places.get(data.validation_path, data.validation_path)
    return msgspec.structs.replace(
        recipe, data=msgspec.structs.replace(data, sources=sources, validation_path=validation)
    )


def _name(recipe: Recipe) -> str:
    """Return a name of lowercase letters, digits and hyphens, with a letter first, for any scheduler."""
    words = recipe.name or recipe.model.id.rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"train-{slug}"[:_LONGEST_NAME].strip("-")
