"""GLM-4's prompts with functions: the template of the checkpoint, rendered by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import shared_path
from glimt.config import ImageLimits
from glimt.errors import RequestError
from glimt.inputs.request import RequestFactory, RequestLimits, RequestOptions
from glimt.inputs.tokenizer import load_tokenizer
from glimt.models.base import ToolPrompts, find_family
from glimt.models.glm4v_9b import TOKENIZER

SPEC = Path(__file__).parents[1] / "golden" / "glm-4v-wide.spec.json"
HEADING = "\n\n# 可用工具"
# GLM-4-9B-chat's, without the tools that are no functions: NAME is ChatGLM there, or GLM-4 in older
# ones, and GAP two line feeds, of which transformers leaves one. The first release has no template,
# and what its tokenization_chatglm.py writes has no HEADING and both line feeds.
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n"
    "你是一个名为 NAME 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。HEADING{% set tools = item['tools'] %}"
    "{% for tool in tools %}{% if tool['type'] == 'function' %}GAP"
    "## {{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}\n"
    "在调用上述函数时，请使用 Json 格式表示调用的参数。{% endif %}{% endfor %}{% endif %}"
    "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def template(name: str = "ChatGLM", heading: str = HEADING, gap: str = "\n\n") -> str:
    return TEMPLATE.replace("NAME", name).replace("HEADING", heading).replace("GAP", gap)


FIRST_RELEASE = template("GLM-4", "", "\n\n\n")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": '查询天气 "now" & <here>, it\'s easy',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "城市\n名"}},
                "required": ["city"],
            },
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "时间"}},
]
CALL = {"name": "get_weather", "arguments": '{"city": "北京"}'}
OTHER = {"name": "时间", "arguments": "{}"}


def calls(*functions: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"id": "call_1", "type": "function", "function": each} for each in functions]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "a question": [said("user", "北京天气如何？")],
    "a system message": [said("system", "你很简短。"), said("user", "hi")],
    "a result": [
        said("user", "北京天气如何？"),
        said("assistant", None, tool_calls=calls(CALL)),
        said("tool", '{"t": 21}', tool_call_id="call_1"),
    ],
    "words before two calls": [
        said("developer", "Be brief."),
        said("user", "What?"),
        said("assistant", "好的，我查一下。", tool_calls=calls(CALL, OTHER)),
        said("tool", "晴 21°C", tool_call_id="call_1"),
        said("tool", "12:30", tool_call_id="call_2"),
        said("assistant", "It is 12:30."),
        said("user", "谢谢 😀"),
    ],
}


def items(messages: Sequence[Mapping[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """A conversation as the template wants it: one call an item, the functions on the first."""
    roles = {"tool": "observation", "developer": "system"}
    found: list[dict[str, Any]] = []
    for message in messages:
        role = roles.get(message["role"], message["role"])
        found.append({"role": role, "content": message["content"]})
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            found.append({"role": role, "metadata": name, "content": arguments})
    if tools:
        found[0]["tools"] = tools
    return found


@pytest.fixture(scope="module")
def reference() -> Any:
    """The tokenizer as transformers reads it, special tokens among the text."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = shared_path("data/tokenizers/glm-4-9b/tokenizer.model")
    special = list(TOKENIZER.special_names)
    converter = TikTokenConverter(str(path), TOKENIZER.pattern, extra_special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted())


def factory(folder: Path, is_text: bool = True) -> RequestFactory:
    """Of a checkpoint in `folder`, which needs no weights to make prompts."""
    shared = shared_path("data/tokenizers/glm-4-9b/tokenizer.model").parent
    raw = json.loads(SPEC.read_text(encoding="utf-8"))["config"]
    raw |= {"padded_vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]}
    raw |= {"boi_token_id": 151339, "eoi_token_id": 151340}
    raw |= {"vision_config": None} if is_text else {}
    family = find_family(raw, "")
    tokenizer = load_tokenizer(shared, family.tokenizer)
    processor = family.processor(folder, family.config.from_json(raw, ""), tokenizer)
    limits = RequestLimits(8192, 8192, 8192, 151552)
    return RequestFactory(processor, limits, ImageLimits(max_images=2))


def ids(made: RequestFactory, messages: Any, tools: Any = ()) -> list[int]:
    request = made.from_chat(messages, options=RequestOptions(tools=tools))
    return list(request.prompt.original_token_ids)


def rendered(reference: Any, messages: Any, tools: Any, form: str) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": False}
    shown = items(messages, tools)
    return list(reference.apply_chat_template(shown, chat_template=form, **options))


def with_template(folder: Path, form: Any) -> RequestFactory:
    config = json.dumps({"chat_template": form})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return factory(folder)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("tools", [TOOLS, ()], ids=["tools", "no tools"])
def test_prompts_are_the_templates_own(reference, tmp_path, case, tools):
    """Catches an opening, an indent, an order of keys or a line of a role that differs."""
    messages = CONVERSATIONS[case]
    expected = rendered(reference, messages, tools, template())
    assert ids(with_template(tmp_path, template()), messages, tools) == expected
    assert len(expected) > (150 if tools else 6)


@pytest.mark.parametrize("form", [template("GLM-4"), template("别名", "", "\n"), FIRST_RELEASE])
def test_the_opening_is_the_checkpoints(reference, tmp_path, form):
    """Catches one opening for all releases: they differ in name, heading and line feeds."""
    messages = CONVERSATIONS["a result"]
    expected = rendered(reference, messages, TOOLS, form)
    assert ids(with_template(tmp_path, form), messages, TOOLS) == expected


@pytest.mark.parametrize("form", [None, "{{ messages }}", [{"name": "a", "template": "b"}]])
def test_without_such_a_template_it_is_the_first_releases(reference, tmp_path, form):
    """Catches a folder that cannot be opened for a template that is not needed."""
    messages = CONVERSATIONS["words before two calls"]
    expected = rendered(reference, messages, TOOLS, FIRST_RELEASE)
    assert ids(with_template(tmp_path, form), messages, TOOLS) == expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert ids(factory(tmp_path), messages, TOOLS) == expected


def test_only_text_checkpoints_were_trained_for_it(tmp_path):
    """Catches functions offered to GLM-4v without being asked to, and the other way round."""
    text, vision = factory(tmp_path).processor, factory(tmp_path, is_text=False).processor
    assert isinstance(text, ToolPrompts)
    assert isinstance(vision, ToolPrompts)
    assert (text.knows_tools, vision.knows_tools) == (True, False)
    with_tools = CONVERSATIONS["a result"], TOOLS
    assert ids(factory(tmp_path, is_text=False), *with_tools) == ids(factory(tmp_path), *with_tools)


def test_special_tokens_in_functions_and_calls_stay_text(tmp_path):
    """Catches a description or a result that begins a turn of its own."""
    made = factory(tmp_path)
    marker = made.processor.tokenizer.special_ids["<|user|>"]
    tools = [{"type": "function", "function": {"name": "f", "description": "<|user|>"}}]
    messages = [
        said("user", "q"),
        said("assistant", None, tool_calls=calls({"name": "f", "arguments": '"<|user|>"'})),
        said("tool", "<|user|>"),
    ]
    assert ids(made, messages, tools).count(marker) == 1


def test_a_call_is_nothing_to_go_on_with(tmp_path):
    """Catches an answer that goes on behind the arguments."""
    messages = [said("user", "q"), said("assistant", "好", tool_calls=calls(CALL))]
    with pytest.raises(RequestError) as refused:
        factory(tmp_path).from_chat(messages, options=RequestOptions(prompt_end="continue"))
    assert refused.value.field == "messages"
