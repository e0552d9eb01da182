"""`glimt bench synthetic` end to end on tiny widths, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from glimt.bench import synthetic
from glimt.bench.synthetic import SyntheticJob
from glimt.cli import app
from glimt.commands import running
from glimt.commands.bench import parse_batches
from glimt.demo.noise import write_noise_model
from glimt.errors import ConfigError
from glimt.kernels import limits
from glimt.synthetic import SyntheticName


@pytest.fixture(autouse=True)
def small_meter(monkeypatch):
    """The limits' values do not matter here; 768 MiB of memory for them would."""
    meter = limits.LimitMeter(1, num_bytes=2**20)
    monkeypatch.setattr(synthetic, "LimitMeter", lambda threads, num_bytes: meter)


def bench(*arguments: object):
    return CliRunner().invoke(app, ["bench", "synthetic", *map(str, arguments)])


SHORT = ("--repeats", 1, "--output-len", 4, "--batch", "1,3")


def test_the_report_has_every_figure(folder, tmp_path):
    """Catches a figure that is measured and not reported, and a file unlike what is printed."""
    out = tmp_path / "report.json"
    forms = ("--quant", "int8", "--quant-head", "none", "--quant-tower", "w8a8")
    forms += ("--kv-dtype", "int8")
    ran = bench(folder, *SHORT, "--layers", 1, *forms, "--json", "--out", out)
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    assert json.loads(out.read_text(encoding="utf-8")) == data
    assert data.keys() == {
        "command", "machine", "model", "settings", "limits", "costs", "memory", "load_s",
        "fresh", "again", "decoding",
    }  # fmt: skip
    assert data["machine"].keys() >= {"processor", "numa_nodes", "memory_bytes", "versions"}
    assert data["model"]["layers"] == 1
    quantised = [data["model"][name] for name in ("quant", "quant_head", "quant_tower")]
    assert quantised == ["int8", "none", "w8a8"]
    assert data["model"]["kv_dtype"] == "int8"
    kv_heads = {"glm4v_9b": 2, "visualglm": 4}[data["model"]["family"]]
    assert data["costs"]["kv_bytes"] == 2 * kv_heads * (16 + 4), "one layer, 16 dims a head"
    assert data["settings"]["prompt_tokens"] == data["settings"]["image_tokens"] + 32
    assert data["memory"]["plan"]["total"] > data["memory"]["plan"]["kv"] > 0
    assert data["limits"]["start"].keys() == {"read_bytes", "bf16_ops", "int8_ops"}
    for part in ("fresh", "again"):
        assert data[part].keys() == {"ttft", "image", "prefill", "cached_tokens"}
    assert [one["batch"] for one in data["decoding"]] == [1, 3]
    for one in data["decoding"]:
        assert one.keys() == {
            "batch", "tpot", "tokens_per_s", "mbu", "mbu_with_kv", "context_tokens",
        }  # fmt: skip
        assert one["tpot"]["num_steady"] + one["tpot"]["num_left_out"] == len(one["tpot"]["all_s"])


def test_a_picture_seen_before_costs_no_tower(folder):
    """Catches a 'fresh' request that finds its picture cached, or the other way round."""
    ran = bench(folder, *SHORT, "--json")
    data = json.loads(ran.stdout)
    assert all(sample["seconds"] > 0 for sample in data["fresh"]["image"]["all_s"])
    assert all(sample["seconds"] == 0 for sample in data["again"]["image"]["all_s"])
    assert data["fresh"]["cached_tokens"] < 10, "no more than the template's first tokens"


@pytest.mark.parametrize(("quant", "math"), [("int4", "int8"), ("int4-a16", "bf16")])
def test_a_form_that_rounds_activations_is_held_against_int8(folder, quant, math):
    """Catches the limit chosen by what a form is called."""
    data = json.loads(bench(folder, *SHORT, "--quant", quant, "--json").stdout)
    assert data["limits"]["math"] == (math if data["limits"]["is_native"] else "bf16")


def test_people_get_tables(folder):
    """Catches a table that needs a sample which was left out."""
    ran = bench(folder, *SHORT)
    assert ran.exit_code == 0, ran.stderr
    for said in ("picture", "prefill", "TTFT", "TPOT", "batch 3", "KV cache", "TFLOP/s", "peak"):
        assert said in ran.stdout


REFUSED = [
    (("glm-5",), "'glm-5' is neither a folder nor one of"),
    (("glm-4v-9b", "--layers", 41), "layers is 41, but the published model has 40"),
    (("glm-4v-9b", "--layers", 0), "layers is '0'"),
    (("glm-4v-9b", "--batch", "1,x"), "batch: is '1,x'"),
    (("glm-4v-9b", "--batch", "0"), "batch: is '0'"),
    (("glm-4v-9b", "--output-len", 1), "output_len is 1; at least 2 is needed"),
    (("glm-4v-9b", "--repeats", 0), "repeats is 0"),
    (("glm-4v-9b", "--threads", 0), "num_threads is 0"),
    (("glm-4v-9b", "--threads", 100_000), "num_threads is 100000; a whole number from 1 to 1024"),
    (("glm-4v-9b", "--dtype", "int3"), "dtype 'int3' is unknown"),
    (("glm-4v-9b", "--device", "abacus"), "'abacus' is unknown"),
    (("glm-4v-9b", "--quant", "no-such-form"), "no-such-form"),
    (("glm-4v-9b", "--memory-limit", "3G"), "language 15.2 GiB"),
    (("glm-4v-9b", "--out", "/dev/null/x.json"), "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_run_is_refused_in_plain_words(arguments, said):
    """Catches a traceback, and an option that is found wrong only after minutes."""
    ran = bench(*arguments)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    as_data = bench(*arguments, "--json")
    assert said in json.loads(as_data.stdout)["error"]["message"]


def test_rows_that_do_not_fit_are_refused(tmp_path):
    """Catches a batch that preempts itself all the time and is timed as if it were decoding."""
    write_noise_model(tmp_path, "glm4v_9b")
    name = SyntheticName(str(tmp_path))
    with pytest.raises(ConfigError, match="exceed the context of 1024"):
        synthetic.run(SyntheticJob(name=name, output_len=1000))


def test_batches_are_read_from_one_text():
    """Catches a batch of one when several were asked for."""
    assert parse_batches("1, 2,10") == (1, 2, 10)


def test_verbose_tells_the_memory_plan(tmp_path):
    """Catches an option that is accepted and dropped."""
    write_noise_model(tmp_path, "glm4v_9b")
    asked = ("-p", "hi", "--max-tokens", "2")
    limit = ("--memory-limit", "2G")
    told = CliRunner().invoke(
        app, ["generate", "--model", str(tmp_path), *asked, *limit, "--verbose"]
    )
    assert told.exit_code == 0, told.stderr
    for said in ("weights, vision: ", "KV cache: ", "planned in all: ", "limit: 2.0 GiB"):
        assert said in told.stderr
    assert "KV cache" not in told.stdout


def test_a_large_models_plan_is_told_at_the_start(tmp_path, monkeypatch):
    """Catches a plan that only those see who ask for it, and one that a quiet run prints."""
    write_noise_model(tmp_path, "glm4v_9b")
    monkeypatch.setattr(running, "_LARGE_BYTES", 1)
    asked = ("generate", "--model", str(tmp_path), "-p", "hi", "--max-tokens", "2")
    told = CliRunner().invoke(app, [*asked, "--memory-limit", "2G"])
    assert "memory planned: " in told.stderr
    assert " of at most 2.0 GiB (weights " in told.stderr
    assert "memory planned" not in CliRunner().invoke(app, [*asked, "--quiet"]).stderr
