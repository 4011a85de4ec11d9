"""A hook of mkdocs: names such as ``--batch-size`` do not break at their hyphens."""

import re
from typing import Any

# code in text; that of a block follows an empty span
IN_TEXT = re.compile(r"(?<!<span></span>)<code>([^<]+)</code>")
COMMANDS = re.compile(r'(<div class="language-sh highlight">)(.*?)(</div>)', re.DOTALL)
# longer words may break, or they would not fit on a phone
WORD = re.compile(r"(?:&\w+;|\S){3,28}(?!\S)")
OPTION = re.compile(r"(?<![\w-])--[\w-]+")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page in which these names are marked; extra.css does the rest."""
    html = IN_TEXT.sub(lambda found: f"<code>{_marked(found[1])}</code>", html)
    return COMMANDS.sub(lambda found: found[1] + OPTION.sub(_whole, found[2]) + found[3], html)


def _marked(code: str) -> str:
    return re.sub(r"\S+", lambda word: _whole(word) if _is_name(word[0]) else word[0], code)


def _is_name(word: str) -> bool:
    return "-" in word and WORD.fullmatch(word) is not None


def _whole(word: re.Match[str]) -> str:
    return f'<span class="whole">{word[0]}</span>'
