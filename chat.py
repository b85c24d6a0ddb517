"""Talk to a model: streamed answers, in a terminal or to one prompt.

    python chat.py --model_name_or_path runs/sft/export
    python chat.py --model_name_or_path runs/sft/export --prompt "What is the capital of China?"

Read on in minigpt/inference/chat.py (what the model is asked) and minigpt/inference/sampling.py (how it answers).
"""

import sys
from dataclasses import dataclass, replace

from minigpt.arguments import ModelArguments, PromptArguments, check_range, require
from minigpt.config import run
from minigpt.distributed import pick_device


@dataclass
class ChatConfig(ModelArguments, PromptArguments):
    """Talk to a GPT-2."""

    prompt: str | None = None
    """Answer this and leave. Unset: a conversation, until an empty line or the end of input."""
    input: str | None = None
    """Context that goes with prompt, in the template's input block."""
    system: str | None = None
    """System text at the beginning of the conversation."""
    max_new_tokens: int = 256
    """Longest answer in tokens; never more than half of the model's context."""
    stop_blank_line: bool = False
    """End an answer at its first blank line, for models that were trained without an end-of-text token."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; more is livelier."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together reach this probability."""
    seed: int | None = None
    """Fixes the draws."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "max_new_tokens")
        check_range(self, "at least 0", lambda x: x >= 0, "temperature", "top_k")
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "top_p")
        check_range(self, "at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed")
        if self.input and not self.prompt:
            raise ValueError("--input goes with --prompt")


def main(config: ChatConfig) -> None:
    name = require(config, "model_name_or_path", "a folder or a hub id, such as runs/sft/export")
    # Imported here, so that --help and such errors need not wait for torch.
    from minigpt.data.prompts import get_template, template_of
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.inference.chat import Chat
    from minigpt.model.gpt2 import GPT

    revision = config.revision
    model = GPT.from_pretrained(name, revision=revision, device=pick_device(config.device))
    tokenizer = Tokenizer.from_pretrained(config.tokenizer_name or name, None if config.tokenizer_name else revision)
    model.config.check_vocabulary(tokenizer.vocab_size)
    template = get_template(config.template or template_of(name, revision), **config.triggers)
    if config.stop_blank_line:
        template = replace(template, stop=(*template.stop, "\n\n"))
    chat = Chat(
        model,
        tokenizer,
        template,
        config.system,
        max_new_tokens=min(config.max_new_tokens, model.config.n_positions // 2),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )

    def answer(content: str, context: str | None = None) -> None:
        for piece in chat.ask(content, context):
            print(piece, end="", flush=True)
        print()
        if chat.turns_dropped:
            print(f"({chat.turns_dropped} old turns no longer fit into the context)", file=sys.stderr)
        if chat.tokens_cut:
            print(f"(the first {chat.tokens_cut} tokens do not fit into the context: cut)", file=sys.stderr)

    if config.prompt is not None:
        answer(config.prompt, config.input)
        return
    print(f"{name}: template {template.name}; an empty line ends", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not question.strip():
            return
        answer(question)


if __name__ == "__main__":
    run(main, ChatConfig)
