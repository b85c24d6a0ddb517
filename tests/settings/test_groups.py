"""The settings that scripts share: what is refused, and what they say to others."""

import pytest

from minigpt.settings.groups import PromptArguments, SamplingArguments, ServeArguments, TrainConfig, require


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be above 0 and finite, got nan"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon must be above 0 and finite, got 0.0"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must be above 0, got -1.0"),
        ({"weight_decay": -0.1}, "--weight_decay must be at least 0, got -0.1"),
        ({"warmup_steps": -1}, "--warmup_steps must be at least 0, got -1"),
        ({"seed": -1}, "--seed must be at least 0 and below 2^63, got -1"),
        ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and below 1, got 1.0"),
        ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0 and below 1, got -0.1"),
        ({"min_lr_ratio": 1.1}, "--min_lr_ratio must be between 0 and 1, got 1.1"),
        *(
            ({name: 0}, f"--{name} must be at least 1, got 0")
            for name in (
                "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                "gradient_accumulation_steps", "eval_steps", "logging_steps",
            )
        ),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else None,
)  # fmt: skip
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": float("inf")}, "--temperature must be at least 0 and finite, got inf"),
        ({"repetition_penalty": float("inf")}, "--repetition_penalty must be above 0 and finite, got inf"),
    ],
)
def test_what_no_model_can_draw_by_is_refused_at_the_start(changes, message):
    """A server took it, and failed at every request."""
    with pytest.raises(ValueError) as error:
        SamplingArguments(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes", [{"host": "::1"}, {"port": 0}, {"api_key": "k"}, {"max_batch_size": 1}, {"max_queue": 0}], ids=str
)
def test_settings_of_a_server_are_refused_where_there_is_none(changes):
    """`chat.py --port 9000` opened a chat in the terminal, and whoever asked at the port found nobody."""
    [name] = changes
    with pytest.raises(ValueError, match=f"^--{name} goes with --serve$"):
        ServeArguments(**changes)
    assert getattr(ServeArguments(serve=True, **changes), name) == changes[name]


def test_a_key_in_the_environment_is_no_flag(monkeypatch):
    monkeypatch.setenv("MINIGPT_API_KEY", "k")
    assert ServeArguments().api_key is None
    assert ServeArguments(serve=True).api_key == "k"


def test_edges_of_the_ranges_are_in():
    SamplingArguments(max_new_tokens=1, temperature=0, top_p=1, seed=0)
    TrainConfig(weight_decay=0, warmup_steps=0, seed=0, adam_beta1=0, min_lr_ratio=0, dropout=0, max_steps=1)
    TrainConfig(min_lr_ratio=1, max_grad_norm=float("inf"), max_steps=None, dropout=None)


def test_dropout_changes_all_three_of_the_model_and_only_where_it_is_set():
    assert TrainConfig().config_changes == {}
    assert TrainConfig(dropout=0.0).config_changes == {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_trigger_words_by_the_names_of_get_template():
    assert PromptArguments(trigger_input="Text", trigger_human="User").triggers == {
        "instruction": None,
        "input": "Text",
        "output": None,
        "human": "User",
        "assistant": None,
    }


def test_what_is_needed_and_missing_is_named():
    assert require(TrainConfig(output_dir="a"), "output_dir", "a folder") == "a"
    with pytest.raises(ValueError, match="^--output_dir is needed: a folder$"):
        require(TrainConfig(), "output_dir", "a folder")
