"""What the tests of the chat page share: servers under it, and what a user does on it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chromium import Tab
from tests.openai_server import Script
from tests.serving import running, wait_ready

import glimt
from glimt.server.app import create_app
from glimt.server.config import ServerConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOT, SHAPES = EXAMPLES / "boot.png", EXAMPLES / "shapes.png"
DESKTOP, PHONE, NARROW = (1200, 800), (390, 780), (320, 640)

READY = "document.querySelector('#model').classList.contains('is-ready')"
ANSWERED = "!document.body.classList.contains('is-answering')"


# --- servers ---------------------------------------------------------------------------------


@contextmanager
def loaded_engine(model: str) -> Iterator[glimt.AsyncEngine]:
    engine = glimt.AsyncEngine.load(glimt.EngineConfig(model=model))
    yield engine
    engine.close()


@contextmanager
def page_over(
    load: Any, chat: Any = None, config: ServerConfig | None = None, waits: bool = True
) -> Iterator[str]:
    """Our server; `chat`, if given, answers on /v1 in its place."""
    app, _ = create_app(load, config or ServerConfig(num_decoders=0), "demo", created=1760000000)

    async def either(scope: Any, receive: Any, send: Any) -> None:
        is_chat = chat is not None and scope.get("path", "").startswith("/v1")
        await (chat if is_chat else app)(scope, receive, send)

    with running(either) as url:
        if waits:
            wait_ready(url)
        yield url


class NeverClosed:
    """An engine that outlives the servers over it."""

    def __init__(self, engine: glimt.AsyncEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


@contextmanager
def page_of(engine: glimt.AsyncEngine, **config: Any) -> Iterator[str]:
    """The page over an engine, through our own routes."""
    settings = ServerConfig(num_decoders=0, **config)
    with page_over(lambda: NeverClosed(engine), config=settings) as url:
        yield url


@contextmanager
def page_by(engine: glimt.AsyncEngine, *steps: Any) -> Iterator[tuple[str, Script]]:
    """The page over a script, which gives one step to each question, the last one forever."""
    script = Script(lambda number: steps[min(number, len(steps) - 1)])
    with page_over(lambda: NeverClosed(engine), script.app()) as url:
        yield url, script


# --- hands and eyes --------------------------------------------------------------------------


def opened(tab: Tab, url: str, size: tuple[int, int] = DESKTOP, language: str = "en-GB") -> None:
    tab.problems.clear()
    tab.look_as(*size)
    agent = tab.see("navigator.userAgent")
    tab.call("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
    reopen(tab, url)


def reopen(tab: Tab, url: str) -> None:
    tab.open(url)
    tab.wait(READY)


def ask(tab: Tab, text: str) -> None:
    """Type a question where the focus is and send it."""
    tab.type(text)
    tab.press("Enter")


def answered(tab: Tab, count: int = 1) -> list[str]:
    """The texts of so many finished answers."""
    tab.find(".answer .facts", count)
    tab.wait(ANSWERED)
    return tab.see("[...document.querySelectorAll('.answer .text')].map(e => e.innerText.trim())")


def set_field(tab: Tab, name: str, value: str) -> None:
    """Fill a setting in as a user does."""
    tab.click("#settings-open")
    tab.click(f"#set-{name}")
    tab.type(value)
    tab.click("#settings-done")
    tab.click("#question")


def choose(tab: Tab, *files: Path) -> None:
    tab.choose("#files", files)
    tab.find("#tray li", len(files))


def sent_pictures(body: dict[str, Any]) -> list[bytes]:
    """The pictures of the last question."""
    content = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def output_of_engine(engine: glimt.AsyncEngine, messages: Any) -> glimt.RequestOutput:
    """What the engine itself says, greedily."""
    return asyncio.run(engine.chat(messages, glimt.SamplingParams(temperature=0)))


def of_engine(engine: glimt.AsyncEngine, messages: Any) -> str:
    """The same as a page shows it."""
    return output_of_engine(engine, messages).text.strip()
