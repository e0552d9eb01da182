"""What Triton's clients may ask of the server and its model: names, tensors, limits, statistics."""

from __future__ import annotations

from typing import Any

from glimt import __version__
from glimt.server.app import Context
from glimt.server.metrics import FAILURES, FINISHED
from glimt.server.triton_body import FLAGS

_EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "statistics"]
_INPUTS = (
    ("text_input", "BYTES", 1),
    ("image", "BYTES", -1),
    ("sampling_parameters", "BYTES", 1),
    *((name, "BOOL", 1) for name in FLAGS),
)
_OUTPUTS = (
    ("text_output", "BYTES", -1),
    ("finish_reason", "BYTES", -1),
    ("cumulative_logprob", "FP32", -1),
    ("logprobs", "BYTES", -1),
    ("num_input_tokens", "UINT32", 1),
    ("num_output_tokens", "UINT32", -1),
)
_SERVER_OF_MINDIE = "MindIE Server"


def server_metadata(context: Context) -> dict[str, Any]:
    """`GET /v2`."""
    if context.config.profile != "mindie":
        return {"name": "glimt", "version": __version__, "extensions": _EXTENSIONS}
    engine = context.service.host.engine.engine
    extensions = {
        "max_iter_times": _most_output(context),
        "prefill_policy_type": 0,
        "decode_policy_type": 0,
        "max_prefill_batch_size": engine.config.max_num_seqs,
        "max_prefill_tokens": engine.config.max_num_batched_tokens,
    }
    return {"name": _SERVER_OF_MINDIE, "version": __version__, "extensions": extensions}


def model_metadata(context: Context, model: str) -> dict[str, Any]:
    """`GET /v2/models/{m}`."""
    if context.config.profile == "mindie":
        ids = {"shape": [-1], "datatype": "UINT32"}
        inputs, outputs = [{"name": "input0", **ids}], [{"name": "output0", **ids}]
        platform = _SERVER_OF_MINDIE
        return {"name": model, "platform": platform, "inputs": inputs, "outputs": outputs}
    return {
        "name": model,
        "versions": ["1"],
        "platform": "glimt",
        "inputs": [{"name": n, "datatype": t, "shape": [s]} for n, t, s in _INPUTS],
        "outputs": [{"name": n, "datatype": t, "shape": [s]} for n, t, s in _OUTPUTS],
    }


def model_config(context: Context, model: str) -> dict[str, Any]:
    """`GET /v2/models/{m}/config`: Triton's fields and MindIE's."""
    engine = context.service.host.engine.engine
    cache_gb = engine.memory.kv / 2**30
    return {
        "name": model,
        "platform": "glimt",
        "backend": "glimt",
        "max_batch_size": 0,
        "input": [
            {"name": n, "data_type": _config_type(t), "dims": [s], "optional": n != "text_input"}
            for n, t, s in _INPUTS
        ],
        "output": [{"name": n, "data_type": _config_type(t), "dims": [s]} for n, t, s in _OUTPUTS],
        "model_transaction_policy": {"decoupled": True},
        "model_name": model,
        "input_datatype": "UINT32",
        "output_datatype": "UINT32",
        "max_seq_len": engine.inputs.limits.max_model_len,
        "npu_mem_size": round(cache_gb, 3),
        "cpu_mem_size": 0,
        "world_size": 1,
        "model_weight_path": engine.config.model.rstrip("/").rpartition("/")[2],
        "model_instance_type": "Standard",
    }


def _config_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _most_output(context: Context) -> int:
    limit = context.service.host.engine.engine.inputs.limits.max_model_len
    return context.config.max_output_tokens or limit


def statistics(context: Context) -> dict[str, Any]:
    """`GET …/stats`: of all requests since the start, whatever protocol they came by."""
    total = context.metrics.total
    finished = sum(
        total("vllm:request_success_total", finished_reason=reason) for reason in FINISHED
    )
    failed = sum(total("glimt:request_failures_total", reason=reason) for reason in FAILURES)
    count = int(total("vllm:e2e_request_latency_seconds_count"))

    def entry(name: str) -> dict[str, int]:
        return {"count": count, "ns": int(total(f"vllm:{name}_sum") * 1e9)}

    nothing = {"count": count, "ns": 0}
    return {
        "model_stats": [
            {
                "name": context.model_name,
                "version": "1",
                "last_inference": int(context.metrics.last_finish_s * 1000),
                "inference_count": int(finished),
                "execution_count": count,
                "inference_stats": {
                    "success": entry("e2e_request_latency_seconds"),
                    "fail": {"count": int(failed), "ns": 0},
                    "queue": entry("request_queue_time_seconds"),
                    "compute_input": nothing,
                    "compute_infer": entry("request_inference_time_seconds"),
                    "compute_output": nothing,
                },
                "batch_stats": [],
            }
        ]
    }
