"""A folder with a tiny model and some data, where scripts run in processes of their own with the network blocked."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig

from .script_runner import ScriptRunner

ROOT = Path(__file__).parents[1]

# Python imports this before anything else. Who asks for the network is refused, and named in a file.
BLOCKED_NETWORK = """
import os, socket

def _checked(function):
    def call(*arguments, **settings):
        address = next(a for a in arguments if not isinstance(a, socket.socket))
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "localhost", "::1", None):
            with open(os.environ["NETWORK_LOG"], "a") as log:
                print(host, file=log)
            raise OSError(f"the network is blocked: {host}")
        return function(*arguments, **settings)
    return call

socket.socket.connect = _checked(socket.socket.connect)
socket.socket.connect_ex = _checked(socket.socket.connect_ex)
socket.getaddrinfo = _checked(socket.getaddrinfo)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Workplace:
    """A folder with a tiny model and some data, and scripts that run in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "blocked").mkdir()
        (folder / "blocked" / "sitecustomize.py").write_text(BLOCKED_NETWORK)
        # Pairs whose answer is in the question: something to learn, and a loss that falls.
        words = [f"{a}{b}" for a in ("sun", "moon", "rain", "snow", "wind") for b in ("day", "light", "fall", "y")]
        rows = [{"instruction": "Say it twice.", "input": word, "output": f"{word} {word}"} for word in words]
        (folder / "train.json").write_text(json.dumps(rows[:16]))
        (folder / "held.json").write_text(json.dumps(rows[16:]))
        (folder / "corpus.txt").write_text(
            "".join(f"After {word} comes {word}, and then rest.\n" for word in words) * 3
        )

        tokenizer = Tokenizer.tiny()
        torch.manual_seed(0)
        eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
        model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=96, n_embd=32, n_layer=2, n_head=2, **eot))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model", 96)

    def environment(self, **env: str) -> dict[str, str]:
        """Ours, without its settings, and with nothing but this folder to go to."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MINIGPT_"))}
        return environment | {
            "PYTHONPATH": str(self.folder / "blocked"),
            "NETWORK_LOG": str(self.folder / "network.log"),
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / "hf"),
            "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(self.folder / "mpl"),
            **env,
        }

    def __call__(self, script: str, *arguments: object, stdin: str = "", **env: str) -> Done:
        done = Done(*self.runner.run([str(ROOT / script), *map(str, arguments)], self.environment(**env), stdin))
        log = self.folder / "network.log"
        asked = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        assert asked == "", f"{script} asked the network"
        return done

    @cached_property
    def runner(self) -> ScriptRunner:
        return ScriptRunner(self.folder, self.environment())

    def good(self, script: str, *arguments: object, **more: str) -> str:
        """What a script prints when all goes well: it has nothing to say on standard error."""
        done = self(script, *arguments, **more)
        assert (done.code, done.err) == (0, "")
        return done.out

    def bad(self, script: str, *arguments: object, **env: str) -> tuple[int, str]:
        """The exit code and the one line that a script fails with."""
        done = self(script, *arguments, **env)
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        return done.code, done.err.removeprefix("error: ").removesuffix("\n")

    def metrics(self, run: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str) -> list[float]:
        return [line["loss"] for line in self.metrics(run) if "loss" in line]

    def weights(self, folder: str) -> dict[str, torch.Tensor]:
        return GPT.from_pretrained(self.folder / folder).state_dict()
