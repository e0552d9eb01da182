"""One browser and one engine for all tests of the chat page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.chat_page import loaded_engine
from tests.chromium import Tab, browser

import glimt


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One browser for all tests: each server has a port, and so a storage, of its own."""
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="session")
def engine() -> Iterator[glimt.AsyncEngine]:
    with loaded_engine("demo") as engine:
        yield engine
