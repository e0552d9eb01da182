"""KServe v2 tensors, in JSON and in the binary form: bytes to values and back. Knows no model.

Sources: triton-inference-server/server, docs/protocol/extension_binary_data.md;
kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glimt.errors import RequestError
from glimt.server.replying import one_line
from glimt.server.strict_json import parse_json

HEADER = "Inference-Header-Content-Length"
_PACKED = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "BOOL": "?",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d", "FP16": "e",
}  # fmt: skip
_WHOLE = tuple(name for name in _PACKED if "INT" in name)
DATATYPES = (*_PACKED, "BYTES")
_MOST_TENSORS, _MOST_DIMS = 64, 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor, flat and row-major. BYTES values are bytes; the others Python's numbers."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, read. wanted: outputs by name, and whether each is to be binary."""

    request_id: str | None
    parameters: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    wanted: Mapping[str, bool]
    is_binary: bool

    def is_output_binary(self, name: str) -> bool:
        """What was said of this output, else of all."""
        return self.wanted.get(name, self.is_binary)


# --- reading ---------------------------------------------------------------------------------


def read_infer(content: bytes, header_length: str | None) -> InferRequest:
    """A request's body. Raises RequestError or HttpFailure saying what is wrong."""
    size = _header_size(content, header_length)
    value = parse_json(content[:size])
    if not isinstance(value, dict):
        raise RequestError("body", "must be a JSON object")
    request_id = value.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("id", "must be a text")
    parameters = _object(value, "parameters", "parameters")
    rest = memoryview(content)[size:]
    inputs = tuple(_tensors(_list(value, "inputs"), rest))
    outputs = _list(value, "outputs") if value.get("outputs") is not None else []
    is_binary = _flag(parameters, "binary_data_output", False)
    return InferRequest(
        request_id or None, parameters, inputs, dict(_wanted(outputs, is_binary)), is_binary
    )


def _header_size(content: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(content)
    if not header_length.isdecimal() or len(header_length) > 12:
        raise RequestError(HEADER, "must be a number of bytes")
    size = int(header_length)
    if size == 0:
        raise RequestError(HEADER, "is 0; a raw body without JSON is not taken")
    if size > len(content):
        raise RequestError(HEADER, f"is {size}, but the body has {len(content)} bytes")
    return size


def _tensors(inputs: list[Any], rest: memoryview) -> Iterator[Tensor]:
    """Every input in order; what is behind the JSON is handed out in that order too."""
    if len(inputs) > _MOST_TENSORS:
        raise RequestError("inputs", f"has more than {_MOST_TENSORS} tensors")
    at = 0
    for i, raw in enumerate(inputs):
        where = f"inputs[{i}]"
        if not isinstance(raw, dict):
            raise RequestError(where, "must be an object")
        parameters = _object(raw, "parameters", f"{where}.parameters")
        size = parameters.get("binary_data_size")
        if size is None:
            yield _tensor_of_json(raw, parameters, where)
            continue
        if not _is_count(size) or at + size > len(rest):
            said = f"{len(rest) - at} bytes are left behind the JSON"
            raise RequestError(f"{where}.parameters.binary_data_size", f"is wrong: {said}")
        if "data" in raw:
            raise RequestError(where, "has both data and binary_data_size")
        yield _tensor_of_bytes(raw, parameters, bytes(rest[at : at + size]), where)
        at += size
    if at != len(rest):
        raise RequestError("body", f"has {len(rest) - at} bytes that belong to no input")


def _head(raw: Mapping[str, Any], where: str) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = raw.get("name"), raw.get("datatype"), raw.get("shape")
    if not isinstance(name, str) or not 1 <= len(name) <= 256:
        raise RequestError(f"{where}.name", "must be a text of 1 to 256 characters")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise RequestError(f"{where}.datatype", f"must be BYTES or one of {', '.join(_PACKED)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(map(_is_count, shape)):
        raise RequestError(f"{where}.shape", "must be a list of whole numbers from 0")
    return name, datatype, tuple(shape)


def _tensor_of_json(raw: Mapping[str, Any], parameters: Mapping[str, Any], where: str) -> Tensor:
    name, datatype, shape = _head(raw, where)
    if datatype == "FP16":
        raise RequestError(f"{where}.datatype", "FP16 has no JSON form; send it binary")
    values = list(_flat(raw.get("data"), f"{where}.data"))
    _check_count(len(values), shape, where)
    read = [_json_value(each, datatype, f"{where}.data") for each in values]
    return Tensor(name, datatype, shape, read, parameters)


def _flat(data: Any, where: str) -> Iterator[Any]:
    if not isinstance(data, list):
        raise RequestError(where, "must be a list")
    for each in data:
        if isinstance(each, list):
            yield from _flat(each, where)
        else:
            yield each


def _json_value(value: Any, datatype: str, where: str) -> Any:
    if datatype == "BYTES":
        if not isinstance(value, str):
            raise RequestError(where, "must hold texts")
        return value.encode("utf-8", "surrogatepass")
    if datatype == "BOOL":
        if not isinstance(value, bool):
            raise RequestError(where, "must hold true and false")
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (datatype in _WHOLE and not isinstance(value, int)):
        raise RequestError(where, f"must hold numbers of {datatype}")
    try:
        struct.pack(f"<{_PACKED[datatype]}", value)
    except (struct.error, OverflowError) as error:
        raise RequestError(where, f"holds a number that {datatype} has not") from error
    return value


def _tensor_of_bytes(
    raw: Mapping[str, Any], parameters: Mapping[str, Any], content: bytes, where: str
) -> Tensor:
    name, datatype, shape = _head(raw, where)
    if datatype == "BYTES":
        values: list[Any] = list(_elements(content, where))
    else:
        code = _PACKED[datatype]
        count, left = divmod(len(content), struct.calcsize(f"<{code}"))
        if left:
            raise RequestError(where, f"has {left} bytes too many for {datatype}")
        values = list(struct.unpack(f"<{count}{code}", content))
    _check_count(len(values), shape, where)
    return Tensor(name, datatype, shape, values, parameters)


def _elements(content: bytes, where: str) -> Iterator[bytes]:
    """BYTES: four bytes of length, little-endian, before each element."""
    at = 0
    while at < len(content):
        if at + 4 > len(content):
            raise RequestError(where, "ends within an element's length")
        (size,) = struct.unpack_from("<I", content, at)
        at += 4 + size
        if at > len(content):
            raise RequestError(where, "ends within an element")
        yield content[at - size : at]


def _check_count(count: int, shape: tuple[int, ...], where: str) -> None:
    if math.prod(shape) != count:
        raise RequestError(f"{where}.shape", f"is {list(shape)}, but there are {count} values")


def _wanted(outputs: list[Any], is_binary: bool) -> Iterator[tuple[str, bool]]:
    for i, raw in enumerate(outputs[: _MOST_TENSORS + 1]):
        where = f"outputs[{i}]"
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise RequestError(where, "must be an object with a name")
        parameters = _object(raw, "parameters", f"{where}.parameters")
        if parameters.get("classification"):
            raise RequestError(f"{where}.parameters.classification", "is not supported")
        yield raw["name"], _flag(parameters, "binary_data", is_binary)


def _object(value: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = value.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RequestError(where, "must be an object")
    return found


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise RequestError(key, "must be a list of tensors")
    return found


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    found = parameters.get(key, default)
    if not isinstance(found, bool):
        raise RequestError(f"parameters.{key}", "must be true or false")
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


# --- writing ---------------------------------------------------------------------------------


def write_infer(
    head: Mapping[str, Any], outputs: Sequence[Tensor], asked: InferRequest
) -> tuple[bytes, int | None]:
    """A reply's body, and the bytes of its JSON where binary tensors follow it.

    outputs: of any shape, their values flat: [prod(shape)]
    """
    shown, tail = [], b""
    for tensor in outputs:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if asked.is_output_binary(tensor.name):
            content = _packed(tensor)
            entry["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            entry["data"] = _as_json(tensor)
        shown.append(entry)
    content = one_line({**head, "outputs": shown})
    is_binary = any("parameters" in entry for entry in shown)
    return content + tail, len(content) if is_binary else None


def _packed(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(each)) + each for each in tensor.values)
    return struct.pack(f"<{len(tensor.values)}{_PACKED[tensor.datatype]}", *tensor.values)


def _as_json(tensor: Tensor) -> list[Any]:
    if tensor.datatype == "BYTES":
        return [each.decode("utf-8", "replace") for each in tensor.values]
    return list(tensor.values)
