"""How a cluster on a real Ray ends when it is told twice."""

from __future__ import annotations

import importlib.util
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from tests.cluster.running import Cluster, cluster, wait_said

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'glimt[cluster]'"
)

PICTURES_FROM_HERE = ("--allowed-media-domains", "*", "--allowed-media-networks", "127.0.0.0/8")


def test_a_second_signal_ends_what_the_first_lets_go_on(tmp_path):
    """Would catch a user who presses Ctrl-C again and waits all the same, or callers told nothing.

    The request waits for a picture that never comes, so nothing but the signal ends it with a 503.
    """
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        cluster(tmp_path, *PICTURES_FROM_HERE, "--drain-timeout", "90") as running,
        ThreadPoolExecutor(1) as one,
    ):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        waiting = one.submit(ask_about, running, url)
        silent.settimeout(30)
        with silent.accept()[0]:
            running.process.send_signal(signal.SIGTERM)
            wait_said(running, "for 90 s; a second signal ends them at once")
            running.process.send_signal(signal.SIGINT)
            reply = waiting.result(60)
            assert reply.status_code == 503
            assert "shutting down" in reply.json()["error"]["message"]
            assert running.process.wait(60) == 0


def ask_about(running: Cluster, url: str) -> requests.Response:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return running.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
    )
