"""A served demo model of each profile, and the same model in this process to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

import glimt
from glimt.server.config import ServerConfig
from openai_client import connect
from serving import Served, serving


@pytest.fixture(scope="module")
def upstream() -> Iterator[Served]:
    config = ServerConfig(num_decoders=0, served_model_names=("demo",), metrics_compat="tgi")
    with serving("demo", config) as served:
        yield served


@pytest.fixture(scope="module")
def mindie() -> Iterator[Served]:
    config = ServerConfig(num_decoders=0, served_model_names=("demo",), profile="mindie")
    with serving("demo", config) as served:
        yield served


@pytest.fixture(scope="module")
def llm() -> glimt.LLM:
    return glimt.LLM("demo")


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the server that a test file serves."""
    with connect(served) as found:
        yield found
