"""Sentences as vectors whose cosine says how near they are in meaning (Reimers and Gurevych 2019, "Sentence-BERT").

The vectors come from the optional sentence-transformers; what is done with them is plain numpy.
"""

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np

from minigpt.data.order import shard
from minigpt.distributed import pick_device, progress_bar
from minigpt.hub import hub_is_reachable, resolve_file

ROWS = 256  # compared at once: 100 MB of cosines with 100,000 vectors


class Embedder:
    """Texts to unit vectors, (N,C) in float32, by a model of sentence-transformers.

    >>> embed = Embedder("sentence-transformers/all-MiniLM-L6-v2")
    >>> first, second = embed(["Name a bird.", "Which birds do you know?"])
    >>> float(first @ second)  # their cosine
    """

    def __init__(self, name_or_folder: str | Path, device: str | None = None, batch_size: int = 64):
        """
        Args:
            name_or_folder: a hub id, or a folder that sentence-transformers or transformers wrote; of the latter's
                models, an exported GPT-2 too, the last hidden states are averaged. Weights are safetensors, as
                everywhere. (The averages of a GPT-2 lie close together, Ethayarajh 2019: choose the threshold by
                looking at what it drops.)
            device: cuda, cpu or mps; None is the best there is.
            batch_size: texts encoded together, alike in length.

        Raises:
            ValueError: sentence-transformers is not installed, or cannot read the model.
            FileNotFoundError: no such folder or repository, or no model in it.
        """
        if not any(resolve_file(name_or_folder, name) for name in ("modules.json", "config.json")):
            raise FileNotFoundError(f"{name_or_folder}: neither modules.json nor config.json, so this is not a model")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(
                f"{name_or_folder}: embeddings need sentence-transformers "
                "(pip install -c constraints.txt -e '.[curation]')"
            ) from None
        try:
            with redirect_stderr(StringIO()):  # it draws bars, also where nobody sits at a terminal
                self.model = SentenceTransformer(
                    str(name_or_folder),
                    device=pick_device(device),
                    local_files_only=Path(name_or_folder).is_dir() or not hub_is_reachable(),
                    model_kwargs={"use_safetensors": True},
                )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{name_or_folder}: sentence-transformers cannot read it ({error})") from error
        if self.model.tokenizer.pad_token is None:  # GPT-2's; what stands in the padding is not looked at
            self.model.tokenizer.pad_token = self.model.tokenizer.eos_token
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """A text beyond the model's own length is read up to there."""
        vectors: dict[int, np.ndarray] = {}
        with progress_bar(len(texts), "text", "embedding") as bar:
            for places in shard([len(text) for text in texts], self.batch_size):
                found = self.model.encode(
                    [texts[place] for place in places],
                    batch_size=self.batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                vectors.update(zip(places.tolist(), found, strict=True))
                bar.update(len(places))
        return np.stack([vectors[place] for place in range(len(texts))]) if texts else np.empty((0, 0), np.float32)


def nearest_kept(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """For each vector the nearest one kept before it, and their cosine. Kept is what stays below the threshold.

    >>> vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)  # the cosines: 0.8, 0.6 and, of the outer two, 0
    >>> nearest, cosines = nearest_kept(vectors, 0.5)
    >>> nearest.tolist(), cosines.tolist()
    ([-1, 0, 0], [-inf, 0.800000011920929, 0.0])

    The second falls to the first. The third is 0.6 near to the second, but that is gone: it is kept.

    Args:
        vectors: (N,C) in float32, of unit length.
        threshold: of the cosine.

    Returns:
        (N,) indices, -1 where nothing was kept before, and (N,) cosines. Of equally near ones the first counts.
    """
    count = len(vectors)
    nearest, cosines = np.full(count, -1), np.full(count, -np.inf, np.float32)
    kept = np.empty_like(vectors)
    kept_places = np.empty(count, np.int64)
    size = 0  # how many are kept
    with progress_bar(count, "text", "comparing") as bar:
        for start in range(0, count, ROWS):
            block = vectors[start : start + ROWS]  # (R,C)
            best_place, best = nearest[start : start + ROWS], cosines[start : start + ROWS]  # views
            if size:
                similar = block @ kept[:size].T  # (R,C) @ (C,S) -> (R,S)
                column = similar.argmax(1)
                best_place[:] = kept_places[column]
                best[:] = similar[np.arange(len(block)), column]
            within = block @ block.T  # (R,R)
            for row in range(len(block)):
                if best[row] >= threshold:
                    continue
                kept[size], kept_places[size] = block[row], start + row
                size += 1
                nearer = within[row, row + 1 :] > best[row + 1 :]
                best[row + 1 :][nearer] = within[row, row + 1 :][nearer]
                best_place[row + 1 :][nearer] = start + row
            bar.update(len(block))
    return nearest, cosines
