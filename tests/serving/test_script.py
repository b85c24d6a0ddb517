"""chat.py --serve in a subprocess."""

# ruff: noqa: E402  # the extras may not be installed

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

for extra in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(extra, reason="the extras serve and test are not installed")
import httpx

openai = pytest.importorskip("openai", reason="the extra test is not installed")

from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer

from .running_server import ask, make_model, serving

ROOT = Path(__file__).parents[2]


@contextmanager
def script(folder, *arguments, name="model", **environment):
    """Runs chat.py --serve on a saved model: yields the process and its URL."""
    model, tokenizer = make_model(), Tokenizer.tiny()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model", 256)
    get_template("hugchat").save_pretrained(folder / "model")
    command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", name, "--serve", "--port", "0", *arguments]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MINIGPT_")}
    process = subprocess.Popen(command, cwd=folder, env=env | environment, stderr=subprocess.PIPE, text=True)
    try:
        output = process.stderr.readline() + process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", output)
        assert url, output
        yield process, url[0]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_shuts_down_gracefully(tmp_path):
    with script(tmp_path, "--max_new_tokens", "9", MINIGPT_API_KEY="from the environment") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="from the environment", max_retries=0)
        chunks = client.chat.completions.create(model="model", messages=ask()["messages"], stream=True)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=30) == -signal.SIGTERM
        assert process.stderr.read().endswith("shut down\n")


def test_the_model_name_does_not_reveal_the_path(tmp_path):
    """Regression: the name of a path that ends in a slash was empty."""
    with script(tmp_path, name=f"{tmp_path}/model/") as (_, url):
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: it needs --api_key or MINIGPT_API_KEY"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--prompt", "Hi"], "--serve and --prompt are alternatives: give one"),
        (["--api_key", "schlüssel"], "--api_key must be of printable ASCII characters, because it travels in a header"),
    ],
)
def test_invalid_flags(arguments, message):
    command = [sys.executable, ROOT / "chat.py", "--serve", "--model_name_or_path", "nowhere", *arguments]
    env = {key: value for key, value in os.environ.items() if key != "MINIGPT_API_KEY"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_a_missing_extra_is_named():
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None;"
        "sys.argv = ['chat.py', '--serve', '--model_name_or_path', 'x'];"
        "runpy.run_path('chat.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "error: --serve needs uvicorn (pip install -c constraints.txt -e '.[serve]')\n",
    )


def test_a_port_in_use_is_named(served_model, server):
    port = int(server.url.rpartition(":")[2])
    with (
        pytest.raises(OSError, match=f"--host 127.0.0.1 --port {port}: Address already in use"),
        serving(served_model, port=port),
    ):
        pass
