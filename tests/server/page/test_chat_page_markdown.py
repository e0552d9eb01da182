"""Answers as Markdown: shown as elements, and never more than that."""

from __future__ import annotations

import pytest
from tests.chat_page import opened, page_by
from tests.chromium import Tab
from tests.openai_server import answer_of

LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer nofollow">{1}</a>'
MARKDOWN = {
    "# One\ntext": "<h3>One</h3><p>text</p>",
    "**粗体**：和*斜体*，`a*b*`": "<p><strong>粗体</strong>：和<em>斜体</em>，"
    "<code>a*b*</code></p>",
    "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
    "a\nb\n\nc": "<p>a<br>b</p><p>c</p>",
    "- a\n  - b\n- c\n\n1. d\n2. e": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"
    "<ol><li>d</li><li>e</li></ol>",
    "3. x": '<ol start="3"><li>x</li></ol>',
    "> q\n> r": "<blockquote><p>q<br>r</p></blockquote>",
    "a ~~b~~\n\n---": "<p>a <del>b</del></p><hr>",
    "| a | b |\n|---|--:|\n| 1 | 2 |": '<div class="table" tabindex="0"><table>'
    '<thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td class="right">2</td></tr></tbody></table></div>',
    "half **bold and `code": "<p>half **bold and `code</p>",
    "[x](https://a.example/b_(c))": f"<p>{LINK.format('https://a.example/b_(c)', 'x')}</p>",
    "见 https://a.example/b。": f"<p>见 {LINK.format('https://a.example/b', 'https://a.example/b')}。</p>",
    # what must stay text
    "<script>alert(1)</script><img src=x onerror=alert(1)>": "<p>&lt;script&gt;alert(1)"
    "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](data:text/html,hi) [y](JaVaScRiPt:1) [z](//a.example)": "<p>[x](data:text/html,hi) "
    "[y](JaVaScRiPt:1) [z](//a.example)</p>",
    "![p](https://a.example/p.png)": f"<p>{LINK.format('https://a.example/p.png', 'p')}</p>",
    r"\*a\* \<b>": "<p>*a* &lt;b&gt;</p>",
}  # fmt: skip


def test_markdown_becomes_elements_and_nothing_else(tab, engine):
    """Catches markup that reaches the page from a model's answer, and marks that are shown raw."""
    with page_by(engine, answer_of("fine")) as (url, _):
        opened(tab, url)
        for text, html in MARKDOWN.items():
            assert rendered(tab, text) == html
        code = rendered(tab, "```py\n<b> & **no**\n")
        assert "<code>&lt;b&gt; &amp; **no**</code>" in code
        assert "<span>py</span>" in code
        assert tab.problems == []


def rendered(tab: Tab, text: str) -> str:
    return tab.see(f"""import('/page/markdown.js').then(({{renderMarkdown}}) => {{
        const holder = document.createElement('div');
        holder.append(renderMarkdown({text!r}));
        return holder.innerHTML;
    }})""")


@pytest.mark.parametrize(
    "text",
    [
        "*" * 3000,
        "[" * 3000,
        "`" * 2999 + "a",
        "> " * 2000,
        "- " * 3000,
        "**a " * 2000,
        "_a" * 3000,
        "|" * 3000 + "\n|-|",
    ],
)
def test_hostile_markdown_does_not_hang_the_page(tab, engine, text):
    """Catches an expression that takes minutes on a row of marks that never close."""
    with page_by(engine, answer_of("fine")) as (url, _):
        opened(tab, url)
        assert rendered(tab, text)
