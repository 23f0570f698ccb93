"""Configs of real models, as far as their shapes go."""

from __future__ import annotations

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from tests.catalog.configs import config


def tinyllama() -> Architecture:
    return parse_architecture(config("TinyLlama/TinyLlama-1.1B-Chat-v1.0"))


def qwen_7b() -> Architecture:
    return parse_architecture(config("Qwen/Qwen2.5-7B"))
