"""docs/regenerate.py: what README.md shows of the demonstration, from its log."""

import importlib.util
import json

import pytest

from .readme import README
from .workplace import ROOT

LOG = """\
installing
== 1. A corpus
left out
== 2. train.py: a title
An explanation.
$ python train.py
step 0/20  val_loss 8.3
  sample    'left out'
step 10/20  loss 2.4  val_loss 2.5
step 20/20  loss 1.2  val_loss 1.3  9 tok/s
time             7 s

== 4. Before and after
Another.
  One?
    before  x
    after   1  (right)
  Two?
    before  x
    after   2  (right)
  Three?
    before  x
    after   3  (right)
  Four?
    before  x
    after   4  (right)
  Five?
    before  x
    after   6  (wrong)
  Six?
    before  x
    after   7  (wrong)

  exact match on    6 held-out facts:   0.0% before,  66.7% after tuning
  the loss curves: left out

== 6. It writes tasks
A third.
tasks read       9
dropped          2 (22.2%)
  length         2 (22.2%)
  1 of the 7 kept tasks stands in nothing
  Find the capital of China.
    The capital of China is Beijing.  (right)
  the report: left out

== What this model is
Left out.
"""
SHOWN = """\
$ make demo

== 2. train.py: a title
An explanation.
step 0/20  val_loss 8.3
step 20/20  loss 1.2  val_loss 1.3  9 tok/s
time             7 s

== 4. Before and after
Another.
  One?
    before  x
    after   1  (right)
  Two?
    before  x
    after   2  (right)
  Five?
    before  x
    after   6  (wrong)

  exact match on    6 held-out facts:   0.0% before,  66.7% after tuning

== 6. It writes tasks
A third.
tasks read       9
dropped          2 (22.2%)
  1 of the 7 kept tasks stands in nothing
  Find the capital of China.
    The capital of China is Beijing.  (right)
"""


def test_a_log_becomes_the_transcript(tmp_path):
    spec = importlib.util.spec_from_file_location("regenerate", ROOT / "docs" / "regenerate.py")
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    train = tmp_path / "run" / "train"
    train.mkdir(parents=True)
    steps = [{"step": n, "loss": 8 / n, "val_loss": 9 / n, "tokens": 64 * n} for n in (1, 2, 3)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "log").write_text(LOG, encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(README, encoding="utf-8")  # which so has the markers
    files = {"log": tmp_path / "log", "run": tmp_path / "run", "readme": page, "pictures": tmp_path}
    config = regenerate.RegenerateConfig(**{name: str(path) for name, path in files.items()})
    for _ in range(2):  # the second time there is a transcript already
        regenerate.main(config)
        text = page.read_text(encoding="utf-8")
        assert text.count(f"\n```\n{SHOWN}```\n") == 1
    before, after = README.split(regenerate.BEGIN)[0], README.split(regenerate.END)[1]
    assert (text.startswith(before), text.endswith(after)) == (True, True)
    for name in ("loss.png", "loss-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (ROOT / "docs" / name).stat().st_size < 100_000
    with pytest.raises(ValueError, match="expected the lines"):
        regenerate.with_transcript("# A page without markers", SHOWN)
