"""KServe tensors: JSON and binary, and everything a hostile header may claim."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glimt.errors import GlimtError
from glimt.server.tensors import Tensor, read_infer, write_infer

TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1]}


def packed(head, *tails):
    content = json.dumps(head).encode()
    return content + b"".join(tails), str(len(content))


def element(content):
    return struct.pack("<I", len(content)) + content


def read(*inputs, **more):
    return read_infer(json.dumps({"inputs": list(inputs), **more}).encode(), None)


def test_nested_and_flat_data_are_the_same():
    """Catches data that is read by its outer list only."""
    head = {"name": "a", "datatype": "INT32", "shape": [2, 2]}
    for data in ([[1, 2], [3, 4]], [1, 2, 3, 4]):
        (tensor,) = read({**head, "data": data}).inputs
        assert list(tensor.values) == [1, 2, 3, 4]


def test_binary_tensors_follow_in_order():
    """Catches tensors cut at another's place."""
    texts = [element("你好".encode()), element(b"")]
    numbers = np.array([1, -2], dtype="<i8").tobytes()
    inputs = [
        {
            "name": "t",
            "datatype": "BYTES",
            "shape": [2],
            "parameters": {"binary_data_size": sum(map(len, texts))},
        },
        {"name": "j", "datatype": "BOOL", "shape": [1], "data": [True]},
        {"name": "n", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
    ]
    asked = read_infer(*packed({"id": "x", "inputs": inputs}, *texts, numbers))
    assert [list(tensor.values) for tensor in asked.inputs] == [
        ["你好".encode(), b""],
        [True],
        [1, -2],
    ]
    assert asked.request_id == "x"


@pytest.mark.parametrize(
    ("head", "tail", "size"),
    [
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": 9}}]}, b"abc", None),
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": -1}}]}, b"abc", None),
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": True}}]}, b"a", None),
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": 3}}]}, b"abc", None),
        (
            {"inputs": [{**TEXT, "parameters": {"binary_data_size": 6}}]},
            b"\xff\xff\xff\xffab",
            None,
        ),
        ({"inputs": [{**TEXT, "data": ["a"]}]}, b"left over", None),
        ({"inputs": [{**TEXT, "data": ["a"], "parameters": {"binary_data_size": 0}}]}, b"", None),
        ({"inputs": [{**TEXT, "data": ["a", "b"]}]}, b"", None),
        ({"inputs": [{**TEXT, "data": [1]}]}, b"", None),
        ({"inputs": [{**TEXT, "shape": [-1], "data": ["a"]}]}, b"", None),
        ({"inputs": [{**TEXT, "shape": [2**39] * 8, "data": ["a"]}]}, b"", None),
        ({"inputs": [{**TEXT, "datatype": "FP16", "data": [1.0]}]}, b"", None),
        ({"inputs": [{**TEXT, "datatype": "X", "data": [1.0]}]}, b"", None),
        ({"inputs": [{**TEXT, "datatype": "UINT32", "data": [-1]}]}, b"", None),
        ({"inputs": [{**TEXT, "datatype": "UINT32", "data": [1.5]}]}, b"", None),
        ({"inputs": [{**TEXT, "datatype": "UINT32", "data": [True]}]}, b"", None),
        ({"inputs": [{**TEXT, "name": "x" * 257, "data": ["a"]}]}, b"", None),
        ({"inputs": "x"}, b"", None),
        ({"inputs": [{**TEXT, "data": ["a"]}], "outputs": [1]}, b"", None),
        ({"inputs": [{**TEXT, "data": ["a"]}], "id": 5}, b"", None),
        ([], b"", None),
        ({}, b"", "0"),
        ({}, b"", "-1"),
        ({}, b"", "999"),
        ({}, b"", "9" * 30),
    ],
)
def test_what_does_not_fit_is_refused(head, tail, size):
    """Catches a read beyond the body, a wrong count, and memory taken by a claim."""
    content, length = packed(head, tail)
    with pytest.raises(GlimtError):
        read_infer(content, size or length)


@given(st.binary(max_size=200), st.integers(0, 220))
def test_no_bytes_make_it_crash(content, size):
    """Catches an exception that nobody expects, which would be our 500."""
    try:
        read_infer(content, str(size))
    except GlimtError:
        return


@pytest.mark.parametrize("is_binary", [True, False])
def test_what_is_written_is_read_again(is_binary):
    """Catches a reply in another form than its header tells."""
    asked = read({**TEXT, "data": ["a"]}, parameters={"binary_data_output": is_binary})
    tensors = [
        Tensor("s", "BYTES", (2,), ["猫".encode(), b""]),
        Tensor("n", "UINT32", (1, 2), [1, 2**32 - 1]),
        Tensor("f", "FP32", (1,), [-0.5]),
    ]
    content, size = write_infer({"model_name": "m"}, tensors, asked)
    assert (size is None) is not is_binary
    told = json.loads(content[:size])
    again = read_infer(
        json.dumps({"inputs": told["outputs"]}).encode() + content[len(content[:size]) :],
        str(len(json.dumps({"inputs": told["outputs"]}).encode())),
    )
    assert [list(t.values) for t in again.inputs] == [list(t.values) for t in tensors]


def test_one_output_may_be_binary_alone():
    """Catches a flag of one output that counts for all."""
    outputs = [{"name": "s", "parameters": {"binary_data": True}}, {"name": "n"}]
    asked = read({**TEXT, "data": ["a"]}, outputs=outputs)
    assert (asked.is_output_binary("s"), asked.is_output_binary("n")) == (True, False)
