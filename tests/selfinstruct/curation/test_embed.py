"""Deduplication compared with a double loop, and embeddings compared with transformers."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.curation.embed import Embedder, nearest_kept
from minigpt.selfinstruct.curation.semantic import unique

from .instruction_files import read_lines, task, write

# ---- nearest_kept


def test_the_docstring_example():
    """ArmelRandy's unique_post_processing.py also compares with dropped texts, and would drop the third too."""
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    nearest, cosines = nearest_kept(vectors, 0.5)
    assert nearest.tolist() == [-1, 0, 0]
    assert cosines.tolist() == [-np.inf, np.float32(0.8), 0.0]
    assert nearest_kept(vectors, 0.8)[0].tolist() == [-1, 0, 0]  # equal to the threshold is dropped
    assert nearest_kept(vectors, 0.81)[0].tolist() == [-1, 0, 1]


def test_the_first_index_wins_on_ties():
    vectors = np.array([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5]], np.float32)
    assert nearest_kept(vectors, 0.9)[0].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_chunks_equal_a_double_loop(threshold):
    # 4 chunks and a partial one; at 0.3 few are kept, at 1 all
    vectors = np.random.default_rng(1).normal(size=(1100, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept, expected = [], []
    for index, vector in enumerate(vectors):
        nearest_other = max(((float(vector @ vectors[other]), -other) for other in kept), default=(-np.inf, 1))
        expected.append((-nearest_other[1], nearest_other[0]))
        if nearest_other[0] < threshold:
            kept.append(index)
    assert min(abs(cosine - threshold) for _, cosine in expected[1:]) > 1e-6  # fp32 rounding changes no decision
    nearest, cosines = nearest_kept(vectors.astype(np.float32), threshold)
    assert nearest.tolist() == [index for index, _ in expected]
    np.testing.assert_allclose(cosines, [cosine for _, cosine in expected], atol=1e-6)


def test_the_full_cosine_matrix_is_never_allocated():
    vectors = np.eye(4, dtype=np.float32)[np.arange(8000) % 4]
    distinct = np.random.default_rng(0).normal(size=(8000, 64)).astype(np.float32)
    distinct /= np.linalg.norm(distinct, axis=1, keepdims=True)
    tracemalloc.start()
    assert (nearest_kept(vectors, 0.5)[1] < 0.5).sum() == 4
    assert (nearest_kept(distinct, 0.9)[1] < 0.9).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # (8000, 8000) fp32 takes 256 MB


# ---- embeddings


@pytest.fixture(scope="module")
def bert(tmp_path_factory, sentence_transformers):
    """A tiny random BERT, saved by transformers."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{letter}" for letter in words[5:])]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=57,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_transformers():
    return pytest.importorskip(
        "sentence_transformers",
        reason="sentence-transformers is not installed: pip install -c constraints.txt -e '.[curation]'",
    )


TEXTS = [
    "Name a bird.",
    "Sum",
    "a much longer sentence that is about nothing at all",
    "name a bird",
    "Add two numbers.",
]


def test_embeddings_are_mean_hidden_states_for_any_batch_size(bert, sentence_transformers, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    expected = []
    for text in TEXTS:  # one at a time, without padding
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected.append((mean / mean.norm()).numpy())
    vectors = Embedder(bert, device="cpu", batch_size=2)(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    sentence_transformers.SentenceTransformer(str(bert), device="cpu").save(str(tmp_path / "saved"))
    np.testing.assert_allclose(Embedder(str(tmp_path / "saved"), device="cpu")(TEXTS), expected, atol=1e-5)
    assert Embedder(bert, device="cpu")([]).shape == (0, 0)


def test_an_exported_gpt2_can_embed(sentence_transformers, tmp_path):
    """Its tokenizer has no padding token, which transformers needs for a batch."""
    tokenizer = Tokenizer.tiny()
    torch.manual_seed(0)
    eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, 32, 2, 2, initializer_range=0.5, **eot)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hidden = []
    model.ln_f.register_forward_hook(lambda module, inputs, output: hidden.append(output[0].mean(0)))
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer.encode(text)]))
    expected = [(mean / mean.norm()).numpy() for mean in hidden]
    np.testing.assert_allclose(Embedder(tmp_path, device="cpu")(TEXTS), expected, atol=1e-5)


def test_unique_with_a_real_model(bert, sentence_transformers, tmp_path):
    embed = Embedder(bert, device="cpu")
    records = [task(text) for text in [*TEXTS, *TEXTS]]
    path = write(tmp_path / "a.jsonl", records)
    threshold = float((embed(TEXTS) @ embed(TEXTS).T - 2 * np.eye(5)).max()) + 1e-4
    assert threshold < 0.999 and embed(TEXTS[:1]) @ embed(TEXTS[:1]).T > threshold
    assert unique(str(path), embed, threshold=threshold) == (5, 5, {"similar": 5})
    assert read_lines(tmp_path / "a.unique.jsonl") == records[:5]


def test_a_missing_package_is_an_error_with_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: embeddings need sentence-transformers \(pip"):
        Embedder(tmp_path)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}: not a model folder: neither modules.json nor"):
        Embedder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere/to/be: no such folder"):
        Embedder("nowhere/to/be")


def test_a_damaged_model_is_a_one_line_error(bert, sentence_transformers, tmp_path):
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"^{tmp_path}: sentence-transformers cannot read it \("):
        Embedder(tmp_path, device="cpu")
