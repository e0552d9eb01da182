"""Which replica a request goes to: no Ray is needed to say so."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from tests.services import picture

from glimt.cluster.affinity import affinity_key, preferred, ranked

NAMES = ("0", "1", "2", "3")
ENCODED = base64.b64encode(picture()).decode()
DATA = f"data:image/png;base64,{ENCODED}"
KEYS = [f"key {number}" for number in range(400)]


def key_of(value: Any) -> str:
    return affinity_key(json.dumps(value).encode())


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": list(messages), **fields}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def shown(url: str, text: str = "What is it?") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]


SAME_PICTURE = {
    "another question": chat(user(shown(DATA, "And now?"))),
    "another setting": chat(user(shown(DATA)), temperature=0.5, stream=True),
    "after a system turn": chat({"role": "system", "content": "Be brief."}, user(shown(DATA))),
    "in a later turn": chat(user("你好"), {"role": "assistant", "content": "!"}, user(shown(DATA))),
    "before a second picture": chat(user([*shown(DATA), *shown("https://example.org/b.png")])),
    "MindIE's plain address": chat(user([{"type": "image_url", "image_url": DATA}])),
    "TGI": {"inputs": f"![]({DATA})What is it?", "parameters": {"max_new_tokens": 5}},
    "Triton's generate": {"text_input": "What is it?", "image": ENCODED},
    "Triton's tensors": {
        "inputs": [
            {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["What is it?"]},
            {"name": "image", "shape": [1], "datatype": "BYTES", "data": [ENCODED]},
        ]
    },
    "VisualGLM": {"text": "What is it?", "image": ENCODED, "history": []},
}


@pytest.mark.parametrize("body", SAME_PICTURE.values(), ids=SAME_PICTURE)
def test_a_picture_decides_in_every_form(body):
    """Would catch a form whose pictures are encoded by a replica that has not seen them."""
    assert key_of(body) == key_of(chat(user(shown(DATA))))


def test_other_pictures_have_other_keys():
    """Would catch a key that is the data URL's beginning, or nothing at all."""
    changed = bytearray(picture())
    changed[-1] ^= 1
    other = f"data:image/png;base64,{base64.b64encode(changed).decode()}"
    addresses = (DATA, other, "https://example.org/a.png", "https://example.org/b.png")
    keys = {key_of(chat(user(shown(each)))) for each in addresses}
    assert len(keys) == 4
    assert "" not in keys


def test_a_conversation_keeps_its_key():
    """Would catch a follow-up that goes where its own history is not cached."""
    system = {"role": "system", "content": "Be brief."}
    first = chat(system, user("Who are you?"))
    later = chat(system, user("Who are you?"), {"role": "assistant", "content": "G."}, user("Why?"))
    assert key_of(first) == key_of(later)
    assert key_of(first) != key_of(chat(system, user("Who am I?")))
    assert key_of(first) != key_of(chat(user("Who are you?")))


def test_a_prompt_goes_by_its_first_512_characters():
    """Would catch a long shared beginning that no two requests share a replica for."""
    begins = "x" * 512
    for name in ("prompt", "inputs", "text_input"):
        assert key_of({name: begins + "a", "n": 1}) == key_of({name: begins + "b", "n": 2})
        assert key_of({name: "a" + begins}) != key_of({name: "b" + begins})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"[1]", b'"x"', b"{}", b'{"messages": []}', b"\xff"]
)
def test_what_tells_nothing_has_no_key(body):
    """Would catch a bad body that ends the door instead of being refused by a replica."""
    assert affinity_key(body) == ""


def test_binary_tensors_go_by_what_follows_their_header():
    """Would catch Triton's binary form having as many keys as request ids."""
    header, other = b'{"id": "a"}', b'{"id": "b"}'
    assert affinity_key(header + b"\x05\0\0\0pixel", len(header)) == affinity_key(
        other + b"\x05\0\0\0pixel", len(other)
    )
    assert affinity_key(header, len(header)) == ""


def test_broken_base64_is_a_picture_like_any_other():
    """Would catch a picture that cannot be decoded ending the door."""
    assert re.fullmatch("[0-9a-f]{64}", key_of(chat(user(shown("data:image/png;base64,A")))))


# --- replicas --------------------------------------------------------------------------------


def test_replicas_share_the_keys():
    """Would catch an order that favours a name: each of 4 gets a quarter of 400, within a third."""
    firsts = [ranked(key, NAMES)[0] for key in KEYS]
    counts = {name: firsts.count(name) for name in NAMES}
    assert all(67 <= count <= 133 for count in counts.values()), counts


@pytest.mark.parametrize("gone", NAMES)
def test_only_the_keys_of_a_dead_replica_move_and_they_come_back(gone):
    """Would catch a modulus: one replica less, and every cache is cold."""
    before = {key: ranked(key, NAMES) for key in KEYS}
    left = [name for name in NAMES if name != gone]
    for key, order in before.items():
        assert ranked(key, left) == [name for name in order if name != gone]
        assert ranked(key, (*left, gone)) == order


def test_a_hot_key_spills_over_in_its_own_order():
    """Would catch a key that overloads its replica, or spills to another one each time."""
    order = ranked("hot", NAMES)
    loads = dict.fromkeys(NAMES, 0)
    taken = []
    for _ in range(40):
        taken.append(preferred("hot", loads, full_at=8)[0])
        loads[taken[-1]] += 1
    assert taken[:8] == [order[0]] * 8
    assert taken[8:16] == [order[1]] * 8
    # Beyond 8 each, nobody has more than 1.25 times the mean of all.
    assert max(loads.values()) == 13
    assert min(loads.values()) == 8 or sum(loads.values()) == 40


def test_a_replica_above_the_bound_comes_after_all_below_it():
    """Would catch a full replica that is tried before an idle one."""
    order = ranked("k", NAMES)
    loads = dict.fromkeys(NAMES, 0) | {order[0]: 50, order[1]: 40}
    assert preferred("k", loads, full_at=8) == [order[2], order[3], order[1], order[0]]


def test_without_a_key_the_least_busy_comes_first():
    """Would catch health checks and lists that all go to one replica."""
    assert preferred("", {"0": 3, "1": 0, "2": 1}, full_at=8) == ["1", "2", "0"]
