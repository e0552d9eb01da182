"""A reference answers as the model does, and its file loses nothing."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.evaluate.gates import Setting
from glimt.evaluate.probes import drawn_probes
from glimt.evaluate.recording import (
    Recording,
    RecordingSize,
    from_file,
    record,
    repeat,
    to_bytes,
)
from glimt.evaluate.stages import ROWS, picked
from glimt.llm import LLM
from glimt.types import SamplingParams

SIZE = RecordingSize(num_probes=9, num_tokens=0, max_tokens=6, num_staged=1)


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp(request.param)
    write_noise_model(folder, request.param)
    off = {"enable_prefix_cache": False, "feature_cache_bytes": 0}
    return LLM(str(folder), dtype="float32", num_blocks=256, **off)


def test_the_reference_answers_as_anyone_is_answered(llm):
    """Catches a greedy choice of its own, and answers that go on beyond their end."""
    traces = list(record(llm, drawn_probes(1), SIZE))
    assert len(traces) == 9
    for trace in traces:
        sampling = SamplingParams(temperature=0, max_tokens=6)
        answer = llm.chat(trace.probe.messages, sampling).token_ids
        stops = llm.engine.opened.processor.stop_token_ids
        assert tuple(t for t in trace.token_ids if t not in stops) == answer
        assert trace.logits.shape == (len(trace.token_ids), llm.engine.opened.config.vocab_size)


def test_a_repetition_is_the_same_to_the_last_bit(llm):
    """Catches batches that are cut differently, so that sums come in another order."""
    traces = list(record(llm, drawn_probes(1), SIZE))
    again = list(repeat(llm, traces))
    assert [trace.token_ids for trace in again] == [trace.token_ids for trace in traces]
    for first, second in zip(traces, again, strict=True):
        assert torch.equal(first.logits, second.logits)
        assert first.stages.keys() == second.stages.keys()
        assert all(torch.equal(rows, second.stages[name]) for name, rows in first.stages.items())
    assert [bool(trace.stages) for trace in traces] == [True] + [False] * 8


def test_the_last_stage_is_what_was_sampled_from(llm):
    """Catches hooks that watch another call than the answer's own."""
    trace = next(record(llm, drawn_probes(1), SIZE))
    assert torch.equal(trace.stages["logits"], trace.logits)


def test_recording_goes_on_until_there_are_enough_tokens(llm):
    """Catches a reference that stops at its number of probes with hardly a token."""
    wanted = RecordingSize(num_probes=1, num_tokens=40, max_tokens=6, num_staged=0)
    traces = list(record(llm, drawn_probes(1), wanted))
    assert sum(len(trace.token_ids) for trace in traces) >= 40
    most = RecordingSize(num_probes=1, num_tokens=9999, most_probes=5, num_staged=2, max_tokens=2)
    assert len(list(record(llm, drawn_probes(1), most))) == 5


def test_as_many_probes_are_asked_as_were_asked_for(llm):
    """Catches --probes that is cut down to a number that nobody gave."""
    size = RecordingSize(num_probes=6, num_tokens=0, most_probes=5, num_staged=0, max_tokens=1)
    assert len(list(record(llm, drawn_probes(1), size))) == 6


def test_a_file_holds_all_of_it(llm, tmp_path):
    """Catches a probe without its pictures, and logits in fewer bits."""
    traces = tuple(record(llm, drawn_probes(1), SIZE))
    setting = Setting(
        family="f", model="m", device="cpu", dtype="float32", kv_dtype="auto",
        quant="none", quant_head="none", quant_tower="none", isa="none",
    )  # fmt: skip
    path = Path(tmp_path / "r.safetensors")
    path.write_bytes(to_bytes(Recording(setting, traces, {"torch": "2"})))
    found = from_file(path)
    assert (found.setting, found.facts) == (setting, {"torch": "2"})
    assert found.num_tokens == sum(len(trace.token_ids) for trace in traces)
    for ours, theirs in zip(found.traces, traces, strict=True):
        assert (ours.probe, ours.token_ids) == (theirs.probe, theirs.token_ids)
        assert torch.equal(ours.logits, theirs.logits)
        assert list(ours.stages) == list(theirs.stages)
        assert all(torch.equal(ours.stages[name], rows) for name, rows in theirs.stages.items())


def test_drawn_probes_are_the_same_everywhere_and_each_its_own():
    """Catches a seed that is not used, and pictures that repeat."""
    first, again = (list(islice(drawn_probes(5), 24)) for _ in range(2))
    assert first == again
    assert len({probe.images for probe in first if probe.images}) == 21
    assert sum(not probe.images for probe in first) == 3
    assert first != list(islice(drawn_probes(6), 24))


def test_rows_are_spread_over_the_whole_output():
    """Catches a stage of which only the beginning is looked at."""
    output = torch.arange(1000.0).reshape(10, 100, 1)
    rows = picked(output)[:, 0].tolist()
    assert (len(rows), rows[0], rows[-1]) == (ROWS, 0.0, 999.0)
    assert max(b - a for a, b in pairwise(rows)) < 20
    assert picked(torch.ones(3, 2)).shape == (3, 2)
