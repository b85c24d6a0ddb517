#!/usr/bin/env bash
# What a GPU does, in one command and under 10 minutes: training in fp16 and bf16 under ZeRO-1 (124M, and XL if it
# fits), memory beside --plan's, generation, a chat, a kill and a resume. Prints a Markdown table for LOG.md, and
# writes it to runs/gpu/table.md; what happens meanwhile goes to standard error. benchmarks/gpu.py does the work.
#
#     benchmarks/gpu.sh                # every GPU of this machine
#     benchmarks/gpu.sh --ranks 1      # one of them
#     benchmarks/gpu.sh --cpu          # a rehearsal: tiny shapes, two processes over gloo
#
# Needs a Python that has PyTorch with CUDA. What else is missing is installed, and nothing that is there is changed.
# With a folder wheels/ beside README.md that needs no network. Fill it on a machine with the same Python and platform;
# `pip wheel` because DeepSpeed and rouge-score are published as source, and DeepSpeed on a line of its own so that
# PyTorch does not come with it (`pip download -d wheels` does for all that is published built):
#
#     DS_BUILD_OPS=0 pip wheel --no-deps -w wheels -c constraints.txt deepspeed
#     pip wheel -w wheels -c constraints.txt einops hjson msgpack ninja packaging psutil py-cpuinfo pydantic tqdm \
#         rouge-score tyro tiktoken safetensors pyyaml huggingface-hub
#
# PYTHON names the interpreter (default: the active environment's, else python3). Without an active environment a
# .venv-gpu that sees the interpreter's own packages is made, and nothing is installed outside it.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
# module to import:requirement to install
needed=(deepspeed:deepspeed hjson:hjson tyro:tyro docstring_parser:docstring-parser rouge_score:rouge-score
    tiktoken:tiktoken safetensors:safetensors yaml:pyyaml tqdm:tqdm huggingface_hub:huggingface_hub numpy:numpy)

missing() { # the requirements whose modules this Python has not, one a line
    "$python" - "${needed[@]}" <<'PYTHON'
import importlib.util
import sys

for pair in sys.argv[1:]:
    module, requirement = pair.split(":")
    if importlib.util.find_spec(module) is None:
        print(requirement)
PYTHON
}

absent() { # the files of wheels/ whose package this Python has not
    "$python" - <<'PYTHON'
import re
from importlib.metadata import distributions
from pathlib import Path

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

installed = {plain(found.name) for found in distributions()}
print("\n".join(str(file) for file in Path("wheels").glob("*.whl") if plain(file.name.split("-")[0]) not in installed))
PYTHON
}

pins() { # what is installed stays as it is, PyTorch above all; of the rest, the tested versions
    "$python" - <<'PYTHON'
import re
from importlib.metadata import distributions
from pathlib import Path

pins = [line for line in Path("constraints.txt").read_text().splitlines() if "==" in line]
pins += [f"{found.name}=={found.version}" for found in distributions() if found.name not in ("pip", "setuptools")]
print("\n".join({re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower(): pin for pin in pins}.values()))
PYTHON
}

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "error: $python has no PyTorch: activate the environment that has, or name its interpreter with PYTHON=" >&2
    exit 2
fi
mapfile -t lacking < <(missing)
if ((${#lacking[@]})); then
    if ! "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then # no environment is active
        "$python" -m venv --system-site-packages .venv-gpu
        python=$PWD/.venv-gpu/bin/python
        mapfile -t lacking < <(missing)
    fi
fi
if ((${#lacking[@]})); then
    echo "installing ${lacking[*]}" >&2
    install=("$python" -m pip install -q --disable-pip-version-check)
    if [[ -d wheels ]]; then # complete among themselves, so nobody asks what PyTorch would like to have beside it
        mapfile -t files < <(absent)
        "${install[@]}" --no-index --no-deps "${files[@]}" >&2
    else
        "${install[@]}" -c <(pins) "${lacking[@]}" >&2
    fi
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" benchmarks/gpu.py "$@"
