"""The scripts from end to end, each in a process of its own, with the network blocked.

A tiny model is pretrained, tuned, asked and talked to. The fixtures `pretrained` and `tuned` are runs that several
tests look at.
"""

import json
import math
import re
import shutil

import pytest
import torch
import yaml

from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.settings.groups import TrainConfig
from minigpt.training.optim import learning_rate

from .workplace import Workplace

STEP = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
EXPORT = [
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
    *("prompt_template.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
]


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def pretrained(work):
    """train.py from nothing: what it printed. Its export is pretrained/export."""
    return work.good(
        "train.py",
        *("--config_name", "model", "--tokenizer_name", "tiny", "--data", "corpus.txt", "--block_size", 32),
        *("--learning_rate", "1e-2", "--warmup_steps", 2, "--max_steps", 8, "--eval_steps", 3),
        *("--per_device_train_batch_size", 4, "--output_dir", "pretrained"),
    )


@pytest.fixture(scope="session")
def tuned(work, pretrained):
    """sft.py on the pretrained model, with trigger words of its own: what it printed. Its export is tuned/export."""
    return work.good(
        "sft.py",
        *("--model_name_or_path", "pretrained/export", "--data", "train.json", "--validation_data", "held.json"),
        *("--template", "iio", "--trigger_instruction", "Request", "--learning_rate", "1e-2"),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3),
        *("--eval_steps", 5, "--max_new_tokens", 8, "--output_dir", "tuned"),
    )


def check_metrics(lines, steps, eval_steps, config):
    """Every step is there with what design.md promises, and the evaluations where they belong."""
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        evaluated = line["step"] % eval_steps == 0 or line["step"] == steps
        first = {"val_loss_before"} if line["step"] == 1 else set()
        assert set(line) == STEP | first | ({"val_loss"} if evaluated else set())
        assert all(math.isfinite(value) for value in line.values())
    assert [line["lr"] for line in lines] == [learning_rate(step, steps, config) for step in range(steps)]
    tokens = [line["tokens"] for line in lines]
    assert tokens == sorted(set(tokens))


def check_moved(before, after):
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


# ---- train.py


def test_train_from_nothing(work, pretrained):
    folder = work.folder / "pretrained"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "config.yaml",
        "export",
        "loss.png",
        "metrics.jsonl",
    ]
    assert sorted(path.name for path in (folder / "export").iterdir()) == EXPORT
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = work.metrics("pretrained")
    check_metrics(lines, 8, 3, TrainConfig(learning_rate=1e-2, warmup_steps=2))
    assert lines[0]["val_loss_before"] == pytest.approx(math.log(4096), rel=0.01)
    assert lines[-1]["val_loss"] < lines[0]["val_loss_before"] - 1
    assert json.loads((folder / "export" / "config.json").read_text())["n_layer"] == 2
    assert get_template(folder / "export").name == "none"

    text = (work.folder / "corpus.txt").read_text()
    tokens = len(Tokenizer.tiny().encode(text)) + 1
    assert pretrained.startswith(f"corpus.txt: 1 documents, {tokens:,} tokens; 0 bad records\n")
    assert pretrained.count("  sample    ") == 4  # at steps 0, 3, 6 and 8
    table = dict(re.split(r"  +", line, maxsplit=1) for line in pretrained.splitlines()[-8:])
    rows = ["steps", "data seen", "training loss", "validation loss", "time", "export", "picture", "chat"]
    assert list(table) == rows
    assert table["chat"] == "python chat.py --model_name_or_path pretrained/export"
    assert f"{lines[0]['val_loss_before']:.4f} -> {lines[-1]['val_loss']:.4f}" in table["validation loss"]
    assert table["data seen"].startswith(f"{lines[-1]['tokens']:,} tokens")


def test_train_goes_on_from_a_model(work, pretrained):
    """The corpus by its folder's name, overlapping blocks, a validation text of its own, no samples."""
    (work.folder / "texts").mkdir()
    shutil.copy(work.folder / "corpus.txt", work.folder / "texts")
    (work.folder / "other.txt").write_text("After sunday comes moonlight, and then rest.\n" * 5)
    out = work.good(
        "train.py",
        *("--model_name_or_path", "pretrained/export", "--data", "texts", "--validation_data", "other.txt"),
        *("--block_size", 32, "--stride", 8, "--sample_tokens", 0, "--max_steps", 2, "--output_dir", "further"),
    )
    assert "sample" not in out
    check_metrics(work.metrics("further"), 2, 1, TrainConfig())
    check_moved(work.weights("pretrained/export"), work.weights("further/export"))
    blocks = int(re.search(r"(\d+) blocks", out)[1])
    assert blocks > 3 * int(re.search(r"(\d+) blocks", pretrained)[1])


# ---- sft.py


def test_sft_trains(work, tuned):
    folder = work.folder / "tuned"
    assert {path.name for path in folder.iterdir()} - {"export-best"} == {
        *(".lock", "config.yaml", "export", "loss.png", "metrics.jsonl")
    }
    assert sorted(path.name for path in (folder / "export").iterdir()) == EXPORT
    lines = work.metrics("tuned")
    check_metrics(lines, 12, 5, TrainConfig(learning_rate=1e-2))
    assert lines[-1]["val_loss"] < lines[0]["val_loss_before"] - 0.5
    assert [line["epoch"] for line in lines] == [step / 4 for step in range(1, 13)]
    check_moved(work.weights("pretrained/export"), work.weights("tuned/export"))
    template = get_template(folder / "export")
    assert (template.name, template.triggers["instruction"]) == ("iio", "Request")
    assert "train.json: 16 examples, " in tuned
    assert "held.json: 4 examples, " in tuned
    assert [tuned.count(f"\n  {n} prompt    ") for n in (1, 2)] == [1, 1]  # before the first step
    assert [tuned.count(f"\n  {n} answer    ") for n in (1, 2)] == [4, 4]  # at steps 0, 5, 10 and 12
    assert tuned.splitlines()[-1].endswith("python chat.py --model_name_or_path tuned/export")


def test_a_saved_configuration_repeats_the_run(work, tuned):
    work.good("sft.py", "--config", "tuned/config.yaml", "--output_dir", "again")
    assert work.losses("again") == work.losses("tuned")
    assert (work.folder / "again/export/model.safetensors").read_bytes() == (
        work.folder / "tuned/export/model.safetensors"
    ).read_bytes()
    settings = [yaml.safe_load((work.folder / run / "config.yaml").read_text()) for run in ("again", "tuned")]
    assert settings[0].pop("output_dir") == "again"
    assert settings[1].pop("output_dir") == "tuned"
    assert settings[0] == settings[1]


def test_sft_with_the_other_settings(work, pretrained):
    """bf16, a held-out part of the data, the whole text learnt, and a corpus replayed."""
    out = work.good(
        "sft.py",
        *("--model_name_or_path", "model", "--data", "train.json", "held.json", "--validation_split", "0.2"),
        *(
            "--bf16",
            "--train_on_prompt",
            "--replay_data",
            "corpus.txt",
            "--replay_ratio",
            "0.5",
            "--max_seq_length",
            80,
        ),
        *("--max_steps", 3, "--eval_samples", 0, "--per_device_train_batch_size", 4, "--output_dir", "other"),
    )
    examples, tokens, supervised = re.search(r"(\d+) examples, ([\d,]+) tokens \(([\d,]+) supervised\)", out).groups()
    assert (examples, tokens) == ("20", supervised)
    assert "template alpaca" in out  # the model has none of its own
    lines = work.metrics("other")
    check_metrics(lines, 3, 1, TrainConfig())
    mean = int(tokens.replace(",", "")) / 20
    assert lines[-1]["tokens"] == pytest.approx(3 * (4 * mean + 2 * 80), rel=0.1)  # a step: 4 examples and 2 blocks
    check_moved(work.weights("model"), work.weights("other/export"))
    assert all(tensor.dtype == torch.float32 for tensor in work.weights("other/export").values())


def test_the_export_ends_where_its_tokenizer_does(work):
    """transformers' GPT2Config says 50256 whatever the vocabulary; generate() would never stop at our end of text."""
    GPT(GPTConfig(4096, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(work.folder / "default")
    tokenizer = Tokenizer.tiny()
    run = ("--tokenizer_name", "tiny", "--max_steps", 1, "--model_name_or_path", "default")
    work.good("sft.py", *run, "--data", "train.json", "--eval_samples", 0, "--output_dir", "default/sft")
    work.good("train.py", *run, "--data", "corpus.txt", "--sample_tokens", 0, "--output_dir", "default/train")
    for script in ("sft", "train"):
        for name in ("config.json", "generation_config.json"):
            values = json.loads((work.folder / "default" / script / "export" / name).read_text())
            assert (values["bos_token_id"], values["eos_token_id"]) == (tokenizer.eot_id, tokenizer.eot_id)


def test_a_single_example_leaves_nothing_to_evaluate_on(work, pretrained):
    (work.folder / "one.jsonl").write_text('{"prompt": "Hello?", "completion": "Hello."}\n')
    out = work.good(
        *("sft.py", "--model_name_or_path", "pretrained/export", "--data", "one.jsonl"),
        *("--max_steps", 1, "--output_dir", "one"),
    )
    assert "template alpaca" in out  # the folder's is that of raw text, which has no turns to teach
    assert "val" not in out
    assert [set(line) for line in work.metrics("one")] == [STEP]


def test_inspect(work, tuned):
    out = work.good("sft.py", "--model_name_or_path", "tuned/export", "--data", "train.json", "--inspect", 2)
    first = "### Request:\nSay it twice.\n\n### Input:\nsunday\n\n### Output:\n[sunday sunday<|endoftext|>]\n"
    head, rest = out.split("\n", 1)
    assert re.fullmatch(r"---- train.json:1: \d+ tokens, \d supervised, 0 cut", head)
    assert rest.startswith(first)
    assert out.count("---- ") == 2
    assert re.fullmatch(
        r"train.json: 16 examples, \d+ tokens \(\d+ supervised\), lengths p50 \d+ p95 \d+ max \d+; "
        r"0 dropped, 0 cut, 0 bad records",
        out.splitlines()[-1],
    )


def test_eval_only(work, tuned):
    out = work.good("sft.py", "--model_name_or_path", "tuned/export", "--data", "held.json", "--eval_only")
    val_loss = work.metrics("tuned")[-1]["val_loss"]
    assert out.splitlines()[-1] == f"loss {val_loss:.4f}, perplexity {math.exp(val_loss):.2f}"


def test_what_predict_writes_is_what_chat_says(work, tuned):
    """Also: without --template both read the one that travels with the model."""
    model = ("--model_name_or_path", "tuned/export", "--max_new_tokens", 12)
    out = work.good("sft.py", *model, "--predict", "held.json", "--output_dir", "answers")
    assert re.fullmatch(
        r"answers/predictions.jsonl: 4 answers: exact match \S+%, ROUGE-L \S+, \S+% ended with end-of-text\n"
        r"answers/predictions.html: open it in a browser\n",
        out,
    )
    lines = [json.loads(line) for line in (work.folder / "answers" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prompt"][0]["input"] for line in lines] == ["windday", "windlight", "windfall", "windy"]
    scores = json.loads((work.folder / "answers" / "scores.json").read_text())
    assert scores["answers"] == 4
    code, message = work.bad("sft.py", *model, "--predict", "held.json", "--output_dir", "answers")
    assert (code, message) == (
        1,
        "answers/predictions.jsonl: already exists; give another --output_dir, or --overwrite_output_dir",
    )
    said = work.good("chat.py", *model, "--prompt", "Say it twice.", "--input", "windday")
    assert said == lines[0]["prediction"] + "\n"


# ---- chat.py


def test_chat_reads_standard_input(work, tuned):
    """A turn for each line, until an empty one. Answers go to standard output, all else to standard error."""
    model = ("--model_name_or_path", "tuned/export", "--max_new_tokens", 12)
    one = work.good("chat.py", *model, "--prompt", "Say it twice.")
    done = work("chat.py", *model, stdin="Say it twice.\nAnd again, 日本?\n\nnever read\n")
    assert done.code == 0
    assert done.err == "tuned/export: template iio; an empty line ends\n"
    assert done.out.startswith(one)
    assert "\ufffd" not in done.out


@pytest.mark.parametrize("lighter", [("--bf16",), ("--quantize", "fp16"), ("--quantize", "int8")], ids=" ".join)
def test_chat_says_what_lighter_weights_cost(work, tuned, lighter):
    model = ("--model_name_or_path", "tuned/export", "--max_new_tokens", 4)
    done = work("chat.py", *model, *lighter, "--prompt", "Say it.")
    cost = rf"perplexity \S+ in fp32, \S+ in {lighter[-1].strip('-')} \(\S+%\), over \d+ tokens of English\n"
    assert done.code == 0
    emulated = (
        r"(bf16 is emulated here: a product takes \d+ times as long as in fp32\n)?" if "--bf16" in lighter else ""
    )
    assert re.fullmatch(emulated + cost, done.err)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("script", "line", "code", "message"),
    [
        ("sft.py", "--model_name_or_path ./none --data train.json", 1, "./none: no such folder (and not a hub id"),
        ("train.py", "--config_name ./none --tokenizer_name tiny --data corpus.txt", 1, "./none: no such folder"),
        ("chat.py", "--model_name_or_path runs/sft/export", 1, "runs/sft/export: no such folder (and not a hub id"),
        ("chat.py", "--model_name_or_path model --top_p 0", 2, "--top_p must be above 0 and at most 1, got 0.0"),
        ("chat.py", "--model_name_or_path model --temperature -1", 2, "--temperature must be at least 0 and finite"),
        ("chat.py", "--model_name_or_path model --quantize int4", 2, "--quantize: expected one of int8, fp16, got"),
        ("chat.py", "--model_name_or_path model --quantize int8 --bf16", 2, "--quantize and --bf16 are alternatives"),
        ("sft.py", "--model_name_or_path model --data train.json --quantize int8", 2, "--quantize needs --predict"),
        (
            "selfinstruct.py",
            "--api_base http://127.0.0.1:1/v1 --api_model m --batch_dir b --quantize int8",
            2,
            "--quantize needs --model_name_or_path",
        ),
        ("chat.py", "--prompt Hi", 1, "--model_name_or_path is needed: a folder or a hub id"),
        ("sft.py", "--model_name_or_path model", 1, "--data is needed: a file, a folder, a glob or hf://datasets/"),
        ("sft.py", "--model_name_or_path model --data trian.json", 1, "trian.json: no such file or folder (did"),
        ("sft.py", "--model_name_or_path model --data train.json --predict none.json", 1, "none.json: no such file"),
        ("sft.py", "--learning_rte 1", 2, "unknown flag --learning_rte (did you mean --learning_rate?)"),
        ("sft.py", "--seed x", 2, "--seed: expected a whole number, got 'x'"),
        ("train.py", "--data corpus.txt", 2, "give either --model_name_or_path, to continue from a model, or"),
        ("chat.py", "--model_name_or_path model --template alpca", 1, "no template 'alpca'; one of alpaca,"),
        ("sft.py", "--model_name_or_path model --data train.json --max_seq_length 97", 1, "--max_seq_length 97 is"),
        ("train.py", "--model_name_or_path model --data corpus.txt --block_size 97", 1, "--block_size 97 is more than"),
        ("sft.py", "--model_name_or_path small --data train.json", 1, "the tokenizer has 4,096 ids, the model's"),
        ("sft.py", "--model_name_or_path model --data train.json --output_dir tuned", 1, "tuned: holds a run"),
        ("sft.py", "--model_name_or_path model --data bad.jsonl", 1, "bad.jsonl:2: "),
        ("sft.py", "--model_name_or_path model --max_steps 0", 2, "--max_steps must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(work, tuned, small_model, script, line, code, message):
    (work.folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    found = work.bad(script, *line.split())
    assert found[0] == code
    assert found[1].startswith(message)
    assert not list(work.folder.glob("runs/*/config.yaml"))  # no folder is taken for a run that never began


@pytest.fixture(scope="session")
def small_model(work):
    """A model whose embedding is smaller than its tokenizer's vocabulary."""
    GPT(GPTConfig(300, n_positions=96, n_embd=32, n_layer=2, n_head=2)).save_pretrained(work.folder / "small")
    Tokenizer.tiny().save_pretrained(work.folder / "small")


def test_a_chat_is_one_process(work):
    """Under torchrun each rank read the questions, and all answered."""
    code, message = work.bad("chat.py", "--model_name_or_path", "model", "--prompt", "Hi", WORLD_SIZE="2", RANK="0")
    assert (code, message) == (1, "a chat needs one process alone: start it with python")


def test_debug_shows_the_traceback(work):
    done = work("sft.py", "--model_name_or_path", "./none", "--debug")
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):\n")
    assert "FileNotFoundError: ./none: no such folder" in done.err.splitlines()[-1]


# ---- the hub


def test_only_a_hub_id_asks_the_network(work):
    """And so the other tests, which are not to ask it, can fail."""
    with pytest.raises(AssertionError, match="asked the network"):
        work("chat.py", "--model_name_or_path", "owner/name")


def test_a_model_and_data_from_the_hub(work, tuned, hub_server):
    """Main holds a pickle only, as many old repositories do: it is refused, with where the safetensors are."""
    main, converted = hub_server.root / "owner" / "name", hub_server.root / "owner" / "name@refs%2Fpr%2F1"
    shutil.copytree(work.folder / "tuned" / "export", converted)
    shutil.copytree(converted, main)
    (main / "model.safetensors").rename(main / "pytorch_model.bin")
    data = hub_server.root / "datasets" / "owner" / "words"
    data.mkdir(parents=True)
    shutil.copy(work.folder / "train.json", data)

    run = ("--model_name_or_path", "owner/name", "--data", "hf://datasets/owner/words/train.json", "--max_steps", 1)
    done = work("sft.py", *run, "--output_dir", "hub", **hub_server.env)
    assert done.code == 1
    assert done.err == (
        "error: owner/name: only a pickle (pytorch_model.bin), which can run code and is never opened; "
        "on the hub a safetensors copy is usually at --revision refs/pr/1\n"
    )
    out = work("sft.py", *run, "--revision", "refs/pr/1", "--output_dir", "hub", **hub_server.env)
    assert (out.code, sorted(path.name for path in (work.folder / "hub" / "export").iterdir())) == (0, EXPORT)
    assert "owner/name: " in out.out
    assert "template iio" in out.out
    assert get_template(work.folder / "hub" / "export") == get_template(work.folder / "tuned" / "export")

    hub_server.requests.clear()  # and from the cache, offline
    chat = ("--model_name_or_path", "owner/name", "--revision", "refs/pr/1", "--prompt", "Hi", "--max_new_tokens", 4)
    offline = work("chat.py", *chat, **{**hub_server.env, "HF_HUB_OFFLINE": "1"})
    local = work.good("chat.py", "--model_name_or_path", "tuned/export", *chat[4:])
    assert (offline.code, offline.out, hub_server.requests) == (0, local, [])
