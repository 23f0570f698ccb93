"""Loading a model runs no code that its folder names: kernels, Python files, another base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow
_KERNELS = """
import os
def get_kernel(repo_id, *args, **settings):
    with open(os.environ["CALLED"], "a") as file:
        file.write(repo_id + "\\n")
    raise OSError("stub")
class _Anything:
    def __init__(self, *args, **settings): pass
    def __call__(self, thing=None, *args, **settings): return thing if thing is not None else self
    def __getattr__(self, name): return _Anything()
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **settings: (lambda thing: thing)
"""
_LOAD = """
import sys
from pathlib import Path
import torch
from qlora_tui.errors import UserError
from qlora_tui.gpu.torch_env import configure_torch_env
configure_torch_env()
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.model import load_base
from transformers.integrations import hub_kernels
assert hub_kernels.is_kernels_available()
cpu = ComputeDevice(torch.device("cpu"), "CPU", 0, torch.float32)
model = load_base(Path(sys.argv[1]), Recipe(quantization=Quantization(method="none")), cpu, "segments")
print(type(model).__name__, model.config._attn_implementation, model.name_or_path)
try:
    hub_kernels.get_kernel("evil-org/kernel", version=1, allow_all_kernels=True)
except ImportError as error:
    print(error)
import os
print(os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"])
"""
CANARY = "import os; open(os.environ['CALLED'], 'a').write('canary\\n')\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(model: Path, place: Path, **config: Any) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Load a copy of ``model`` with these keys in config.json, beside a stub of ``kernels`` and canaries."""
    folder = place / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    (folder / "generation_config.json").write_text(
        json.dumps({"custom_generate": "evil", "compile_config": {}})
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA", "megatron_core": "canary"})
    )
    (folder / "custom_generate").mkdir()
    for name in ("modeling_evil.py", "canary.py", "custom_generate/generate.py", "tokenization_evil.py"):
        (folder / name).write_text(CANARY)
    stub = place / "stub"
    (stub / "kernels").mkdir(parents=True)
    (stub / "kernels" / "__init__.py").write_text(_KERNELS)
    (stub / "kernels-0.18.2.dist-info").mkdir()
    (stub / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    called = place / "called"
    paths = os.pathsep.join([str(stub), str(Path(__file__).parents[2])])
    online = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(folder)],
        env={**online, "PYTHONPATH": paths, "CALLED": str(called)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done, called.read_text().splitlines() if called.exists() else []


def test_no_key_of_a_config_loads_kernels_or_python(model: Path, tmp_path: Path) -> None:
    done, called = load(
        model,
        tmp_path,
        _attn_implementation="evil-org/kernel",
        _attn_implementation_internal="evil-org/kernel",
        attn_implementation="evil-org/kernel",
        experts_implementation="evil-org/kernel",
        auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
        kernel_config={"RMSNorm": "evil-org/kernel:RMSNorm"},
        use_kernels=True,
        configuration_files=["config.5.0.0.json"],
        _name_or_path="evil/model",
        trust_remote_code=True,
    )
    assert done.returncode == 0, done.stderr
    assert called == []
    loaded, pinned, offline = done.stdout.splitlines()
    assert loaded == f"LlamaForCausalLM sdpa {tmp_path / 'model'}"
    assert "evil-org/kernel is not from kernels-community" in pinned
    assert offline == "1 1"
    assert (
        "these keys are ignored, because they select code to run" in done.stderr and "auto_map" in done.stderr
    )
