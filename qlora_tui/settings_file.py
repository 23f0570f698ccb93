"""Changes single settings in ``config.toml`` and keeps the rest of the file, with its comments."""

from __future__ import annotations

from typing import Any

import msgspec

from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.settings import Settings, config_path, load_settings


def save_setting(name: str, value: Any) -> Settings:
    """Write one setting and return all of them.

    Args:
        name: Its key in the file, as in ``theme`` or ``notify.bell``.
        value: The new value; None removes the key, which restores the default.

    Raises:
        UserError: The file cannot be read or written, or the value is not allowed. The file is unchanged.
    """
    import tomlkit  # takes a few ms, which a start avoids

    load_settings()
    path = config_path()
    document = tomlkit.parse(path.read_text("utf-8") if path.exists() else "")
    section, _, key = name.rpartition(".")
    table: Any = document
    if section:
        if section not in document:
            document[section] = tomlkit.table()
        table = document[section]
    if value is None:
        table.pop(key, None)
    else:
        table[key] = list(value) if isinstance(value, tuple) else value
    text = tomlkit.dumps(document)
    try:
        settings = msgspec.toml.decode(text, type=Settings)
    except msgspec.ValidationError as error:
        raise UserError(
            "Setting not changed", what=f"{name}: {error}.", fix="Enter another value."
        ) from error
    try:
        private_dir(path.parent)
        # A link, as dotfiles are managed, stays one.
        atomic_write(path.resolve() if path.exists() else path, text, durable=True)
    except OSError as error:
        raise UserError(
            "Setting not saved",
            what=f"{path} cannot be written: {error.strerror}.",
            fix="Make the folder writable or free some space, and try again.",
        ) from error
    return settings
