"""Eight questions with answers, which a tiny model memorizes."""

from minigpt.data.prompts import get_template
from minigpt.data.read.records import Conversation

TEMPLATE = get_template("io")
ROWS = [
    ("Capital of France?", "", "The capital of France is Paris."),
    ("Capital of Sweden?", "", "Stockholm."),
    ("Plural of mouse?", "", "The plural of mouse is mice, as everybody knows who keeps them."),
    ("Opposite.", "hot", "cold"),
    ("Opposite.", "up", "down"),
    ("Add.", "2 and 3", "2 + 3 = 5"),
    ("Say something long about the sea, please, and be quick about it.", "", "It is wide."),
    ("Spell it.", "cat", "c-a-t"),
]
ALPACA = [{"instruction": a, "input": b, "output": c} for a, b, c in ROWS]
MESSAGES = [
    [{"role": "user", "content": a, **({"input": b} if b else {})}, {"role": "assistant", "content": c}]
    for a, b, c in ROWS
]
CONVERSATIONS = [Conversation(messages) for messages in MESSAGES]
