"""Sentence embeddings (Reimers and Gurevych 2019, "Sentence-BERT") and deduplication by their cosine similarity.

The embeddings come from the optional package sentence-transformers; the rest is numpy.
"""

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np

from minigpt.data.order import shard
from minigpt.distributed import pick_device, progress_bar
from minigpt.hub import hub_is_reachable, resolve_file

CHUNK_ROWS = 256  # (256, 100000) fp32 cosines take 100 MB


class Embedder:
    """Embeds N texts as unit vectors, (N,C) float32, with a sentence-transformers model.

    >>> embed = Embedder("sentence-transformers/all-MiniLM-L6-v2")
    >>> first, second = embed(["Name a bird.", "Which birds do you know?"])
    >>> float(first @ second)  # cosine similarity
    """

    def __init__(self, name_or_folder: str | Path, device: str | None = None, batch_size: int = 64):
        """
        Args:
            name_or_folder: a hub id, or a folder saved by sentence-transformers or transformers. For a transformers
                model, such as an exported GPT-2, the last hidden states are mean-pooled. Weights must be safetensors.
                (Cosines between GPT-2's mean hidden states are all high, Ethayarajh 2019: choose the threshold by
                inspecting the dropped records.)
            device: cuda, cpu or mps; None: the best available.
            batch_size: texts per batch; batches are formed from texts of similar length.

        Raises:
            ValueError: sentence-transformers is not installed, or cannot read the model.
            FileNotFoundError: no such folder or repository, or it contains no model.
        """
        if not any(resolve_file(name_or_folder, name) for name in ("modules.json", "config.json")):
            raise FileNotFoundError(f"{name_or_folder}: not a model folder: neither modules.json nor config.json")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{name_or_folder}: embeddings need sentence-transformers "
                "(pip install -c constraints.txt -e '.[curation]')"
            ) from None
        try:
            with redirect_stderr(StringIO()):  # hides its progress bars, which it draws even without a terminal
                self.model = SentenceTransformer(
                    str(name_or_folder),
                    device=pick_device(device),
                    local_files_only=Path(name_or_folder).is_dir() or not hub_is_reachable(),
                    model_kwargs={"use_safetensors": True},
                )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{name_or_folder}: sentence-transformers cannot read it ({error})") from error
        if self.model.tokenizer.pad_token is None:  # as for GPT-2; any id will do, as padding is masked
            self.model.tokenizer.pad_token = self.model.tokenizer.eos_token
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N,C) float32. Texts longer than the model's maximum length are truncated."""
        vectors: dict[int, np.ndarray] = {}
        with progress_bar(len(texts), "text", "embedding") as bar:
            for indices in shard([len(text) for text in texts], self.batch_size):
                embeddings = self.model.encode(
                    [texts[index] for index in indices],
                    batch_size=self.batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                vectors.update(zip(indices.tolist(), embeddings, strict=True))
                bar.update(len(indices))
        return np.stack([vectors[index] for index in range(len(texts))]) if texts else np.empty((0, 0), np.float32)


def nearest_kept(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Greedy deduplication: for each vector the most similar earlier kept vector, and their cosine.

    A vector is kept if that cosine is below the threshold.

    >>> vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)  # cosines: 0.8 (1st, 2nd), 0.6 (2nd, 3rd), 0
    >>> nearest, cosines = nearest_kept(vectors, 0.5)
    >>> nearest.tolist(), cosines.tolist()
    ([-1, 0, 0], [-inf, 0.800000011920929, 0.0])

    The second is dropped because of the first. The third is kept: its cosine with the second is 0.6, but the second
    was dropped.

    Args:
        vectors: (N,C) float32, of unit length.
        threshold: cosine.

    Returns:
        (N,) indices, -1 if no earlier vector was kept, and (N,) cosines. On ties the first index wins.
    """
    count = len(vectors)
    nearest, cosines = np.full(count, -1), np.full(count, -np.inf, np.float32)
    kept = np.empty_like(vectors)
    kept_indices = np.empty(count, np.int64)
    size = 0  # number of kept vectors
    with progress_bar(count, "text", "comparing") as bar:
        for start in range(0, count, CHUNK_ROWS):
            chunk = vectors[start : start + CHUNK_ROWS]  # (R,C)
            best_index, best = nearest[start : start + CHUNK_ROWS], cosines[start : start + CHUNK_ROWS]  # views
            if size:
                similar = chunk @ kept[:size].T  # (R,C) @ (C,S) -> (R,S)
                column = similar.argmax(1)
                best_index[:] = kept_indices[column]
                best[:] = similar[np.arange(len(chunk)), column]
            within = chunk @ chunk.T  # (R,R)
            for row in range(len(chunk)):
                if best[row] >= threshold:
                    continue
                kept[size], kept_indices[size] = chunk[row], start + row
                size += 1
                nearer = within[row, row + 1 :] > best[row + 1 :]
                best[row + 1 :][nearer] = within[row, row + 1 :][nearer]
                best_index[row + 1 :][nearer] = start + row
            bar.update(len(chunk))
    return nearest, cosines
