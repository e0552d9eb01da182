"""Requests that schemathesis makes from the server's own OpenAPI, good ones and bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from forms import DATA_URL

schemathesis = pytest.importorskip("schemathesis", reason="pip install 'glimt[dev]'")

PATIENCE_S = 60  # for one answer: a request that takes longer hangs
PICTURES = (
    DATA_URL,
    DATA_URL,
    DATA_URL,
    "data:image/png;base64,AAAA",
    "https://x.example/a.png",
    "a:b",
    "\0",
)
NUM_IDS = 2048  # of the demo model
NEVER = ("/stopService",)  # ends the server


def operations(url: str) -> Iterator[Any]:
    """What a server tells of its routes, as schemathesis reads it."""
    schemathesis.openapi.format("uri", st.sampled_from(PICTURES))
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        if found.ok().path not in NEVER:
            yield found.ok()


def attack(url: str, num_cases: int, number: int, is_good: bool, check: Any) -> Counter[str]:
    """Send so many requests to each operation; "PATH STATUS" and how often it came.

    number: of the random generator; is_good: whether the bodies fit what OpenAPI says
    check: gets every case and its reply
    """
    seen: Counter[str] = Counter()
    mode = schemathesis.GenerationMode
    with requests.Session() as session:
        for operation in operations(url):
            fixed = _path_parameters(operation) if is_good else {}
            cases = operation.as_strategy(
                generation_mode=mode.POSITIVE if is_good else mode.NEGATIVE, **fixed
            )

            def send(case: Any, path: str = operation.path) -> None:
                if is_good:
                    _mend(case)
                reply = case.call(base_url=url, session=session, timeout=PATIENCE_S)
                seen[f"{path} {reply.status_code}"] += 1
                check(case, reply)

            _run(cases, send, num_cases, number)
    return seen


def _run(cases: Any, send: Any, num_cases: int, number: int) -> None:
    bounds = settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    # An operation without parameters cannot be asked wrongly.
    with suppress(Unsatisfiable):
        seed(number)(bounds(given(case=cases)(lambda case: send(case))))()


def _path_parameters(operation: Any) -> dict[str, Any]:
    """Of a model that is served; a random one would never be."""
    known = {"model": "demo", "version": "1", "model_id": "demo"}
    given = {name: value for name, value in known.items() if f"{{{name}}}" in operation.path}
    return {"path_parameters": given} if given else {}


def _mend(case: Any) -> None:
    """Set what would end nearly every case the same way: names, ids and sizes that only we know."""
    case.query = {}
    body, path = case.body, case.operation.path
    if not isinstance(body, dict):
        return
    if "model" in body:
        body["model"] = "demo"
    inner = body["parameters"] if isinstance(body.get("parameters"), dict) else {}
    for name in ("adapter_id", "typical_p", "timeout"):  # the last may be over before it begins
        inner.pop(name, None)
        body.pop(name, None)
    if path == "/infer":
        body.pop("input_id", None)
        body["inputs"] = body.get("inputs") or "hi"
    elif path == "/infer_token":
        body.pop("inputs", None)
        body["input_id"] = [each % NUM_IDS for each in body.get("input_id") or [7]]
    elif path == "/v1/completions":
        body["prompt"] = _mended_prompt(body["prompt"])
        body.pop("best_of", None)
    elif path.endswith("/infer"):
        first = body["inputs"][0]
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [first["name"]]}
        body["inputs"] = [{**tensor, "parameters": first.get("parameters")}]
        body.pop("outputs", None)


def _mended_prompt(prompt: Any) -> Any:
    """Not empty, and of ids that the demo model has."""
    if isinstance(prompt, list):
        return [_mended_prompt(each) for each in prompt] or "hi"
    return prompt % NUM_IDS if isinstance(prompt, int) else prompt or "hi"
