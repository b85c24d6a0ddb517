"""What a run leaves behind: a folder that minigpt and the rest of the ecosystem open."""

from pathlib import Path

from torch import Tensor

from minigpt.data.prompts import Template
from minigpt.data.tokenizer import Tokenizer
from minigpt.files import whole_file
from minigpt.model.gpt2 import GPT
from minigpt.version import __version__


def export(
    folder: str | Path,
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    state_dict: dict[str, Tensor] | None = None,
    training: str = "How it was trained is not recorded.",
) -> None:
    """Writes weights, tokenizer, template and model card.

    The folder opens with `GPT.from_pretrained` and `Tokenizer.from_pretrained`, and with transformers'
    AutoModelForCausalLM and AutoTokenizer (chat template included).

    Args:
        folder: made if it does not exist.
        state_dict: weights to write instead of the model's own, such as those an engine gathered.
        training: how the model came about, as Markdown for the card.
    """
    folder = Path(folder)
    model.save_pretrained(folder, state_dict)
    tokenizer.save_pretrained(folder, model_max_length=model.config.n_positions)
    template.save_pretrained(folder)
    with whole_file(folder / "README.md") as path:
        path.write_text(_card(model, template, training), encoding="utf-8")


def _card(model: GPT, template: Template, training: str) -> str:
    config = model.config
    example = [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris."}]
    rendered = "".join(segment.text for segment in template.render(example))
    return f"""---
pipeline_tag: text-generation
tags: [gpt2, minigpt]
---

# A GPT-2 trained with minigpt {__version__}

{config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads, context {config.n_positions}, vocabulary \
{config.vocab_size:,}: {model.num_parameters():,} parameters.

{training}

## Use

    python chat.py --model_name_or_path FOLDER

or, with transformers, `AutoModelForCausalLM.from_pretrained(FOLDER)` and
`AutoTokenizer.from_pretrained(FOLDER).apply_chat_template(messages, add_generation_prompt=True)`.

It was trained on the prompt template `{template.name}`:

```
{rendered}
```

## Limits

A language model of this size repeats what its data taught it and invents the rest. Its answers can be wrong, biased
or harmful, and nothing here filters them.
"""
