"""Chat with a model: in the terminal, one prompt, piped input, or an OpenAI-compatible server.

    python chat.py --model_name_or_path runs/sft/export
    python chat.py --model_name_or_path runs/sft/export --prompt "What is the capital of China?"
    python chat.py --model_name_or_path runs/sft/export < questions.txt > answers.txt
    python chat.py --model_name_or_path runs/sft/export --serve

See minigpt/inference/chat.py (the prompt), minigpt/inference/generate.py (generation) and minigpt/inference/terminal.py
(the commands), or minigpt/serving/ (the server).
"""

import gc
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from minigpt.distributed import explained_if_out_of_memory, pick_device, world_size
from minigpt.inference.terminal import Terminal
from minigpt.settings.command_line import run
from minigpt.settings.groups import (
    ModelArguments,
    PromptArguments,
    QuantizeArguments,
    SamplingArguments,
    ServeArguments,
    require,
)


@dataclass
class ChatConfig(SamplingArguments, ModelArguments, PromptArguments, QuantizeArguments, ServeArguments):
    """Chat with a GPT-2."""

    prompt: str | None = None
    """Answer this prompt and exit. Unset: a conversation, until an empty line or the end of input."""
    input: str | None = None
    """Context of prompt, for the template's input block."""
    system: str | None = None
    """System prompt, at the beginning of the conversation."""
    stop_blank_line: bool = False
    """End an answer at its first blank line, for models trained without an end-of-text token."""
    bf16: bool = False
    """Weights in bfloat16: half the memory, and faster on CPUs with bf16 instructions. The cost in perplexity is
    printed, as with quantize."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ServeArguments.__post_init__(self)
        if self.serve and self.prompt is not None:
            raise ValueError("--serve and --prompt are alternatives: give one")
        if self.quantize and self.bf16:
            raise ValueError("--quantize and --bf16 are alternatives: give one")
        if self.input and not self.prompt:
            raise ValueError("--input needs --prompt")


def main(config: ChatConfig) -> None:
    if world_size() > 1:
        raise ValueError("a chat needs one process alone: start it with python")
    name = require(config, "model_name_or_path", "a folder or a hub id, such as runs/sft/export")
    # Imported here, so that --help and argument errors do not wait for torch. The collector is off during the imports,
    # and gc.freeze excludes their objects from later collections: a seventh of the time to the first token.
    gc.disable()
    from minigpt.data.prompts import Template
    from minigpt.data.tokenizer import Tokenizer
    from minigpt.inference.chat import Chat
    from minigpt.inference.model_folder import ModelFolder
    from minigpt.inference.packed import load_for_generation, use_huge_pages
    from minigpt.model.base import CausalLM

    gc.freeze()
    gc.enable()
    use_huge_pages()

    def load(name: str, revision: str | None = None) -> tuple[CausalLM, Tokenizer, Template]:
        folder = ModelFolder(name, revision, config.tokenizer_name)
        model, tokenizer = load_for_generation(
            folder,
            device=pick_device(config.device),
            quantize="bf16" if config.bf16 else config.quantize,
            batched=config.serve,
            on_note=lambda note: print(note, file=sys.stderr),
        )
        template = folder.template(config)
        if config.stop_blank_line:
            template = replace(template, stop=(*template.stop, "\n\n"))
        return model, tokenizer, template

    sampling = SamplingArguments(**{field.name: getattr(config, field.name) for field in fields(SamplingArguments)})
    if config.serve:
        try:
            from minigpt.serving.requests import RequestBuilder
            from minigpt.serving.server import Server
        except ModuleNotFoundError as error:
            raise ImportError(f"--serve needs {error.name} (pip install -c constraints.txt -e '.[serve]')") from None
        builder = RequestBuilder(*load(name, config.revision), asdict(sampling), config.system)
        public_name = Path(name).name if Path(name).is_absolute() else name  # do not show clients a local path
        with explained_if_out_of_memory(
            f"a smaller --max_batch_size (now {config.max_batch_size}) needs a smaller cache"
        ):
            server = Server(builder, public_name, config)
        print(f"{name}: template {builder.template.name}; Ctrl-C ends", file=sys.stderr)
        print(f"{server.url} is the page, {server.url}/v1 OpenAI's API", file=sys.stderr, flush=True)
        server.run()
        return
    chat = Chat(*load(name, config.revision), config.system, **asdict(sampling))
    terminal = Terminal(chat, sampling, load)
    if config.prompt is not None:
        terminal.show(chat.ask(config.prompt, config.input))
        return
    hint = ", /help lists the commands" if terminal.interactive else ""
    print(f"{name}: template {chat.template.name}; an empty line ends{hint}", file=sys.stderr)
    terminal.run()
    if terminal.failed and not terminal.interactive:
        sys.exit(1)


if __name__ == "__main__":
    run(main, ChatConfig)
