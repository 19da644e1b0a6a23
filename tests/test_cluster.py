"""`rllib train` on a cluster of three raylets, one of which is lost between two tasks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In a process of its own: the cluster must not become the one that `ray.init()` of other tests finds.
SCENARIO = """
import sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
from chaos import Chaos

chaos = Chaos(Path(sys.argv[1]), seed=0, num_tasks=2, task_steps=6144)
try:
    chaos.start_round()
    run = chaos.rounds[0]
    command = chaos.driver
    while not run.manifest():
        assert command.poll() is None, "the command ended before the first task"
        time.sleep(0.1)
    run.look(0)
    runners = chaos._pids("EnvRunner")
    chaos.cluster.remove_node(chaos.nodes.pop(), allow_graceful=False)
    while command.poll() is None:
        run.look(1)
        time.sleep(0.2)
    print("exit code", command.returncode)
    print("env runners", len(runners))
    print("problems", run.problems())
    rows = run.rows()
    print("steps", [row["progressive"]["task_env_steps"] for row in rows if row["progressive"]["task_over"]])
finally:
    chaos.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_tasks_on_three_nodes_of_which_one_is_lost(tmp_path: Path) -> None:
    work = Path(os.environ["TMPDIR"]) / "c"  # short, for Ray's sockets
    work.mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(work),
        "RAY_TMPDIR": str(work),
        "PYTHONPATH": str(ROOT),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCENARIO, str(work)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    log = work / "driver.log"
    said = log.read_text() if log.exists() else ""
    subprocess.run(["rm", "-rf", str(work)], check=True)
    assert result.returncode == 0, result.stderr + said
    assert "exit code 0\nenv runners 2\nproblems []\n" in result.stdout, result.stdout + said
    assert "starting it again" not in said  # the loss of an EnvRunner does not end the run
