"""Configs of real models, as far as their shapes go."""

from __future__ import annotations

from qlora_tui.catalog.architecture import read_architecture
from qlora_tui.catalog.facts import Architecture
from tests.catalog.configs import config


def tinyllama() -> Architecture:
    return read_architecture(config("TinyLlama/TinyLlama-1.1B-Chat-v1.0"))


def qwen_7b() -> Architecture:
    return read_architecture(config("Qwen/Qwen2.5-7B"))
