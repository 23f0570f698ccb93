from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_carries_presets_and_themes_and_finds_them_elsewhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    venv.create(tmp_path / "bare")
    code = (
        "from qlora_tui.paths import shipped_dir;"
        "print(*sorted(p.name for kind in ('presets', 'themes') for p in shipped_dir(kind).glob('*.toml')))"
    )
    dependencies = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = subprocess.run(
        [str(tmp_path / "bare" / "bin" / "python"), "-c", code],
        env={"PYTHONPATH": f"{place}:{dependencies / 'site-packages'}", "HOME": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    expected = sorted(p.name for kind in ("presets", "themes") for p in (ROOT / kind).glob("*.toml"))
    assert sorted(found) == expected
    assert "balanced.toml" in found and "harbour.toml" in found
