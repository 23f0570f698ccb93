"""Triton's compiler and ptxas accept every launch for every supported GPU, without spilled registers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from tests.kernels.compiling import MODELS, SHARED_KIB, SOURCE, Compiler, NoGpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: make check-kernels"),
]
WIDEST = "Llama-3.1-405B"
FUNCTIONS_OF_KERNELS = {"_activate", "_rotate_token"}


@pytest.fixture(params=SHARED_KIB, ids=lambda capability: "sm_{}{}".format(*capability))
def capability(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    import triton
    from triton.runtime import driver

    if request.param == (12, 0) and Version(triton.__version__) < Version("3.3"):
        pytest.skip("torch 2.6, which ships this Triton, has no build for this GPU either")
    driver.set_active(NoGpu(request.param))
    return request.param  # type: ignore[no-any-return]


def problems(source: Path, capability: tuple[int, int], folder: Path, *models: str) -> list[str]:
    """What is wrong with the launches for models, compiled from a source file."""
    compiler = Compiler(source, capability)
    for model in models or MODELS:
        compiler.launch(MODELS[model])
    launched = {name for name, _ in compiler.compiled}
    assert launched == set(compiler.functions) - FUNCTIONS_OF_KERNELS
    return [problem for usage in compiler.usages(folder) if (problem := usage.problem(capability))]


def test_every_launch_compiles_without_spills(capability: tuple[int, int], tmp_path: Path) -> None:
    assert problems(SOURCE, capability, tmp_path) == []


@pytest.mark.parametrize("capability", [(8, 9)], indirect=True)
def test_an_annotated_parameter_is_refused(capability: tuple[int, int], tmp_path: Path) -> None:
    planted = tmp_path / "annotated.py"
    planted.write_text(SOURCE.read_text().replace("    inv_rms,\n", "    inv_rms: Any,\n", 1))
    with pytest.raises(Exception, match="Cannot access global variable Any"):
        problems(planted, capability, tmp_path, WIDEST)


@pytest.mark.parametrize("capability", [(8, 9)], indirect=True)
def test_a_spilled_register_is_found(capability: tuple[int, int], tmp_path: Path) -> None:
    planted = tmp_path / "spilling.py"
    planted.write_text(SOURCE.read_text().replace("warps = min(", "warps = 2 + 0 * min("))
    assert any("spills" in problem for problem in problems(planted, capability, tmp_path, WIDEST))
