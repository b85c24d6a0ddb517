"""README.md and the pages beside it, and the commands in their blocks."""

import re
from typing import NamedTuple

from .workplace import ROOT

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
CLASSES = {"train.py": "PretrainConfig", "sft.py": "SFTConfig", "chat.py": "ChatConfig"}
CLASSES["selfinstruct.py"] = "SelfInstructConfig"


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str  # FILE:LINE of its first line
    language: str
    text: str


class Command(NamedTuple):
    """A command of a block for the shell, its line breaks and comments taken out."""

    where: str
    words: str
    needs: str  # what its comment says that it needs: "8 GPUs"


def blocks(text: str, name: str = "README.md") -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{name}:{text.count(chr(10), 0, m.start()) + 2}", m[1], m[2]) for m in found]


def commands(block: Block) -> list[Command]:
    """A comment counts for its line; on a line of its own it counts down to the next empty one.

    >>> commands(Block("p:1", "sh", "# needs a GPU: fp16\\npython a.py \\\\\\n  --b '#'\\n\\npython c.py  # see d\\n"))
    [Command("p:2", "python a.py   --b '#'", "a GPU"), Command("p:5", "python c.py", "")]
    """
    page, first = block.where.rsplit(":", 1)
    found, above, words, begun = [], "", "", 0
    for number, line in enumerate(block.text.split("\n"), int(first)):
        code, comment = re.fullmatch(r"""((?:[^#'"]|'[^']*'|"[^"]*")*)(#.*)?""", line).groups()
        said = re.match(r"# needs ([^:;,]+)", comment or "")
        if not words:
            begun = number
            if not code.strip():
                above = (said[1] if said else above) if comment else ""
                continue
        words += code.rstrip("\\")
        if not code.endswith("\\"):
            found.append(Command(f"{page}:{begun}", words.strip(), said[1] if said else above))
            words = ""
    return found


BLOCKS = [b for page in PAGES for b in blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands(block)]
# What is run, in the order of the page: commands, and the blocks of Python between them.
RUN: list[Command | Block] = []
for block in BLOCKS:
    RUN += [block] if block.language == "python" else []
    RUN += [c for c in commands(block) if not c.needs and c.words.startswith("python ") and "examples/" not in c.words]
