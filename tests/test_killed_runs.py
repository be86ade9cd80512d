"""A whole run that is killed again and again, at any moment, ends with the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tiny_runner import kept, new_runner

METHODS, KILLS = ("slm", "oracle", "ewc"), 4


def run(folder: Path):
    return new_runner(folder, METHODS, epochs=4).fit()


def main(folder: Path) -> None:
    """Children that go on with the run, of which each is killed a little later than the one before."""
    draw = random.Random()
    for number in range(KILLS):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run(folder)
                status = 0
            finally:
                os._exit(status)
        time.sleep(draw.uniform(0.1, 0.5) * (number + 1))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print("killed" if os.WIFSIGNALED(status) else f"ended with {os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.exit()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, __file__, tmp_path / "killed"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith(("killed", "ended"))]
    assert ends[0] == "killed" and not any(line == "ended with 1" for line in ends), ends
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert resumed.state["rows"] == whole.state["rows"] and resumed.final == whole.final
    for method in ("slm", "ewc"):
        assert kept(whole, method) and kept(resumed, method) == kept(whole, method), (method, ends)
