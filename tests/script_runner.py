"""Runs scripts in processes of their own that need not import PyTorch anew, which takes longer than most of them run.

This file is also a program: it imports the libraries, and forks for each job that it reads. Nothing of minigpt is
imported before the fork, so a script starts as `python SCRIPT` does, with its own environment, folder and standard
streams, and the interpreter ends as usual. That PyTorch is imported in time and not needlessly, the tests of the
launchers, examples and package see, which start Python itself.
"""

import json
import os
import runpy
import select
import subprocess
import sys
import weakref
from pathlib import Path

SECONDS = 300.0
LIBRARIES = "matplotlib.figure, numpy, safetensors.torch, tiktoken, torch, tqdm, tyro, yaml"


class ScriptRunner:
    """The program below. It ends when this object is garbage.

    Args:
        folder: where the scripts' standard streams are kept.
        cwd: the scripts' working directory, if that is another.
    """

    def __init__(self, folder: Path, environment: dict[str, str], cwd: Path | None = None):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=cwd or folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        weakref.finalize(self, _end, self.process)

    def run(
        self, argv: list[str], environment: dict[str, str], stdin: str = "", stays: bool = False
    ) -> tuple[int, str, str]:
        """The script's exit code (or the id of its process, if it `stays`), standard output and standard error.

        Raises TimeoutError after five minutes.
        """
        assert self.process.stdin and self.process.stdout
        streams = [self.folder / f"std{number}" for number in range(3)]
        for path, text in zip(streams, (stdin, "", "")):
            path.unlink(missing_ok=True)  # a process that stays keeps its own
            path.write_text(text, encoding="utf-8")
        job = {"argv": argv, "environment": environment, "streams": list(map(str, streams)), "stays": stays}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            os.killpg(self.process.pid, 9)
            raise TimeoutError(f"{argv} takes more than {SECONDS:.0f} s")
        code = int(self.process.stdout.readline())
        return code, streams[1].read_text("utf-8"), streams[2].read_text("utf-8")


def _end(process: subprocess.Popen) -> None:
    process.kill()  # between two jobs, so nothing is lost
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _next_job() -> dict | None:
    """Forks for each line of standard input: in the child its job, in the parent None at the end of the input."""
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            return job
        print(child if job["stays"] else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    exec(f"import {LIBRARIES}")
    if job := _next_job():
        for number, name in enumerate(job["streams"]):
            os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115  # what was read ahead is not the script's
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = job["argv"]
        sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
