"""What several processes do in one folder: one at a time where it matters, and nothing stays behind one that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[2] / "runs"
HOLDER = """
import sys, time
from pathlib import Path
from claims import claim
with claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""
ADDER = """
import sys, time
from pathlib import Path
from claims import alone
place = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()  # both begin at once
for _ in range(50):
    with alone(place.with_suffix(".lock")):
        count = int(place.read_text())
        time.sleep(0.001)
        place.write_text(str(count + 1))
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
from claims import orphaned
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
parent = int(sys.argv[sys.argv.index("--worker") + 1])
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if "fail" in sys.argv:
    sys.exit(3)
while not stopped and not orphaned(parent):
    time.sleep(0.01)
print("stopped" if stopped else "orphaned", flush=True)
"""
LEAD = """
import sys
from pathlib import Path
from claims import Workers
Workers(["-c", sys.argv[2]], 1, [], Path(sys.argv[1])).wait()
"""


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    import claims

    return claims


def python(code: str, *arguments: str, **how) -> subprocess.Popen:
    paths = os.pathsep.join((str(RUNS), str(RUNS.parent)))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, text=True, **how)


def says(log: Path, what: str) -> bool:
    """Whether a log says it before a minute is over."""
    for _ in range(3000):
        if log.is_file() and what in log.read_text():
            return True
        time.sleep(0.02)
    return False


def test_a_claim_is_one_processs_until_it_ends_however_it_ends(claims, tmp_path):
    place = tmp_path / "claims" / "cell"
    holder = python(HOLDER, str(place), stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with claims.claim(place) as mine:
        assert not mine
    holder.send_signal(signal.SIGKILL)
    holder.wait(60)
    holder.stdout.close()
    assert place.exists()  # and means nothing
    with claims.claim(place) as mine:
        assert mine
        with claims.claim(place) as again:
            assert not again
    with claims.claim(place) as mine:
        assert mine


def test_a_file_that_several_change_loses_nothing(tmp_path):
    place = tmp_path / "count"
    place.write_text("0")
    adders = [python(ADDER, str(place), stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for adder in adders:
        assert adder.stdout is not None and adder.stdout.readline() == "ready\n"
    for adder in adders:
        assert adder.stdin is not None
        adder.stdin.write("go\n")
        adder.stdin.flush()
    assert [adder.communicate(timeout=120) and adder.returncode for adder in adders] == [0, 0]
    assert place.read_text() == "100"


def test_workers_have_a_gpu_each_and_are_told_to_stop(claims, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(RUNS), str(RUNS.parent))))
    workers = claims.Workers(["-c", WORKER], 3, ["4", "7"], tmp_path)
    assert all(says(log, f"gpu {gpu}") for log, gpu in zip(workers.logs, "474", strict=True))
    for child in workers.children:
        child.terminate()
    assert workers.wait() == []
    assert all(says(log, "stopped") for log in workers.logs)
    assert claims.Workers(["-c", WORKER, "fail"], 2, [], tmp_path).wait() == workers.logs[:2]


def test_a_worker_ends_when_its_command_was_killed(tmp_path):
    lead = python(LEAD, str(tmp_path), WORKER)
    assert says(tmp_path / "worker-0.log", "gpu")
    lead.kill()
    lead.wait(60)
    assert says(tmp_path / "worker-0.log", "orphaned")


def test_a_command_that_is_stopped_stops_its_workers(tmp_path):
    lead = python(LEAD, str(tmp_path), WORKER)
    assert says(tmp_path / "worker-0.log", "gpu")
    lead.terminate()
    assert lead.wait(60) == 0
    assert says(tmp_path / "worker-0.log", "stopped")
