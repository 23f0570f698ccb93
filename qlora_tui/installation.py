"""The environment that this program is installed in, and commands that install packages into it."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

PROGRAM = "qlora-tui"
_TORCH_INDEX = "https://download.pytorch.org/whl/"
_TORCH_BUILD = re.compile(r"cpu|xpu|cu\d+|rocm[\d.]+")
_UV_FOR_TORCH = "0.9.19"
"""First version of uv whose ``tool install`` has ``--torch-backend`` (uv pull request 17117). Earlier ones
reject the option and ignore UV_TORCH_BACKEND."""
_RECEIPT = "uv-receipt.toml"


class Installer(Enum):
    """The tool that manages the packages of an environment."""

    UV_TOOL = "uv tool"
    PIPX = "pipx"
    PIP = "pip"
    UV = "uv"
    """An environment without pip, as ``uv venv`` creates it."""


def installer() -> Installer:
    """Return the tool that manages this process's environment."""
    prefix = Path(sys.prefix)
    if (prefix / _RECEIPT).exists():
        return Installer.UV_TOOL
    if (prefix / "pipx_metadata.json").exists():
        return Installer.PIPX
    return Installer.UV if find_spec("pip") is None else Installer.PIP


@dataclass(frozen=True)
class _Package:
    """A package to install, and its source."""

    name: str
    extras: tuple[str, ...] = ()
    source: str = ""
    """Text after the name: a specifier, ``" @ URL"`` or ``" ; marker"``."""
    editable: str = ""
    """Folder of the package, if it is installed in editable mode; otherwise empty."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``name`` or ``name[extra,extra]``."""
        name, _, extras = text.partition("[")
        return cls(name, tuple(filter(None, extras.rstrip("]").split(","))))

    def words(self, editable_option: str = "--editable", *before: str) -> list[str]:
        """Return the arguments that name this package. ``before``: arguments to put first, unless the package
        is editable.
        """
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        if self.editable:
            return [editable_option, f"{self.editable}{extras}"]
        return [*before, f"{self.name}{extras}{self.source}"]


@dataclass(frozen=True)
class _UvTool:
    """The packages that ``uv tool install`` installed, according to its receipt."""

    packages: tuple[_Package, ...]
    """Packages, beginning with this program."""
    python: str = ""

    def command(self, *options: str) -> list[str]:
        """Return the command that installs all packages. uv removes packages that a command does not name."""
        program, *others = self.packages
        words = ["uv", "tool", "install", *options, *program.words()]
        words += [word for each in others for word in each.words("--with-editable", "--with")]
        return words + (["--python", self.python] if self.python else [])


def install_command(
    *requirements: str, options: Sequence[str] = ("--upgrade",), keep: Sequence[str] = ()
) -> str:
    """Return the command that installs or upgrades packages, such as ``mlflow`` or ``qlora-tui[export]``.

    An environment of uv or pipx is changed through these tools, and may have no pip. This program is
    reinstalled from its original source, which may be a folder.

    Args:
        requirements: Names of packages.
        options: Options for pip and uv.
        keep: Packages that keep their installed versions. Ignored if uv manages this program as a tool: uv
            then installs versions that this program accepts.
    """
    packages = [_Package.parse(requirement) for requirement in requirements]
    if tool := _uv_tool():
        tool = replace(tool, packages=_with(tool.packages, packages))
        build = _torch_build()
        return shlex.join(tool.command(*options, *(["--torch-backend", build] if build else [])))
    packages += [_Package(name, source=f"=={version(name).partition('+')[0]}") for name in keep]
    own = _installed_program()
    packages = [replace(own, extras=each.extras) if each.name == PROGRAM else each for each in packages]
    return shlex.join([*_begin(options, options), *(word for each in packages for word in each.words())])


def torch_command(build: str) -> str:
    """Return the command that replaces torch with a build such as ``cu126``, from that build's index."""
    if tool := _uv_tool():
        return shlex.join(tool.command("--torch-backend", build, "--reinstall-package", "torch"))
    begin = _begin(["--force-reinstall"], ["--reinstall-package", "torch"])
    return shlex.join([*begin, "torch", "--index-url", f"{_TORCH_INDEX}{build}"])


def _begin(pip_options: Sequence[str], uv_options: Sequence[str]) -> list[str]:
    """Return the beginning of a command that installs packages into the environment."""
    match installer():
        case Installer.PIPX:
            return ["pipx", "runpip", PROGRAM, "install", *pip_options]
        case Installer.PIP:
            return [sys.executable, "-m", "pip", "install", *pip_options]
        case _:
            return ["uv", "pip", "install", "--python", sys.executable, *uv_options]


def torch_command_needs() -> str:
    """Return what the command for torch requires, such as ``uv 0.9.19 or newer``; empty if nothing."""
    return f"uv {_UV_FOR_TORCH} or newer" if _uv_tool() else ""


def _uv_tool() -> _UvTool | None:
    """Return the content of uv's receipt; None if there is none, or if no command can repeat its entries.

    If None, packages are installed into the environment, and the receipt does not list them.
    """
    try:
        tool = tomllib.loads((Path(sys.prefix) / _RECEIPT).read_text(encoding="utf-8"))["tool"]
        packages = [_of_receipt(each) for each in tool["requirements"]]
        programs = {entry.get("from", PROGRAM) for entry in tool.get("entrypoints", [])}
        is_repeatable = tool.keys() <= {"requirements", "python", "entrypoints"} and programs <= {PROGRAM}
        own = next(each for each in packages if each.name == PROGRAM)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    others = [each for each in packages if each is not own]
    return _UvTool((own, *others), str(tool.get("python", ""))) if is_repeatable else None


def _of_receipt(entry: dict[str, Any]) -> _Package:
    """Convert a requirement in a receipt. Raises ValueError if it has unknown fields."""
    entry = dict(entry)
    name, extras = entry.pop("name"), tuple(entry.pop("extras", ()))
    marker = entry.pop("marker", "")
    if len(entry) > 1:
        raise ValueError(entry)
    source = ""
    for kind, value in entry.items():
        match kind:
            case "editable":
                return _Package(name, extras, editable=value)
            case "specifier":
                source = value
            case "directory" | "path":
                source = f" @ {Path(value).as_uri()}"
            case "url":
                source = f" @ {value}"
            case "git":
                source = f" @ {_git_url(value)}"
            case _:
                raise ValueError(kind)
    return _Package(name, extras, f"{source} ; {marker}" if marker else source)


def _git_url(value: str) -> str:
    """Convert a receipt's git source to a URL to install from.

    For example, ``https://host/repository?rev=main`` becomes ``git+https://host/repository@main``.
    """
    parts = urlsplit(value)
    query = dict(parse_qsl(parts.query))
    folder = query.pop("subdirectory", "")
    if query.keys() - {"rev", "tag", "branch"}:
        raise ValueError(value)
    revision = "".join(f"@{each}" for each in query.values())
    url = parts._replace(query="", fragment=f"subdirectory={folder}" if folder else "")
    return "git+" + url._replace(path=f"{url.path}{revision}").geturl()


def _with(packages: Iterable[_Package], added: Iterable[_Package]) -> tuple[_Package, ...]:
    """Return packages with others added. For a package that is in both, the extras are combined."""
    merged = {each.name: each for each in packages}
    for each in added:
        there = merged.setdefault(each.name, each)
        merged[each.name] = replace(there, extras=tuple(dict.fromkeys((*there.extras, *each.extras))))
    return tuple(merged.values())


def _installed_program() -> _Package:
    """Return this program with the source that it was installed from (PEP 610)."""
    try:
        origin = json.loads(distribution(PROGRAM).read_text("direct_url.json") or "{}")
        url, parts = origin["url"], urlsplit(origin["url"])
        if origin.get("dir_info", {}).get("editable"):
            return _Package(PROGRAM, editable=unquote(parts.path))
        vcs = origin.get("vcs_info")
        revision = f"@{vcs['requested_revision']}" if vcs and "requested_revision" in vcs else ""
        folder = f"#subdirectory={origin['subdirectory']}" if origin.get("subdirectory") else ""
        return _Package(PROGRAM, source=f" @ {vcs['vcs'] + '+' if vcs else ''}{url}{revision}{folder}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PackageNotFoundError):
        return _Package(PROGRAM)


def _torch_build() -> str:
    """Return the tag of torch's build, such as ``cu126``; empty for a build from PyPI, which has no tag."""
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return ""
    return build if _TORCH_BUILD.fullmatch(build) else ""
