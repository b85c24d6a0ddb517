"""The public corpora that README.md names: a record as published, read at the address that it gives."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minigpt import read_records

from .readme import README

HUMAN = {"instruction": "Human:你好\nAssistant:你好！\nHuman:几点？\nAssistant:", "input": "", "output": "三点。"}
ALPACA = {"instruction": "Name a bird.", "input": "", "output": "The wren."}
PUBLISHED: dict[str, dict[str, Any]] = {
    "tatsu-lab/alpaca": {**ALPACA, "text": "Below is an instruction ..."},
    "chenhaodev/medmcqa_instruct": ALPACA,
    "medalpaca/medical_meadow_medqa": ALPACA,
    "llamafactory/PubMedQA": ALPACA,
    "BelleGroup/train_0.5M_CN": ALPACA,
    "BelleGroup/train_1M_CN": ALPACA,
    "BelleGroup/multiturn_chat_0.8M": HUMAN,
    "nomic-ai/gpt4all-j-prompt-generations": {"prompt": "Name a bird.", "response": "The wren.", "source": "x"},
    "laion/OIG": {"text": "<human>: Name a bird.\n<bot>: The wren.", "metadata": "{}"},
}
ORIGINALS: list[dict[str, Any]] = [  # MedMCQA, MedQA-USMLE and PubMedQA
    {"question": "?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0, "exp": "e"},
    {"question": "?", "answer": "a", "options": {"A": "a", "B": "b"}, "answer_idx": "A"},
    {"question": "?", "context": {"contexts": ["c"]}, "long_answer": "l", "final_decision": "yes"},
]


def test_every_public_corpus_is_read_at_its_address(hub_server, tmp_path):
    addresses = re.findall(r"`hf://datasets/([^/`]+/[^/`]+)/([^`]+)`", README.partition("| corpus |")[2])
    assert {repo for repo, _ in addresses} == set(PUBLISHED)
    for repo, file in addresses:
        path = hub_server.root / "datasets" / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PUBLISHED[repo]]), path)
        else:
            path.write_text(json.dumps(PUBLISHED[repo]) + "\n", encoding="utf-8")
    code = "import sys; from minigpt import read_records\nfor p in sys.argv[1:]: print([*read_records(p)][0].messages)"
    words = [f"hf://datasets/{repo}/{file}" for repo, file in addresses]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **hub_server.env},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bird = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "The wren."}]
    turns = [("user", "你好"), ("assistant", "你好！"), ("user", "几点？"), ("assistant", "三点。")]
    several = [{"role": role, "content": content} for role, content in turns]
    for (repo, _), line in zip(addresses, done.stdout.splitlines(), strict=True):
        assert line == str(several if "multiturn" in repo else bird)

    hugnlp = tmp_path / "instruction_corpora.json"
    hugnlp.write_text(json.dumps({"text": "[Human]: Name a bird. \n [HugChat]: The wren. \n\n"}) + "\n")
    assert next(read_records(hugnlp)).messages == bird
    for record in ORIGINALS:
        hugnlp.write_text(json.dumps(record))
        with pytest.raises(ValueError, match='a record of unknown format, found "question"'):
            list(read_records(hugnlp))
