"""MindIE's config.json: what it becomes, what is refused, and that all else is said once."""

from __future__ import annotations

import copy
import json

import pytest

from glimt.config import EngineConfig
from glimt.errors import ConfigError
from glimt.server.config import ServerConfig
from glimt.server.mindie_config import read_mindie_config

# As MindIE ships it for GLM-4v, but for the paths.
FILE = {
    "Version": "1.0.0",
    "LogConfig": {"logLevel": "Warn", "logFileSize": 20},
    "ServerConfig": {
        "ipAddress": "127.0.0.1", "managementIpAddress": "127.0.0.2", "port": 1025,
        "managementPort": 1026, "metricsPort": 1027, "allowAllZeroIpListening": False,
        "maxLinkNum": 100, "httpsEnabled": False, "fullTextEnabled": True,
        "tlsCert": "security/certs/server.pem", "tlsPk": "security/keys/server.key.pem",
        "inferMode": "standard", "interCommTLSEnabled": True, "openAiSupport": "vllm",
        "tokenTimeout": 60, "e2eTimeout": 300, "maxRequestLength": 10,
    },
    "BackendConfig": {
        "backendName": "mindieservice_llm_engine", "modelInstanceNumber": 1,
        "npuDeviceIds": [[0]], "tokenizerProcessNumber": 3, "multiNodesInferEnabled": False,
        "ModelDeployConfig": {
            "maxSeqLen": 2560, "maxInputTokenLen": 2048, "truncation": False,
            "ModelConfig": [{
                "modelInstanceType": "Standard", "modelName": "glm4v",
                "modelWeightPath": "/data/glm-4v-9b", "worldSize": 1, "cpuMemSize": 5,
                "npuMemSize": 2, "backendType": "atb", "trustRemoteCode": False,
            }],
        },
        "ScheduleConfig": {
            "templateType": "Standard", "cacheBlockSize": 128, "maxPrefillTokens": 8192,
            "prefillPolicyType": 0, "decodePolicyType": 0, "maxBatchSize": 50,
            "maxIterTimes": 512, "maxPreemptCount": 0, "supportSelectBatch": False,
        },
    },
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def reading(changes=(), environment=None):
        content = copy.deepcopy(FILE)
        for path, value in changes:
            *parents, key = path
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[key] = value
        path = tmp_path / "conf" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return read_mindie_config(path, environment or {})

    return reading


SERVER, BACKEND = ("ServerConfig",), ("BackendConfig",)
DEPLOY = (*BACKEND, "ModelDeployConfig")
MODEL = (*DEPLOY, "ModelConfig", 0)
SCHEDULE = (*BACKEND, "ScheduleConfig")


def test_the_file_becomes_settings(read):
    """Catches a key that is read into the wrong place, or in the wrong unit."""
    settings = read()
    assert settings.engine == {
        "model": "/data/glm-4v-9b", "max_model_len": 2560, "kv_bytes": 2 * 2**30,
        "block_size": 128, "max_num_batched_tokens": 8192, "max_num_seqs": 50,
    }  # fmt: skip
    assert settings.server == {
        "host": "127.0.0.1", "port": 1025, "management_port": 1026, "full_text_streams": True,
        "token_timeout_s": 60.0, "request_timeout_s": 300.0, "max_body_bytes": 10 * 2**20,
        "num_decoders": 3, "served_model_names": ("glm4v",), "max_output_tokens": 512,
        "max_choices": 128, "max_prompt_tokens": 2048, "max_waiting": 250,
    }  # fmt: skip
    assert settings.log_level == "warning"
    ServerConfig(**settings.server)
    EngineConfig(**settings.engine)


def test_what_has_no_effect_is_said_once(read):
    """Catches a key that is dropped in silence, or said to be dropped and used."""
    (last,) = [note for note in read().notes if note.startswith("without effect here: ")]
    said = last.removeprefix("without effect here: ").split(", ")
    assert len(said) == len(set(said))
    expected = {
        "tlsCert",
        "tlsPk",
        "interCommTLSEnabled",
        "openAiSupport",
        "backendName",
        "cpuMemSize",
        "backendType",
        "maxPreemptCount",
        "supportSelectBatch",
        "logFileSize",
    }
    assert set(said) == expected
    assert any(note.startswith("managementIpAddress") for note in read().notes)


def test_keys_that_are_missing_have_mindies_defaults(tmp_path):
    """Catches our own defaults for a file that was written for MindIE's."""
    path = tmp_path / "config.json"
    model = {"modelName": "m", "modelWeightPath": "w"}
    deploy = {"ModelConfig": [model]}
    path.write_text(
        json.dumps(
            {
                "ServerConfig": {"httpsEnabled": False},
                "BackendConfig": {"ModelDeployConfig": deploy},
            }
        )
    )
    settings = read_mindie_config(path, {})
    assert settings.server["port"] == 1025
    assert settings.server["max_output_tokens"] == 512
    assert settings.engine["max_model_len"] == 2560
    assert settings.engine["kv_bytes"] is None if "kv_bytes" in settings.engine else True
    assert settings.server["max_waiting"] == 3 * 1000 - 200


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*SERVER, "port"), "1025", "port"),
        ((*SERVER, "port"), 80, "port"),
        ((*SERVER, "ipAddress"), "0.0.0.0", "allowAllZeroIpListening"),
        ((*SERVER, "maxLinkNum"), 0, "maxLinkNum"),
        ((*SERVER, "maxLinkNum"), True, "maxLinkNum"),
        ((*SERVER, "inferMode"), "dmi", "inferMode"),
        ((*SERVER, "tokenTimeout"), 3601, "tokenTimeout"),
        ((*SERVER, "maxRequestLength"), 101, "maxRequestLength"),
        ((*SERVER, "httpsEnabled"), "no", "httpsEnabled"),
        ((*BACKEND, "modelInstanceNumber"), 2, "modelInstanceNumber"),
        ((*BACKEND, "multiNodesInferEnabled"), True, "multiNodesInferEnabled"),
        ((*BACKEND, "npuDeviceIds"), [[0, 1]], "worldSize"),
        ((*BACKEND, "npuDeviceIds"), [0], "npuDeviceIds"),
        ((*DEPLOY, "truncation"), 1, "truncation"),
        ((*DEPLOY, "truncation"), True, "truncation"),
        ((*DEPLOY, "maxSeqLen"), 0, "maxSeqLen"),
        ((*DEPLOY, "ModelConfig"), [], "ModelConfig"),
        ((*DEPLOY, "ModelConfig"), "x", "ModelConfig"),
        ((*MODEL, "trustRemoteCode"), True, "trustRemoteCode"),
        ((*MODEL, "modelInstanceType"), "StandardMock", "modelInstanceType"),
        ((*MODEL, "npuMemSize"), -2, "npuMemSize"),
        ((*SCHEDULE, "cacheBlockSize"), 100, "cacheBlockSize"),
        ((*SCHEDULE, "maxPrefillTokens"), 100, "maxPrefillTokens"),
        ((*SCHEDULE, "prefillPolicyType"), 1, "prefillPolicyType"),
        ((*SCHEDULE, "maxN"), 129, "maxN"),
        (SERVER, [], "ServerConfig"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(read, path, value, said):
    """Catches a wish that is dropped, and a value that fails far from the file."""
    with pytest.raises(ConfigError, match=said):
        read([(path, value)])


def test_all_mistakes_are_told_at_once(read):
    """Catches a file that is mended one start at a time."""
    with pytest.raises(ConfigError) as error:
        read([((*SERVER, "port"), 0), ((*SCHEDULE, "maxBatchSize"), "many")])
    assert len(error.value.problems) == 2


def test_preemption_needs_memory_to_swap_to(read):
    """Catches MindIE's own rule."""
    changes = [((*MODEL, "cpuMemSize"), 0), ((*SCHEDULE, "maxPreemptCount"), 1)]
    with pytest.raises(ConfigError, match="cpuMemSize"):
        read(changes)


def test_https_is_mindies_default_and_needs_its_files(read, tmp_path):
    """Catches plain HTTP for a file that asks for TLS, and an encrypted key taken for another."""
    on = [((*SERVER, "httpsEnabled"), True)]
    folder = tmp_path / "security"
    for name in ("certs/server.pem", "keys/server.key.pem", "ca/ca.pem"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    client = [((*SERVER, "tlsCaPath"), "security/ca"), ((*SERVER, "tlsCaFile"), ["ca.pem"])]
    server = read([*on, *client]).server
    assert server["tls_cert"] == folder / "certs/server.pem"
    assert server["tls_ca"] == folder / "ca/ca.pem"
    for key, value in (("tlsCert", ""), ("tlsPkPwd", "x"), ("tlsCrlFiles", ["x"])):
        with pytest.raises(ConfigError, match="tls"):
            read([*on, ((*SERVER, key), value)])


def test_the_environment_is_read(read):
    """Catches a container's address, or MindIE's list of hosts, being forgotten."""
    told = read(
        environment={
            "MIES_CONTAINER_IP": "10.0.0.7",
            "ALLOWED_MEDIA_DOMAINS_ENV": "a.example, b.example",
            "ALLOWED_MEDIA_URLS_ENV": "https://c.example/pictures",
        }
    ).server
    assert told["host"] == "10.0.0.7"
    assert told["allowed_media_domains"] == ("a.example", "b.example", "c.example")


def test_one_port_for_both_has_no_management(read):
    """Catches routes that stop the server on the public port."""
    settings = read([((*SERVER, "managementPort"), 1025)])
    assert "management_port" not in settings.server
    assert any(note.startswith("managementPort") for note in settings.notes)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '"x"', "null", "[" * 100000])
def test_what_is_no_such_file_is_told(tmp_path, content):
    """Catches a traceback."""
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="config"):
        read_mindie_config(path, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_mindie_config(tmp_path / "none.json", {})
