"""Text generation: greedy, sampling or beam search; for many prompts at once, or streamed for one.

`generate` continues many prompts, `stream` one. See sampling.py for the settings and their effect on the logits,
decoder.py for continuous batching, beams.py for beam search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.beams import beam_search
from minigpt.inference.decoder import Decoder, check_prompt, check_sampling, without_gradients
from minigpt.inference.sampling import Sampling, sequence_seed
from minigpt.model.base import CausalLM

__all__ = ["Sampling", "generate", "stream"]


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_return_sequences: int = 1,
    min_new_tokens: int = 0,
    eos_id: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int | Sequence[int] | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
        model: on any device, in eval mode; on a CPU, `minigpt.inference.packed.for_generation` makes it faster.
        prompts: token ids, at least one per prompt.
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, min_new_tokens, eos_id, stop: see `Sampling`.
            The caller trims the text at a stop string.
        num_beams: above 1: beam search with that many beams; needs temperature 0.
        length_penalty: of beam search; above 0 favours long answers, below 0 short ones.
        num_return_sequences: answers per prompt: independent samples, or the best beams.
        tokenizer: needed for `stop`.
        seed: one integer (prompt i gets seed + i), or one per prompt. Each row has its own random generator, so its
            tokens do not depend on the rest of the batch.
        batch_size: the maximum number of rows in a batch. When a row ends, the next prompt takes its place.

    Returns:
        The new ids of each sequence, including eos_id if it was generated; the sequences of a prompt are adjacent.

    Raises:
        ValueError: a prompt is empty or fills the context, or an argument is out of its range.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        eos_id=eos_id,
        stop=stop,
    )
    check_sampling(sampling, model, tokenizer)
    _check_sequences(sampling, num_beams, num_return_sequences, batch_size)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, model.config.context, f"prompt {index}")
    seeds = seed if isinstance(seed, Sequence) else [None if seed is None else seed + i for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    settings = [replace(sampling, seed=sequence_seed(s, index)) for s in seeds for index in range(num_return_sequences)]
    if not prompts or max_new_tokens == 0:
        return [[] for _ in settings]
    if num_beams > 1:
        prompts_per_batch = max(1, batch_size // num_beams)
        with without_gradients(model):
            return [
                ids
                for start in range(0, len(prompts), prompts_per_batch)
                for ids in beam_search(
                    model,
                    prompts[start : start + prompts_per_batch],
                    sampling,
                    num_beams=num_beams,
                    length_penalty=length_penalty,
                    num_return_sequences=num_return_sequences,
                    tokenizer=tokenizer,
                )
            ]
    new: list[list[int]] = [[] for _ in settings]
    longest = max(map(len, prompts)) + max_new_tokens
    decoder = Decoder(model, max_rows=min(batch_size, len(settings)), max_length=longest, tokenizer=tokenizer)
    for index, row_settings in enumerate(settings):
        decoder.add(prompts[index // num_return_sequences], row_settings)  # the decoder's keys count from 0
    for key, token, _ in _steps(decoder):
        new[key].append(token)
    return new


def stream(
    model: CausalLM, prompt: Sequence[int], *, max_new_tokens: int, tokenizer: Tokenizer | None = None, **settings: Any
) -> Iterator[int]:
    """Continues one prompt and yields each id when it is generated. Takes the settings of `Sampling`, and raises the
    same errors as `generate`.

    Beam search cannot be streamed: which beam wins is known only at the end.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, **settings)
    check_sampling(sampling, model, tokenizer)
    check_prompt(prompt, model.config.context, "the prompt")
    if max_new_tokens == 0:
        return iter(())
    decoder = Decoder(model, max_rows=1, max_length=len(prompt) + max_new_tokens, tokenizer=tokenizer)
    decoder.add(prompt, sampling)
    return (token for _, token, _ in _steps(decoder))


def _steps(decoder: Decoder) -> Iterator[tuple[int, int, str | None]]:
    while len(decoder):
        yield from decoder.step()


def _check_sequences(sampling: Sampling, num_beams: int, num_return_sequences: int, batch_size: int) -> None:
    for name, value in (
        ("num_beams", num_beams),
        ("num_return_sequences", num_return_sequences),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_beams > 1 and sampling.temperature > 0:
        raise ValueError(f"num_beams {num_beams} is a search, which needs temperature 0, got {sampling.temperature}")
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ValueError(f"num_return_sequences {num_return_sequences} is more than num_beams {num_beams}")
    if num_beams == 1 and num_return_sequences > 1 and sampling.temperature == 0:
        raise ValueError(
            f"num_return_sequences {num_return_sequences} would be equal: set temperature above 0, or num_beams"
        )
