"""Reads the data that a script's flags name, prints its statistics, and splits off validation data."""

from collections.abc import Sequence

from minigpt.data.encode import Encoding
from minigpt.data.store import Subset, TokenBlocks, TokenStore, build_store, build_text_store, split
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0
from minigpt.settings.groups import DataArguments


def read_conversations(config: DataArguments, paths: Sequence[str], encoding: Encoding) -> TokenStore:
    """`build_store` with the settings of the flags; prints the statistics."""
    store = build_store(paths, *encoding, skip_bad_records=config.skip_bad_records, cache_dir=config.cache_dir)
    print0(f"{' '.join(paths)}: {store.stats}")
    return store


def read_text(config: DataArguments, paths: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
    """`build_text_store` with the settings of the flags; prints the statistics."""
    store = build_text_store(paths, tokenizer, skip_bad_records=config.skip_bad_records, cache_dir=config.cache_dir)
    stats = store.stats
    print0(
        f"{' '.join(paths)}: {stats.examples:,} documents, {stats.tokens:,} tokens; {stats.bad_records:,} bad records"
    )
    return store


def split_conversations(
    config: DataArguments, encoding: Encoding, seed: int
) -> tuple[TokenStore | Subset, TokenStore | Subset | None]:
    """Training examples of `data`; validation examples of `validation_data`, or else a random sample of `data`.

    `seed` draws the sample; it is not in `config`, because it is a setting of the whole run.
    """
    examples = read_conversations(config, config.data, encoding)
    if config.validation_data:
        return examples, read_conversations(config, config.validation_data, encoding)
    if config.validation_split:
        return split(examples, config.validation_split, seed)
    return examples, None


def split_text(
    config: DataArguments, tokenizer: Tokenizer, block_size: int, stride: int | None = None
) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Training blocks of `data`; validation blocks of `validation_data`, or else of the end of `data`'s token stream.

    Training blocks start every `stride` tokens; validation blocks never overlap.
    """
    store = read_text(config, config.data, tokenizer)
    end, validation = store.stats.tokens, None
    if config.validation_data:
        validation = TokenBlocks(read_text(config, config.validation_data, tokenizer), block_size)
    elif config.validation_split:
        end -= max(2, round(end * config.validation_split))  # one position needs two tokens
        validation = TokenBlocks(store, block_size, start=end)
    return TokenBlocks(store, block_size, stride, stop=end), validation
