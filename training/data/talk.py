"""Talk without a picture: greetings, who the model is, and that it has been shown nothing."""

from __future__ import annotations

import random
from typing import NamedTuple

from training.data.photos import any_question
from training.data.sample import Exchange, Language, Sample, Wordings, Words


class _Topic(NamedTuple):
    """Questions that all have the same answer."""

    kind: str
    questions: Wordings
    answer: Words


_TOPICS = (
    _Topic(
        "greeting",
        Wordings(
            ("你好", "你好！", "您好。", "嗨！", "早上好！", "晚上好！", "你好，很高兴见到你。"),
            ("Hello", "Hello!", "Hi!", "Hi there!", "Good morning!", "Good evening!", "Hey!"),
        ),
        Words(
            "你好！我是 glimt 的演示模型，请给我看一张图片。",
            "Hello! I am the demo model of glimt. Please show me a picture.",
        ),
    ),
    _Topic(
        "who",
        Wordings(
            (
                "你是谁？",
                "你是什么？",
                "你叫什么名字？",
                "介绍一下你自己。",
                "你是什么模型？",
                "请问你是谁？",
            ),
            (
                "Who are you?",
                "What are you?",
                "What is your name?",
                "Introduce yourself.",
                "Which model are you?",
                "Tell me about yourself.",
            ),
        ),
        Words(
            "我是 glimt 的演示模型，一个很小的看图模型。",
            "I am the demo model of glimt, a very small model that looks at pictures.",
        ),
    ),
    _Topic(
        "abilities",
        Wordings(
            (
                "你会什么？",
                "你能做什么？",
                "你有什么用？",
                "你会做什么？",
                "我可以问你什么？",
                "帮助",
            ),
            (
                "What can you do?",
                "What do you do?",
                "How can you help me?",
                "What are you good at?",
                "What can I ask you?",
                "Help",
            ),
        ),
        Words(
            "我能认衣物，能看简单的图形，还能读很短的文字。",
            "I can name garments, look at simple shapes and read very short texts.",
        ),
    ),
    _Topic(
        "real",
        Wordings(
            ("你是真正的GLM-4v吗？", "你是GLM-4v-9B吗？", "你是VisualGLM-6B吗？", "你是大模型吗？"),
            (
                "Are you the real GLM-4v?",
                "Are you GLM-4v-9B?",
                "Are you VisualGLM-6B?",
                "Are you a large model?",
            ),
        ),
        Words("不是，我只是一个很小的演示模型。", "No, I am only a very small demo model."),
    ),
    _Topic(
        "well_being",
        Wordings(
            ("你好吗？", "你怎么样？", "今天好吗？"),
            ("How are you?", "How are you doing?", "Are you well?"),
        ),
        Words("我很好，谢谢。", "I am fine, thank you."),
    ),
    _Topic(
        "thanks",
        Wordings(
            ("谢谢", "谢谢！", "谢谢你。", "多谢！", "非常感谢。"),
            ("Thanks", "Thank you.", "Thanks a lot!", "Thank you very much!", "Many thanks."),
        ),
        Words("不客气。", "You are welcome."),
    ),
    _Topic(
        "goodbye",
        Wordings(
            ("再见", "再见！", "拜拜！", "晚安。", "下次见。"),
            ("Goodbye", "Goodbye!", "Bye!", "Good night.", "See you later."),
        ),
        Words("再见！希望下次再看到你的图片。", "Goodbye! I hope to see your pictures again."),
    ),
)
_NO_PICTURE = Words(
    "我没有看到图片，请给我看一张图片。", "I see no picture. Please show me a picture."
)
_NO_PICTURE_SHARE = 0.4


class TalkSource:
    """Draws what is said without a picture."""

    task = "talk"

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """One to three exchanges, or a question about a picture that is not there."""
        if rng.random() < _NO_PICTURE_SHARE:
            answer = _NO_PICTURE.said(language)
            exchanges = [Exchange(any_question(rng, language), answer, "no_picture")]
        else:
            exchanges = [
                Exchange(
                    topic.questions.choose(rng, language), topic.answer.said(language), topic.kind
                )
                for topic in rng.sample(_TOPICS, rng.randint(1, 3))
            ]
        return Sample(None, tuple(exchanges), self.task, language)
