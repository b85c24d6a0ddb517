"""What compare_commits.py runs in both trees: functions that use the library through its public names alone.

    PYTHONPATH=TREE python -P tests/compare_driver.py FUNCTION [ARGUMENT ...]

Each function reads and writes files in the working directory. Both trees run this same file, so a name it uses must
mean the same in both: take only what `minigpt` exports.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import minigpt
from minigpt import (
    GPT,
    Conversation,
    GPTConfig,
    Tokenizer,
    TrainConfig,
    collate,
    encode_example,
    generate,
    get_template,
    make_engine,
    read_records,
    stream,
    train,
)

TEMPLATES = ("alpaca", "alpaca-short", "hugchat", "input-output", "io", "iio")
TEXTS = ["Say it twice.", "After sunday comes moonlight, 日本, and", "Rest? Then"]


def inputs() -> None:
    """Models and data. Every weight is random with std 0.2: a wrong GELU or a bias left out then shows in any output.

    model/ has dropout, dry/ has none, babbler/ writes lists of tasks.
    """
    tokenizer = Tokenizer.tiny()
    ends = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    for folder, dropout in (("model", 0.1), ("dry", 0.0)):
        torch.manual_seed(0)
        dropouts = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        shape = {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
        model = GPT(GPTConfig(tokenizer.vocab_size, **shape, **dropouts, **ends))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder, 96)
    writers = runpy.run_path(str(Path(__file__).parent / "selfinstruct" / "fake_generators.py"))
    writers["random_text_model"](tokenizer).save_pretrained("babbler")
    tokenizer.save_pretrained("babbler", 256)

    words = [f"{a}{b}" for a in ("sun", "moon", "rain", "snow", "wind") for b in ("day", "light", "fall", "y")]
    rows: list[dict[str, Any]] = [  # of many lengths
        {"instruction": f"Say it {i % 4 + 1} times.", "input": word, "output": " ".join([word] * (i % 4 + 1))}
        for i, word in enumerate(words)
    ]
    seed_tasks = [
        {"instruction": f"{verb} {word}.", "instances": [{"input": "", "output": f"The {word}."}]}
        for verb, word in zip(writers["VERBS"], writers["WORDS"], strict=False)
    ]
    Path("train.json").write_text(json.dumps(rows[:-4]))
    Path("held.json").write_text(json.dumps(rows[-4:]))
    Path("corpus.txt").write_text("".join(f"After {word} comes {word}, and then rest.\n" for word in words) * 3)
    Path("seeds.jsonl").write_text("".join(json.dumps(task) + "\n" for task in seed_tasks))
    Path("zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))


def data() -> None:
    """Every template's text, ids and mask, and a padded batch."""
    tokenizer = Tokenizer.from_pretrained("model")
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Repeat it.", "input": "日本 sunday"},
        {"role": "assistant", "content": "日本 sunday"},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "No."},
    ]
    records, texts, batches = list(read_records(["train.json"])), {}, {}
    for name in TEMPLATES:
        template = get_template(name)
        conversations = [*records[:3], Conversation(talk[1:3]), Conversation(talk)]
        examples = [encode_example(one, template, tokenizer, max_seq_length=40) for one in conversations]
        texts[name] = ["".join(segment.text for segment in template.render(one.messages)) for one in conversations]
        batches[f"{name}.inputs"], batches[f"{name}.targets"] = collate(
            [example for example in examples if example is not None], tokenizer.eot_id
        )
    Path("texts.json").write_text(json.dumps(texts, indent=1))
    save_file(batches, "batches.safetensors")


def logits(folder: str) -> None:
    tensors = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = GPT.from_pretrained(folder, dtype=dtype)
        idx, targets = _batch(model)
        with torch.no_grad():
            tensors[f"{name}.logits"] = model(idx)
            tensors[f"{name}.last_only"] = model(idx, last_only=True)
            tensors[f"{name}.positions"] = model(idx, positions=torch.arange(5, 45))
            nll_sum, n_tokens = model(idx, targets)
        tensors |= {f"{name}.nll_sum": nll_sum, f"{name}.n_tokens": torch.as_tensor(n_tokens)}
    save_file(tensors, "logits.safetensors")


def gradients() -> None:
    """Without dropout, with it, and with it in bf16 autocast."""
    for name, folder, bf16 in (("dry", "dry", False), ("dropout", "model", False), ("bf16", "model", True)):
        model = GPT.from_pretrained(folder).train()
        idx, targets = _batch(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            nll_sum, n_tokens = model(idx, targets)
        (nll_sum / n_tokens).backward()
        grads = {key: p.grad.contiguous() for key, p in model.named_parameters() if p.grad is not None}
        save_file(grads, f"{name}.safetensors")


def steps() -> None:
    """Ten steps of `train` with and without accumulation, with and without dropout; then bf16 and recomputation."""
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    _train("dry", "dry-1", {})
    _train("dry", "dry-3", accumulated)
    _train("model", "dropout-1", {})
    _train("model", "dropout-3", accumulated)
    _train("model", "bf16", {**accumulated, "bf16": True, "gradient_checkpointing": True})


def answers(folder: str) -> None:
    """The ids that `generate` and `stream` give: greedy, drawn, by beams, and with what ends them early."""
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts, eos_id = [tokenizer.encode(text) for text in TEXTS], tokenizer.eot_id
    drawn: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "drawn": {**drawn, "num_return_sequences": 2, "eos_id": eos_id},
        "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7, "eos_id": eos_id},
        "stopped": {**drawn, "stop": ["e", "t"], "tokenizer": tokenizer, "min_new_tokens": 3},
    }
    found: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = GPT.from_pretrained(folder, dtype=dtype)
        for way, settings in ways.items():
            found[f"{name} {way}"] = generate(model, prompts, max_new_tokens=24, batch_size=2, **settings)
        found[f"{name} stream"] = list(stream(model, prompts[1], max_new_tokens=24, **drawn))
    assert all(found.values())
    Path("answers.json").write_text(json.dumps(found, indent=1))


def _batch(model: GPT) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    idx = torch.randint(model.config.vocab_size, (3, 40))
    return idx, idx.roll(-1, 1).masked_fill(torch.rand(3, 40) < 0.3, -100)


def _train(model_folder: str, output_dir: str, settings: dict[str, Any]) -> None:
    tokenizer, template = Tokenizer.from_pretrained(model_folder), get_template("iio")
    train_data, eval_data = (
        [example for one in read_records([name]) if (example := encode_example(one, template, tokenizer, 64))]
        for name in ("train.json", "held.json")
    )
    config = TrainConfig(
        **{"per_device_train_batch_size": 6, **settings},
        output_dir=output_dir,
        max_steps=10,
        save_steps=5,
        eval_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        warmup_steps=2,
    )
    model = GPT.from_pretrained(model_folder)
    engine = make_engine(model, config)
    train(config, engine, train_data, eval_data, export=lambda weights, to: model.save_pretrained(to, weights))
    engine.close()


if __name__ == "__main__":
    assert Path(minigpt.__file__).is_relative_to(os.environ["PYTHONPATH"]), "another tree's minigpt is imported"
    globals()[sys.argv[1]](*sys.argv[2:])
