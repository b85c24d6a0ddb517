"""llama.cpp's side of generate.py, for a python that has llama-cpp-python, gguf and numpy, and needs no torch.

    python benchmarks/llama_peer.py FOLDER f16 PROMPT_TOKENS NEW_TOKENS THREADS

Writes the GPT-2 checkpoint in FOLDER as GGUF, says it is ready, then answers each line on stdin with a measurement:
one prompt is read and continued greedily.
"""

import ctypes
import json
import resource
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from prompts import random_prompts

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The fp32 tensors of a file, memory-mapped."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    return {
        name: data[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_gguf(folder: Path, kind: str) -> Path:
    """llama.cpp's `gpt2` architecture. The tokens' texts are made up: only ids are used."""
    config = json.loads((folder / "config.json").read_text())
    quantization, file_type = TYPES[kind]
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        name, _, part = name.removeprefix("transformer.").rpartition(".")
        block = ""
        if name.startswith("h."):
            _, layer, name = name.split(".", 2)
            block = f"blk.{layer}."
            tensor = tensor.T if tensor.ndim == 2 else tensor  # Conv1D's are (in,out)
        matrix = tensor.ndim == 2 and name != "wpe"  # llama.cpp's own conversion leaves positions and vectors in fp32
        own = quantization if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            f"{block}{NAMES[name]}.{part}", gguf.quants.quantize(np.ascontiguousarray(tensor), own), raw_dtype=own
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    folder, kind, (prompt_tokens, new_tokens, threads) = Path(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:6])
    [prompt] = random_prompts(1, prompt_tokens)
    model = llama_cpp.Llama(
        str(write_gguf(folder, kind)),
        n_ctx=prompt_tokens + new_tokens,
        n_batch=prompt_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run(count: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        ids = prompt
        for _ in range(count):
            tokens = (ctypes.c_int32 * len(ids))(*ids)  # a batch only points to it
            if code := llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids))):
                raise SystemExit(f"error: llama_decode returned {code}")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            ids = [int(logits.argmax())]

    run(4)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run(new_tokens)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"tokens_per_s": new_tokens / seconds, "peak_rss": peak}), flush=True)


if __name__ == "__main__":
    main()
