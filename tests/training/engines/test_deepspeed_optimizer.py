"""The sections optimizer and scheduler of a DeepSpeed JSON: completed, turned into flags, or refused by name."""

import pytest

from minigpt.settings.groups import TrainConfig


def test_the_optimizer_section_is_completed(complete):
    optimizer = {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": True, "betas": ["auto", 0.999]}}
    assert complete({"optimizer": optimizer})[0]["optimizer"] == {
        "type": "Adam",
        "params": {
            "torch_adam": True,
            "adam_w_mode": True,
            "lr": 5e-5,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
    }
    assert "optimizer" not in complete({"optimizer": "auto"})[0]
    assert complete({"optimizer": {"type": "ADAMW"}})[0]["optimizer"]["params"]["lr"] == 5e-5


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        *(({"type": kind}, f'optimizer.type "{kind}" is not possible here: AdamW is what checkpoints hold')
          for kind in ("Lamb", "OneBitAdam", "Lion", "Muon", "SGD")),
        ({"params": {"lr": 1}}, "optimizer.type null is not possible here: AdamW is what checkpoints hold"),
        ({"type": "Adam", "params": {"adam_w_mode": False}},
         "optimizer.params.adam_w_mode false is not AdamW as it is trained here (write true, or take it out)"),
        ({"type": "Adam", "params": {"amsgrad": True}},
         "optimizer.params.amsgrad true is not AdamW as it is trained here (write false, or take it out)"),
        ({"type": "Adam", "params": {"bias_correction": False}},
         "optimizer.params.bias_correction false is not AdamW as it is trained here (write true, or take it out)"),
        ({"type": "Adam", "params": {"max_grad_norm": 1}},
         "optimizer.params.max_grad_norm is not known here (gradient_clipping does that)"),
        ({"type": "Adam", "params": {"freeze_step": 1}},
         "optimizer.params.freeze_step is not known here (take it out)"),
    ],
    ids=str,
)  # fmt: skip
def test_other_optimizers_are_refused_by_name(refusal, optimizer, message):
    assert refusal({"optimizer": optimizer}) == f"x.json: {message}"


def test_a_scheduler_becomes_flags(complete):
    params = {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 10, "warmup_type": "linear",
              "total_num_steps": 100}  # fmt: skip
    whole, config = complete({"scheduler": {"type": "WarmupDecayLR", "params": params}}, "--max_steps 100")
    assert "scheduler" not in whole
    assert config == TrainConfig(
        deepspeed="x.json", max_steps=100, learning_rate=3e-4, warmup_steps=10, lr_scheduler_type="linear"
    )


def test_the_rates_are_those_of_deepspeeds_scheduler(complete, monkeypatch):
    """The loop's rates against DeepSpeed's own schedulers, the warmup and the cosine one step ahead of theirs."""
    import torch

    from minigpt.training.optim import learning_rate

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip("deepspeed.runtime.lr_schedules", reason="DeepSpeed is on Linux only")
    for kind, ahead in (("WarmupLR", 0), ("WarmupDecayLR", 0), ("WarmupCosineLR", 1)):
        params = {"warmup_num_steps": 4, "warmup_type": "linear"}
        if kind != "WarmupLR":
            params["total_num_steps"] = 20
        if kind == "WarmupCosineLR":
            params["cos_min_ratio"] = 0.25
        else:
            params["warmup_max_lr"] = 0.5
        flags = "--learning_rate 0.5 --max_steps 20"
        config = complete({"scheduler": {"type": kind, "params": params}}, flags)[1]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = getattr(theirs, kind)(optimizer, **params)
        rates = []
        for _ in range(20):
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        ours = [learning_rate(step, 20, config) for step in range(21)]
        assert ours[:3] == pytest.approx(rates[1:4])
        assert ours[4 + ahead : 20 + ahead] == pytest.approx(rates[4:20])


@pytest.mark.parametrize("steps", [{}, {"warmup_num_steps": "auto"}, {"warmup_num_steps": 0}])
def test_a_warmup_that_the_flags_set_is_a_line(complete, steps):
    flags = "" if steps.get("warmup_num_steps") == 0 else "--warmup_steps 7"
    config = complete({"scheduler": {"type": "WarmupLR", "params": steps}}, flags)[1]
    assert config.warmup_steps == (7 if flags else 0)


@pytest.mark.parametrize(
    ("scheduler", "flags", "message"),
    [
        *(({"type": kind}, "",
           f'scheduler.type "{kind}" has no counterpart here (WarmupLR, WarmupDecayLR, WarmupCosineLR have;'
           " or take the section out and set --lr_scheduler_type and --warmup_steps)")
          for kind in ("OneCycle", "LRRangeTest", "warmuplr")),
        ({"params": {"warmup_num_steps": 1}}, "", "scheduler.type null has no counterpart"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "",
         'scheduler.params.warmup_type is log, and the warmup here is a line: write "linear"'),
        ({"type": "WarmupLR", "params": {"warmup_type": "log"}}, "--warmup_steps 10",
         'scheduler.params.warmup_type is log, and the warmup here is a line: write "linear"'),
        ({"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}, "", "scheduler.params.warmup_type is log, "),
        ({"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}, "",
         "scheduler.params.warmup_min_lr 1e-06: the warmup begins at 0 here (write 0)"),
        ({"type": "WarmupCosineLR", "params": {"warmup_min_ratio": 0.1}}, "",
         "scheduler.params.warmup_min_ratio 0.1: the warmup begins at 0 here (write 0)"),
        ({"type": "WarmupCosineLR", "params": {"warmup_max_lr": 0.1}}, "",
         "scheduler.params.warmup_max_lr is not known of WarmupCosineLR (take it out)"),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}, "",
         'scheduler.params.total_num_steps 9 contradicts --max_steps (unset) (write "auto", or make them equal)'),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}, "--max_steps 8",
         'scheduler.params.total_num_steps 9 contradicts --max_steps 8 (write "auto", or make them equal)'),
        ({"type": "WarmupDecayLR"}, "--lr_scheduler_type cosine",
         'scheduler.type "WarmupDecayLR" contradicts --lr_scheduler_type cosine '),
        ({"type": "WarmupDecayLR"}, "--min_lr_ratio 0.1",
         'scheduler.type "WarmupDecayLR" contradicts --min_lr_ratio 0.1 '),
    ],
    ids=str,
)  # fmt: skip
def test_a_scheduler_that_is_not_ours_is_refused_by_name(refusal, scheduler, flags, message):
    assert refusal({"scheduler": scheduler}, flags).startswith(f"x.json: {message}")
