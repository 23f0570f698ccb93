from __future__ import annotations

import pytest

from qlora_tui.errors import UserError
from qlora_tui.settings import Settings, config_path, load_settings


def test_without_a_file_the_defaults_hold() -> None:
    assert load_settings() == Settings()


def test_what_the_user_wrote_is_read() -> None:
    config_path().write_text('theme = "paper"\nmodel_folders = ["/models"]\n[keymap]\n"train.stop" = "x"\n')
    settings = load_settings()
    assert settings.theme == "paper"
    assert settings.model_folders == ("/models",)
    assert settings.keymap == {"train.stop": "x"}


@pytest.mark.parametrize(
    "text", ['them = "paper"', "theme = 3", "theme = ", "card_gib = -1", '[notify]\nwebhook = "ftp://x"']
)
def test_a_wrong_file_is_explained(text: str) -> None:
    config_path().write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings()
    assert str(config_path()) in str(caught.value)
    assert "theme" in caught.value.fix
