"""The data that a script's flags name: read, told of in a line, and a part of it held out to evaluate on."""

from collections.abc import Sequence

from minigpt.data.encode import Encoding
from minigpt.data.store import Subset, TokenBlocks, TokenStore, build_store, build_text_store, split
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0
from minigpt.settings.groups import DataArguments


def read_conversations(config: DataArguments, paths: Sequence[str], encoding: Encoding) -> TokenStore:
    """`build_store`, as the flags say."""
    store = build_store(paths, *encoding, skip_bad_records=config.skip_bad_records, cache_dir=config.cache_dir)
    print0(f"{' '.join(paths)}: {store.stats}")
    return store


def read_text(config: DataArguments, paths: Sequence[str], tokenizer: Tokenizer) -> TokenStore:
    """`build_text_store`, as the flags say."""
    store = build_text_store(paths, tokenizer, skip_bad_records=config.skip_bad_records, cache_dir=config.cache_dir)
    stats = store.stats
    print0(
        f"{' '.join(paths)}: {stats.examples:,} documents, {stats.tokens:,} tokens; {stats.bad_records:,} bad records"
    )
    return store


def split_conversations(
    config: DataArguments, encoding: Encoding, seed: int
) -> tuple[TokenStore | Subset, TokenStore | Subset | None]:
    """What to train on, and what to evaluate on: `validation_data`, or some of `data`'s examples drawn at random.

    The draw's `seed` is no setting of the data's, but of the whole run's.
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
    """What to train on, and what to evaluate on: `validation_data`, or the end of `data`'s one stream of tokens.

    The blocks to train on begin every `stride` tokens; those to evaluate on never overlap.
    """
    store = read_text(config, config.data, tokenizer)
    end, held_out = store.stats.tokens, None
    if config.validation_data:
        held_out = TokenBlocks(read_text(config, config.validation_data, tokenizer), block_size)
    elif config.validation_split:
        end -= max(2, round(end * config.validation_split))  # a block of one position takes two tokens
        held_out = TokenBlocks(store, block_size, start=end)
    return TokenBlocks(store, block_size, stride, stop=end), held_out
