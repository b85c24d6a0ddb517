"""Talk to a model: streamed answers, in a terminal or to one prompt.

    python chat.py --model_name_or_path runs/sft/export
    python chat.py --model_name_or_path runs/sft/export --prompt "What is the capital of China?"
    python chat.py --model_name_or_path runs/sft/export < questions.txt > answers.txt

Read on in minigpt/inference/chat.py (what the model is asked), minigpt/inference/sampling.py (how it answers) and
minigpt/inference/terminal.py (the commands).
"""

import gc
import sys
from dataclasses import asdict, dataclass, fields, replace

from minigpt.arguments import ModelArguments, PromptArguments, require
from minigpt.config import run
from minigpt.distributed import pick_device
from minigpt.inference.terminal import SamplingArguments, Terminal


@dataclass
class ChatConfig(SamplingArguments, ModelArguments, PromptArguments):
    """Talk to a GPT-2."""

    prompt: str | None = None
    """Answer this and leave. Unset: a conversation, until an empty line or the end of input."""
    input: str | None = None
    """Context that goes with prompt, in the template's input block."""
    system: str | None = None
    """System text at the beginning of the conversation."""
    stop_blank_line: bool = False
    """End an answer at its first blank line, for models that were trained without an end-of-text token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input and not self.prompt:
            raise ValueError("--input goes with --prompt")


def main(config: ChatConfig) -> None:
    name = require(config, "model_name_or_path", "a folder or a hub id, such as runs/sft/export")
    # Imported here, so that --help and such errors need not wait for torch. What it brings stays, and each collection
    # of garbage would walk all of it: a seventh of the time to the first token.
    gc.disable()
    from minigpt.data.prompts import Template, get_template, template_of
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.inference.chat import Chat
    from minigpt.model.gpt2 import GPT

    gc.freeze()
    gc.enable()

    def load(name: str, revision: str | None = None) -> tuple[GPT, Tokenizer, Template]:
        model = GPT.from_pretrained(name, revision=revision, device=pick_device(config.device))
        own = config.tokenizer_name is None
        tokenizer = Tokenizer.from_pretrained(config.tokenizer_name or name, revision if own else None)
        model.config.check_vocabulary(tokenizer.vocab_size)
        template = get_template(config.template or template_of(name, revision), **config.triggers)
        if config.stop_blank_line:
            template = replace(template, stop=(*template.stop, "\n\n"))
        return model, tokenizer, template

    sampling = SamplingArguments(**{field.name: getattr(config, field.name) for field in fields(SamplingArguments)})
    chat = Chat(*load(name, config.revision), config.system, **asdict(sampling))
    terminal = Terminal(chat, sampling, load)
    if config.prompt is not None:
        terminal.show(chat.ask(config.prompt, config.input))
        return
    help = ", /help lists the commands" if terminal.interactive else ""
    print(f"{name}: template {chat.template.name}; an empty line ends{help}", file=sys.stderr)
    terminal.run()
    if terminal.failed and not terminal.interactive:
        sys.exit(1)


if __name__ == "__main__":
    run(main, ChatConfig)
