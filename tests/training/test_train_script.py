"""train.py from nothing: whose shape, and whose tokenizer."""

import shutil

import pytest

from minigpt.model.gpt2 import GPT

from ..workplace import Workplace


@pytest.fixture
def work(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def test_the_tokenizer_is_gpt2s_where_none_is_named(work):
    """It was looked for as gpt2, and the weights as openai-community/gpt2: two folders in the hub's cache."""
    offline = {"HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": ""}
    code, message = work.bad("train.py", "--config_name", "gpt2", "--data", "corpus.txt", **offline)
    assert code == 1
    assert message.startswith("openai-community/gpt2: no such folder here, and the hub cannot be reached for ")


def test_the_revision_is_that_of_the_shape(work, hub_server):
    """It was left out where the shape was looked for, and given to the tokenizer, which is of another repository."""
    main, branch = hub_server.root / "owner" / "name", hub_server.root / "owner" / "name@branch"
    main.mkdir(parents=True)
    branch.mkdir()
    shutil.copy(work.folder / "model" / "config.json", branch)
    gpt2 = hub_server.root / "openai-community" / "gpt2"
    gpt2.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work.folder / "model" / name, gpt2)

    anew = ("--config_name", "owner/name", "--revision", "branch", "--data", "corpus.txt", "--plan", 1)
    out = work.good("train.py", *anew, **hub_server.env)
    model = GPT.from_pretrained(work.folder / "model")
    assert f"\nmodel            {model.num_parameters():,} parameters, fp32\n" in out
    asked = {tuple(request.split("/")[1:5]) for request in hub_server.requests}
    assert asked == {("owner", "name", "resolve", "branch"), ("openai-community", "gpt2", "resolve", "main")}
