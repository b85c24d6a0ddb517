"""What README.md shows of the demonstration, from the demonstration: its transcript and its loss curve.

    python docs/regenerate.py                                  # runs it first; or: make readme
    python docs/regenerate.py --log demo.log --run runs/demo   # of one that was run: make demo | tee demo.log

The transcript goes between two markers in README.md, the curve to loss.png and loss-dark.png beside this file.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from minigpt.files import whole_file
from minigpt.settings.command_line import run
from minigpt.training.run.metrics import draw_losses

DOCS, ROOT = Path(__file__).parent, Path(__file__).parents[1]
BEGIN, END = "<!-- transcript: `make readme` writes it -->\n", "<!-- end of the transcript -->\n"
SHOWN = {  # of a section of the log, besides its title: lines that begin so, and so many items
    "2": (r"step (0/|([\d,]+)/\2 ).*val_loss|time", 0),
    "3": (r"step (0/|([\d,]+)/\2 ).*val_loss|time", 0),
    "4": (r"  exact match|  answers that end", 2),
    "5": (r"", 0),
    "6": (r"tasks read|kept|dropped|  \d+ of ", 2),
}
ITEM = re.compile(r"^  \S.*\n(?:    \S.*\n)+", re.MULTILINE)  # a question, and its answers indented further
PAPER = {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "savefig.facecolor": "#0d1117"}


@dataclass
class RegenerateConfig:
    """Bring README.md up to the demonstration."""

    log: str | None = None
    """What a demonstration printed. Unset: one is run."""
    run: str = "runs/demo"
    """The folder that it wrote, relative to the repository."""
    readme: str = str(ROOT / "README.md")
    """The file to change."""
    pictures: str = str(DOCS)
    """Where the pictures go."""


def main(config: RegenerateConfig) -> None:
    log = Path(config.log).read_text(encoding="utf-8") if config.log else run_demo(config.run)
    readme = Path(config.readme)
    text = with_transcript(readme.read_text(encoding="utf-8"), transcript(log))
    draw(ROOT / config.run / "train" / "metrics.jsonl", Path(config.pictures))
    with whole_file(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


def run_demo(folder: str) -> str:
    """Runs the demonstration, shows what it prints, and returns it."""
    command = [sys.executable, str(ROOT / "examples" / "demo" / "demo.py"), "--output_dir", folder]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise ValueError(f"{command[1]} ended with exit code {process.returncode}; its message stands above")
    return "".join(lines)


def transcript(log: str) -> str:
    """The lines of a log that README.md shows: of the items in a section the first ones, and the first wrong one."""
    before, *sections = re.split(r"^(?=== )", log, flags=re.MULTILINE)
    shown = ["$ make demo", *re.findall(r"^About .*", before, re.MULTILINE)]
    for section in sections:
        if section[3] not in SHOWN:
            continue
        pattern, count = SHOWN[section[3]]
        items = [item[0] for item in ITEM.finditer(section)]
        chosen = items[:count] + [item for item in items[count:] if "(wrong)" in item][: min(count, 1)]
        for item in items:
            section = section.replace(item, item if item in chosen else "", 1)
        lines = section.rstrip().split("\n")
        wanted = {line for item in chosen for line in item.split("\n")}
        shown += ["", *lines[:2], *(line for line in lines[2:] if line in wanted or re.match(pattern, line))]
    return "\n".join(shown) + "\n"


def with_transcript(readme: str, shown: str) -> str:
    """README.md with another transcript between the markers. Raises `ValueError` where they are not."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {BEGIN.strip()} and {END.strip()}, one after the other")
    return f"{before}{BEGIN}\n```\n{shown}```\n\n{END}{after}"


def draw(metrics: Path, pictures: Path) -> None:
    """The loss curve on light and on dark paper."""
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError("the pictures need matplotlib (pip install -c constraints.txt -e '.[plot]')") from None
    for name, look in (("loss.png", "default"), ("loss-dark.png", ["dark_background", PAPER])):
        with style.context(look):
            draw_losses(metrics, pictures / name)


if __name__ == "__main__":
    run(main, RegenerateConfig)
