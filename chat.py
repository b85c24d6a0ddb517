"""Talk to a model: streamed answers, in a terminal or to one prompt.

    python chat.py --model_name_or_path runs/sft/export
    python chat.py --model_name_or_path runs/sft/export --prompt "What is the capital of China?"
    python chat.py --model_name_or_path runs/sft/export < questions.txt > answers.txt
    python chat.py --model_name_or_path runs/sft/export --serve

Read on in minigpt/inference/chat.py (what the model is asked), minigpt/inference/sampling.py (how it answers) and
minigpt/inference/terminal.py (the commands), or minigpt/inference/serve/ (the server).
"""

import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace

from minigpt.arguments import ModelArguments, PromptArguments, check_range, require
from minigpt.config import run
from minigpt.distributed import pick_device
from minigpt.inference.terminal import SamplingArguments, Terminal

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class ServeArguments:
    """A server instead of the terminal: OpenAI's API, and a page to chat (needs the extra serve)."""

    serve: bool = False
    """Serve until Ctrl-C or SIGTERM. The settings of sampling are for requests that give none."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback interface's needs api_key."""
    port: int = 8000
    """Port to listen on; 0 is any that is free."""
    api_key: str | None = None
    """What clients have to send as their key. Unset: MINIGPT_API_KEY of the environment, where other users cannot read
    it; without either there is none."""
    max_batch_size: int = 8
    """Answers that run together; the cache for so many is kept."""
    max_queue: int = 64
    """Answers that may wait for a place; further requests are sent away with status 429."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "max_batch_size")
        check_range(self, "at least 0", lambda x: x >= 0, "max_queue")
        check_range(self, "between 0 and 65535", lambda x: 0 <= x < 65536, "port")
        if self.serve:
            self.api_key = self.api_key or os.environ.get("MINIGPT_API_KEY")
            if self.host not in LOOPBACK and not self.api_key:
                raise ValueError(f"--host {self.host} lets other machines in: it needs --api_key or MINIGPT_API_KEY")
            if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
                raise ValueError("--api_key must be of printable ASCII characters, because it travels in a header")


@dataclass
class ChatConfig(SamplingArguments, ModelArguments, PromptArguments, ServeArguments):
    """Talk to a GPT-2."""

    prompt: str | None = None
    """Answer this and leave. Unset: a conversation, until an empty line or the end of input."""
    input: str | None = None
    """Context that goes with prompt, in the template's input block."""
    system: str | None = None
    """System text at the beginning of the conversation."""
    stop_blank_line: bool = False
    """End an answer at its first blank line, for models that were trained without an end-of-text token."""
    bf16: bool = False
    """Weights in bfloat16: half the memory, faster where it is built in. The cost in perplexity is shown."""
    quantize: str | None = None
    """int8: weights in 8 bits, a quarter of the memory and the fastest on a CPU. The cost in perplexity is shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ServeArguments.__post_init__(self)
        if self.serve and self.prompt is not None:
            raise ValueError("--serve and --prompt are two ways to ask: give one")
        if self.quantize not in (None, "int8"):
            raise ValueError(f"--quantize must be int8, got {self.quantize!r}")
        if self.quantize and self.bf16:
            raise ValueError("--quantize int8 computes in bf16 already: leave --bf16 out")
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
    from minigpt.inference.fast import for_generation, use_huge_pages, with_loss
    from minigpt.model.gpt2 import GPT

    gc.freeze()
    gc.enable()
    use_huge_pages()

    def load(name: str, revision: str | None = None) -> tuple[GPT, Tokenizer, Template]:
        model = GPT.from_pretrained(name, revision=revision, device=pick_device(config.device))
        own = config.tokenizer_name is None
        with ThreadPoolExecutor() as pool:  # the weights are packed while the vocabulary is read
            packed = None if config.bf16 or config.quantize else pool.submit(for_generation, model)
            tokenizer = Tokenizer.from_pretrained(config.tokenizer_name or name, revision if own else None)
        model.config.check_vocabulary(tokenizer.vocab_size)
        template = get_template(config.template or template_of(name, revision), **config.triggers)
        if config.stop_blank_line:
            template = replace(template, stop=(*template.stop, "\n\n"))
        if packed:
            return packed.result(), tokenizer, template
        model, cost = with_loss(model, tokenizer, config.quantize)
        print(cost, file=sys.stderr)
        return model, tokenizer, template

    sampling = SamplingArguments(**{field.name: getattr(config, field.name) for field in fields(SamplingArguments)})
    if config.serve:
        _serve(config, name, load, sampling)
        return
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


def _serve(config: ChatConfig, name: str, load: Callable, sampling: SamplingArguments) -> None:
    try:
        from minigpt.inference.serve.answer import Asker
        from minigpt.inference.serve.run import Server
    except ModuleNotFoundError as error:
        raise ImportError(f"--serve needs {error.name} (pip install -c constraints.txt -e '.[serve]')") from None

    model, tokenizer, template = load(name, config.revision)
    server = Server(
        Asker(model, tokenizer, template, asdict(sampling), config.system),
        os.path.basename(name) if os.path.isabs(name) else name,  # clients need not know where it lies
        host=config.host,
        port=config.port,
        api_key=config.api_key,
        max_batch_size=config.max_batch_size,
        max_queue=config.max_queue,
    )
    print(f"{name}: template {template.name}; Ctrl-C ends", file=sys.stderr)
    print(f"{server.url} is the page, {server.url}/v1 OpenAI's API", file=sys.stderr, flush=True)
    server.run()


if __name__ == "__main__":
    run(main, ChatConfig)
