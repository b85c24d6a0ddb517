#!/usr/bin/env bash
# What a GPU does, in one command and under 10 minutes: training in fp16 and bf16 under ZeRO-1 (124M, and XL if it
# fits), memory beside --plan's, generation, a chat, a kill and a resume. Prints a Markdown table for LOG.md, and
# writes it to runs/gpu/table.md; what happens meanwhile goes to standard error. benchmarks/gpu.py does the work.
#
#     benchmarks/gpu.sh                # every GPU of this machine
#     benchmarks/gpu.sh --ranks 1      # one of them
#     benchmarks/gpu.sh --cpu          # a rehearsal: tiny shapes, two processes over gloo
#
# No network is used where a folder wheels/ lies beside this repository's README.md: what Python lacks is then
# installed from there. PyTorch itself must be there already. Fill the folder on a machine that has a network and the
# same Python and platform (`pip wheel`, because DeepSpeed is published as source only; `pip download -d wheels ...`
# does for all others):
#
#     DS_BUILD_OPS=0 pip wheel --no-deps -w wheels -c constraints.txt deepspeed hjson einops msgpack ninja packaging \
#         psutil py-cpuinfo pydantic pydantic-core annotated-types typing-inspection tyro typeguard docstring-parser \
#         typing-extensions rouge-score absl-py nltk click joblib six regex tiktoken tqdm safetensors pyyaml numpy \
#         requests urllib3 idna certifi charset-normalizer huggingface-hub filelock fsspec hf-xet httpx httpcore \
#         h11 anyio
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
    source=()
    if [[ -d wheels ]]; then
        source=(--no-index --find-links wheels)
    fi
    echo "installing ${lacking[*]}" >&2
    "$python" -m pip install -q --disable-pip-version-check -c constraints.txt "${source[@]}" "${lacking[@]}" >&2
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" benchmarks/gpu.py "$@"
