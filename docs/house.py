"""Draws house.svg from the code: packages, their modules, and which package imports which.

    python docs/house.py          # writes docs/house.svg

Imports that follow from others are left out (the transitive reduction), and so are those of the ground, which every
package uses.
"""

import ast
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
LAYERS = [  # from top to bottom: every import points down
    ["scripts"],
    ["selfinstruct", "evaluation", "serving"],
    ["training", "inference"],
    ["data", "model"],
    ["ground"],
]
SCRIPTS = ("train", "sft", "selfinstruct", "chat")
WIDTH, GAP, PADDING, LINE, LETTER = 1000, 34, 12, 18, 6.6  # pixels; LETTER: the width of a character, about
FLOW = "file > Conversation > Segment > Example > token store > Batch > loss > step > checkpoint, export > text"
STYLE = """
    .paper { fill: #fff } .box { fill: #f6f8fa; stroke: #d0d7de }
    text { font: 12px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #59636e }
    .name { font-size: 13px; font-weight: 600; fill: #1f2328 } .import { fill: none; stroke: #6e7781 }
    .head { fill: #6e7781 } .flow { fill: #0969da }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #0d1117 } .box { fill: #151b23; stroke: #3d444d } text { fill: #9198a1 }
      .name { fill: #f0f6fc } .import { stroke: #9198a1 } .head { fill: #9198a1 } .flow { fill: #4493f8 }
    }
"""


def package_of(parts: tuple[str, ...]) -> str:
    """("minigpt", "data", "store") -> data; ("minigpt", "files") -> ground; ("sft",) -> scripts."""
    if parts[0] != "minigpt":
        return "scripts"
    known = [name for layer in LAYERS for name in layer]
    return parts[1] if len(parts) > 1 and parts[1] in known else "ground"


def read() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The modules of each package, and the packages that it imports."""
    modules: dict[str, list[str]] = {name: [] for layer in LAYERS for name in layer}
    imports: dict[str, set[str]] = {name: set() for name in modules}
    paths = [*sorted((ROOT / "minigpt").rglob("*.py")), *(ROOT / f"{name}.py" for name in SCRIPTS)]
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("minigpt", "__init__"):
            continue
        package = package_of(parts)
        if parts[-1] != "__init__":
            modules[package].append("/".join(parts[-1:] if package == "scripts" else parts[2:] or parts[1:]))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minigpt."):
                imports[package].add(package_of(tuple(node.module.split("."))))
    for package, targets in imports.items():
        targets -= {package, "ground"}
    return modules, imports


def reduced(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others: with a -> b, b -> c and a -> c, the last is left out."""

    def reach(name: str) -> set[str]:
        return imports[name].union(*(reach(target) for target in imports[name]))

    return [
        (source, target)
        for source, targets in imports.items()
        for target in sorted(targets)
        if not any(target in reach(other) for other in targets - {target})
    ]


def draw() -> str:
    modules, imports = read()
    shapes, boxes, y = [], {}, 46.0
    for layer in LAYERS:
        width = (WIDTH - GAP * (len(layer) + 1)) / len(layer)
        columns = int((width - 2 * PADDING) / LETTER)
        texts = {name: wrap("  ".join(modules[name]), columns, break_on_hyphens=False) for name in layer}
        height = 2 * PADDING + LINE * (1 + max(map(len, texts.values())))
        for index, name in enumerate(layer):
            x = GAP + index * (width + GAP)
            boxes[name] = x, y, width, height
            title = "minigpt/, the ground that all use" if name == "ground" else name
            title = f"{title}: train.py, sft.py, selfinstruct.py, chat.py" if name == "scripts" else title
            shapes.append(f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}" rx="6"/>')
            shapes.append(f'<text class="name" x="{x + PADDING:.0f}" y="{y + PADDING + 12:.0f}">{title}</text>')
            for number, line in enumerate(texts[name] if name != "scripts" else [], 1):
                top = y + PADDING + 12 + number * LINE
                shapes.append(f'<text x="{x + PADDING:.0f}" y="{top:.0f}">{escape(line)}</text>')
        y += height + GAP
    arrows = reduced(imports)
    for source, target in arrows:
        (x1, y1, w1, h1), (x2, y2, w2, _) = boxes[source], boxes[target]
        below = [other for other in arrows if other[0] == source]
        above = [other for other in arrows if other[1] == target]
        start = x1 + w1 * (below.index((source, target)) + 1) / (len(below) + 1)
        end = x2 + w2 * (above.index((source, target)) + 1) / (len(above) + 1)
        middle = (y1 + h1 + y2) / 2
        path = f"M{start:.0f} {y1 + h1:.0f}C{start:.0f} {middle:.0f} {end:.0f} {middle:.0f} {end:.0f} {y2 - 2:.0f}"
        shapes.insert(0, f'<path class="import" d="{path}" marker-end="url(#head)"/>')
    body = "\n  ".join(shapes)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" role="img" aria-labelledby="t">
  <title id="t">The packages of minigpt and which of them imports which; every import points down</title>
  <style>{STYLE}  </style>
  <marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto" markerUnits="userSpaceOnUse">
    <path class="head" d="M0 0L9 4L0 8z"/>
  </marker>
  <rect class="paper" width="{WIDTH}" height="{y:.0f}"/>
  <text class="flow" x="{GAP}" y="28">{escape(FLOW)}</text>
  {body}
</svg>
"""


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(draw(), encoding="utf-8")
