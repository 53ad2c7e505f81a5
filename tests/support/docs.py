"""The pages of the documentation: their code and commands."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if "```sh" in page.read_text())


BLOCK = re.compile(r'^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.M | re.S)


def code(page: Path, kind: str) -> list[tuple[str | None, str]]:
    """Blocks of one language: (title, text)."""
    return [
        (block["title"], block["text"])
        for block in BLOCK.finditer(page.read_text(encoding="utf-8"))
        if block["kind"] == kind
    ]


def commands(page: Path) -> list[str]:
    """Command lines, continued ones joined, comments cut off."""
    text = "".join(text for _, text in code(page, "sh")).replace("\\\n", " ")
    return [shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
