"""Kills the parts of a training run at random, over and over, and checks that nothing is lost: `make chaos`.

A CartPole Soup task list is trained by `rllib train` on a cluster of three raylets on this machine: the head with the
algorithm's process and the Learner, two with an EnvRunner each. One part after the other is killed with SIGKILL: the
command itself ("driver", which then goes on with `--resume`), an EnvRunner, the Learner, the algorithm's process
("trial"), or a whole node (its raylet and all that runs there; another one joins a moment later). Half of the moments
are random, the others aim at where it hurts: while a checkpoint is written, or while a column is frozen and stored.
When a list of tasks is finished and kills are left, the next list starts.

A watcher reads the column store all the while and notes fingerprint and SHA-256 of every column's file when it first
sees it. In the end, for every list:

- each task has exactly one column, in order, with the bits that it had when it was frozen;
- no row of results goes back to an earlier task, and every column played its episodes bit for bit as when frozen;
- a kill cost at most one checkpoint interval of training iterations;
- no process, shared-memory file or temporary folder is left.

    python benchmarks/chaos.py --kills 50 --seed 0 --out docs/results/chaos.json --table docs/reliability.md

The seed decides what is killed and when, not how fast the machine is: two runs differ in where a kill lands.
Exit code 0 if all of that holds, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("plain", "flipped", "permuted")
CHECKPOINT_EVERY = 3  # training iterations
STEPS_PER_ITERATION = 512
TARGETS = {"driver": 0.4, "env_runner": 0.2, "learner": 0.15, "trial": 0.1, "node": 0.15}
MOMENTS = {"random": 0.5, "checkpoint": 0.25, "freezing": 0.25}
PATIENCE_S = 900.0  # without a new result, something hangs, even on a machine that others use
MARK = "RLLIB_PNN_CHAOS"  # in the environment of every process that descends from this one

TASK_LIST = """\
chaos:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  checkpoint_config: {{checkpoint_frequency: {every}, num_to_keep: 2}}
  config:
    seed: {seed}
    lr: 0.001
    num_env_runners: 2
    num_envs_per_env_runner: 4
    custom_resources_per_env_runner: {{runner: 1}}
    num_learners: 1
    train_batch_size_per_learner: {batch}
    minibatch_size: 128
    num_epochs: 2
  progressive:
    column: [{{dense: 16}}, {{dense: 16}}]
    evaluation_episodes: 2
    tasks:
{tasks}
"""
TASK = "      - {{name: task_{k}, env_config: {{variant: {variant}}}, until: {{num_env_steps: {steps}}}}}"


@dataclass
class Kill:
    """One kill and what it cost."""

    number: int
    target: str
    moment: str
    round: int
    task_index: int
    iteration: int  # of the newest result when it struck
    env_steps: int
    columns: int  # stored by then
    iterations_lost: int | None = None
    env_steps_lost: int | None = None
    seconds_to_next_result: float | None = None
    exit_code: int | None = None  # of the command, if it did not survive


@dataclass
class Seen:
    """What the watcher knows of a column."""

    task: str
    fingerprint: str
    sha256: str
    after_kills: int


@dataclass
class Round:
    """One list of tasks: its run folder and what was seen of it."""

    number: int
    path: Path
    tasks: list[str]
    seen: dict[int, Seen] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.path / "result.json").read_text(errors="replace").splitlines()
            rows = []
            for line in lines:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
            return rows
        return []

    def last_row(self) -> dict[str, Any] | None:
        """The newest complete row, without reading all of them."""
        with contextlib.suppress(FileNotFoundError), (self.path / "result.json").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**18))
            for line in reversed(file.read().split(b"\n")):
                with contextlib.suppress(ValueError):
                    return json.loads(line)
        return None

    def manifest(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.path / "columns" / "manifest.json").read_text())["columns"]
        return []

    def look(self, kills: int) -> None:
        """Notes columns that are new and compares the others."""
        entries = self.manifest()
        for k, entry in enumerate(entries):
            digest = hashlib.sha256((self.path / "columns" / entry["file"]).read_bytes()).hexdigest()
            now = Seen(entry["task"], entry["fingerprint"], digest, kills)
            before = self.seen.setdefault(k, now)
            if (before.task, before.fingerprint, before.sha256) != (now.task, now.fingerprint, now.sha256):
                self.changed.append(f"column {k} of list {self.number} changed after kill {kills}")
        if len(entries) < len(self.seen):
            self.changed.append(f"list {self.number} had {len(self.seen)} columns, has {len(entries)}")

    def problems(self) -> list[str]:
        """What is wrong with the finished list."""
        from rllib_pnn import ColumnStore

        found = list(self.changed)
        self.look(-1)
        found += self.changed[len(found) :]
        store = ColumnStore(self.path / "columns")
        store.verify()
        if [entry.task for entry in store.entries] != self.tasks:
            found.append(
                f"list {self.number}: expected columns of {self.tasks}, found {[e.task for e in store.entries]}"
            )
        rows = self.rows()
        iterations = [row["training_iteration"] for row in rows]
        if iterations != list(range(1, len(rows) + 1)):
            found.append(f"list {self.number}: the iterations in result.json have gaps or come twice")
        indices = [row["progressive"]["task_index"] for row in rows]
        if indices != sorted(indices):
            found.append(f"list {self.number}: a task was gone back to")
        # Not a number where a column was not played again: the last kill came after the last column was stored.
        equal = {task: rows[-1]["columns"][task]["bit_equal"] for task in self.tasks}
        if any(value == 0 for value in equal.values()):
            found.append(f"list {self.number}: columns did not play as when frozen: {equal}")
        return found


class Chaos:
    """A cluster, the command that trains on it, and the kills.

    Args:
        work: an empty folder for everything, Ray's own files too.
        seed: of kills, moments and runs.
        num_tasks, task_steps: of each list of tasks.
    """

    def __init__(self, work: Path, seed: int, num_tasks: int, task_steps: int) -> None:
        from ray.cluster_utils import Cluster

        self.work = work
        self.random = random.Random(seed)
        self.num_tasks, self.task_steps = num_tasks, task_steps
        self.kills: list[Kill] = []
        self.rounds: list[Round] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.log = (work / "driver.log").open("ab")
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                # A node that died is noticed within ten seconds instead of half a minute.
                "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 10},
            },
        )
        self.nodes = [self._add_node() for _ in range(2)]

    def _add_node(self) -> Any:
        for attempt in range(10):
            try:
                return self.cluster.add_node(num_cpus=1, resources={"runner": 1})
            except Exception as error:  # Ray gives a raylet 30 s to start, which a busy machine may not manage
                print(f"a node did not start (attempt {attempt + 1}): {error}", flush=True)
        raise RuntimeError("no node starts")

    # -- the command ---------------------------------------------------------------------------------------------

    def start_round(self) -> None:
        number = len(self.rounds)
        tasks = [f"task_{k}" for k in range(self.num_tasks)]
        lines = [
            TASK.format(k=k, variant=VARIANTS[k % len(VARIANTS)], steps=self.task_steps) for k in range(self.num_tasks)
        ]
        file = self.work / f"list_{number}.yaml"
        file.write_text(
            TASK_LIST.format(every=CHECKPOINT_EVERY, seed=number, batch=STEPS_PER_ITERATION, tasks="\n".join(lines))
        )
        storage = self.work / f"runs_{number}"
        self._start("-f", str(file), "--storage", str(storage))
        deadline = time.monotonic() + PATIENCE_S
        while not (found := list(storage.glob("*/seed_*/experiment.json"))):
            if time.monotonic() > deadline or self.driver.poll() is not None:
                raise RuntimeError(f"the run did not start, see {self.log.name}")
            time.sleep(0.1)
        self.rounds.append(Round(number, found[0].parent, tasks))

    def resume(self) -> None:
        self._start("--resume", str(self.rounds[-1].path))

    def _start(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "rllib_pnn.cli", "train", *arguments, "--ray-address", self.cluster.address]
        self.driver = subprocess.Popen(command, cwd=self.work, stdout=self.log, stderr=self.log, start_new_session=True)

    # -- kills ---------------------------------------------------------------------------------------------------

    def strike(self) -> bool:
        """Kills one part at one moment and waits until training gets on. False if the list ended before that."""
        run = self.rounds[-1]
        target = self.random.choices(list(TARGETS), list(TARGETS.values()))[0]
        moment = self.random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        delay = self.random.uniform(0.0, 3.0) if moment == "random" else self.random.uniform(0.0, 0.4)
        if not self._wait_for(moment) or not self._sleep(delay):
            return False
        victims = {
            "driver": lambda: [self.driver.pid],
            "env_runner": lambda: self._pids("EnvRunner"),
            "learner": lambda: self._pids("_WrappedExecutable"),  # as RLlib's LearnerGroup calls the actors' class
            "trial": lambda: self._pids("PPO"),
            "node": lambda: [None],
        }[target]()
        if not victims:  # it is restarting
            return True
        last = run.last_row() or {"training_iteration": 0, "num_env_steps_sampled_lifetime": 0}
        kill = Kill(
            number=len(self.kills) + 1,
            target=target,
            moment=moment,
            round=run.number,
            task_index=last.get("progressive", {}).get("task_index", 0),
            iteration=last["training_iteration"],
            env_steps=int(last["num_env_steps_sampled_lifetime"]),
            columns=len(run.manifest()),
        )
        struck = time.monotonic()
        struck_at = time.time()
        if target == "node":
            node = self.nodes.pop(self.random.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(victims), signal.SIGKILL)
        self.kills.append(kill)
        if target == "driver":
            kill.exit_code = self.driver.wait()
            if last := run.last_row():  # it may have written one more
                kill.iteration = last["training_iteration"]
                kill.env_steps = int(last["num_env_steps_sampled_lifetime"])
            self.resume()
        if target == "node":
            time.sleep(self.random.uniform(0.0, 3.0))
            self.nodes.append(self._add_node())
        self._wait_for_progress(kill, struck, struck_at)
        print(
            f"{kill.number:3d} {kill.target:10s} {kill.moment:10s} list {kill.round} task {kill.task_index} "
            f"iteration {kill.iteration:4d}: {kill.iterations_lost} iterations, {kill.env_steps_lost} steps lost, "
            f"next result after {kill.seconds_to_next_result:.1f} s",
            flush=True,
        )
        return True

    def _pids(self, name: str) -> list[int]:
        """Ray's worker processes of actors of this class, among this process's descendants."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                title = process.cmdline()[0]
                actor = title.removeprefix("ray::").split(".")[0]
                if title.startswith("ray::") and (actor == name or (name == "EnvRunner" and actor.endswith(name))):
                    found.append(process.pid)
        return sorted(found)

    def _over(self) -> bool:
        """Whether the command ended by itself. One that gave up (exit code 1) is asked to go on, as its user would."""
        code = self.driver.poll()
        if code is None:
            return False
        if code == 0:
            return True
        if self.kills and self.kills[-1].exit_code is None:
            self.kills[-1].exit_code = code
        self.resume()
        return False

    def _sleep(self, seconds: float) -> bool:
        time.sleep(seconds)
        return not self._over()

    def _wait_for(self, moment: str) -> bool:
        """Returns at the moment, or after a while without it; False if the list of tasks ended."""
        run = self.rounds[-1]
        folders = set(run.path.glob("checkpoint_*"))
        deadline = time.monotonic() + (60 if moment == "freezing" else 20)
        while moment != "random" and time.monotonic() < deadline:
            if self._over():
                return False
            if moment == "checkpoint" and set(run.path.glob("checkpoint_*")) - folders:
                return True
            # The last iteration of a task has begun: the next result comes after freezing, playing and storing.
            if moment == "freezing" and (row := run.last_row()):
                steps = row["progressive"]["task_env_steps"]
                if self.task_steps - 1.5 * STEPS_PER_ITERATION <= steps < self.task_steps:
                    return True
            time.sleep(0.02)
        return not self._over()

    def _wait_for_progress(self, kill: Kill, struck: float, struck_at: float) -> None:
        """Until the first result that was made after the kill; notes what had to be done again."""
        run = self.rounds[-1]
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            newest = run.last_row()  # its timestamp is in whole seconds
            if (newest and newest["timestamp"] > struck_at + 0.5) or self._over():
                rows = run.rows()
                fresh = [row for row in rows if row["timestamp"] > struck_at + 0.5]
                if fresh:
                    first = fresh[0]["training_iteration"]
                    before = [row for row in rows if row["training_iteration"] < first]
                    steps = int(before[-1]["num_env_steps_sampled_lifetime"]) if before else 0
                    kill.iterations_lost = max(0, kill.iteration - first + 1)
                    kill.env_steps_lost = max(0, kill.env_steps - steps)
                else:
                    kill.iterations_lost = kill.env_steps_lost = 0
                kill.seconds_to_next_result = time.monotonic() - struck
                return
            time.sleep(0.05)
        raise RuntimeError(
            f"no result for {PATIENCE_S:.0f} s after kill {kill.number} ({kill.target}), see {self.log.name}"
        )

    def finish(self) -> None:
        """Lets the last list of tasks end undisturbed."""
        deadline = time.monotonic() + 4 * PATIENCE_S
        while not self._over():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the last list of tasks does not end, see {self.log.name}")
            time.sleep(0.2)

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()
        self.log.close()


def residue(work: Path, mark: str, shared_before: set[str], patience_s: float = 30.0) -> list[str]:
    """Processes, shared-memory files and temporary folders that the run left behind."""
    deadline = time.monotonic() + patience_s
    while True:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark and process.pid != os.getpid():
                    left.append(f"process {process.pid} {' '.join(process.cmdline())[:80]}")
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    fresh = [f"/dev/shm/{name}" for name in sorted(_shared() - shared_before)]
    mapped = _mapped() if fresh else ""
    left += [name for name in fresh if name not in mapped]  # others on this machine use theirs
    known = ("driver.log", "list_", "runs_", "ray", "torchinductor_")
    left += [str(path) for path in sorted(work.iterdir()) if not path.name.startswith(known)]
    return left


def _shared() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def _mapped() -> str:
    """What the processes of this machine map, as one text."""
    texts = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(maps.read_text(errors="replace"))
    return "\n".join(texts)


def summary_of(
    chaos: Chaos, problems: list[str], left: list[str], seconds: float, arguments: argparse.Namespace
) -> dict:
    kills = chaos.kills
    for kill in kills:
        if kill.iterations_lost is not None and kill.iterations_lost > CHECKPOINT_EVERY:
            problems.append(
                f"kill {kill.number} ({kill.target}) cost {kill.iterations_lost} iterations, "
                f"a checkpoint is taken every {CHECKPOINT_EVERY}"
            )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "format": "rllib_pnn.chaos/1",
        "command": f"python benchmarks/chaos.py --kills {arguments.kills} --seed {arguments.seed}",
        "commit": commit,
        "cpus": os.cpu_count(),
        "seconds": round(seconds, 1),
        "checkpoint_every_iterations": CHECKPOINT_EVERY,
        "env_steps_per_iteration": STEPS_PER_ITERATION,
        "task_lists": len(chaos.rounds),
        "tasks": sum(len(run.tasks) for run in chaos.rounds),
        "tasks_finished_exactly_once": sum(
            Counter(entry["task"] for entry in run.manifest())[task] == 1 for run in chaos.rounds for task in run.tasks
        ),
        "columns_lost_or_changed": sum(len(run.changed) for run in chaos.rounds),
        "problems": problems,
        "residue": left,
        "kills": [asdict(kill) for kill in kills],
        "columns": [
            {"list": run.number, "column": k, **asdict(s)} for run in chaos.rounds for k, s in run.seen.items()
        ],
    }


def table_of(summary: dict) -> str:
    """The summary as Markdown."""
    rows = [
        "| killed | times | at a random moment | at a checkpoint | at a freezing | lost iterations, most | lost steps, "
        "most | steps, sum | seconds to the next result, median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target in (*TARGETS, "all"):
        kills = [k for k in summary["kills"] if target in (k["target"], "all")]
        if not kills:
            continue
        moments = Counter(k["moment"] for k in kills)
        seconds = sorted(k["seconds_to_next_result"] for k in kills)
        rows.append(
            f"| {target.replace('_', ' ')} | {len(kills)} | {moments['random']} | {moments['checkpoint']} "
            f"| {moments['freezing']} | {max(k['iterations_lost'] for k in kills)} "
            f"| {max(k['env_steps_lost'] for k in kills):,} | {sum(k['env_steps_lost'] for k in kills):,} "
            f"| {seconds[len(seconds) // 2]:.1f} |"
        )
    return "\n".join(
        [
            f"`{summary['command']}`, commit `{summary['commit']}`, {summary['cpus']} cores, "
            f"{summary['seconds'] / 60:.0f} minutes. A checkpoint every {summary['checkpoint_every_iterations']} "
            f"iterations of about {summary['env_steps_per_iteration']} env steps.",
            "",
            *rows,
            "",
            f"Task lists: {summary['task_lists']}, tasks: {summary['tasks']}, finished exactly once: "
            f"{summary['tasks_finished_exactly_once']}. Columns lost or changed: {summary['columns_lost_or_changed']}. "
            f"Left behind: {len(summary['residue'])}. Problems: {len(summary['problems'])}.",
        ]
    )


def put_table(file: Path, table: str) -> None:
    """Replaces what stands between the two chaos marks of a Markdown file."""
    begin, end = "<!-- chaos: begin -->", "<!-- chaos: end -->"
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    file.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=4, help="of each list")
    parser.add_argument("--steps", type=int, default=12_000, help="env steps of each task")
    parser.add_argument("--out", type=Path, help="summary as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose chaos table is replaced")
    parser.add_argument("--keep", action="store_true", help="keep the work folder")
    arguments = parser.parse_args()

    # Whoever stops it stops its cluster too.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    shared_before = _shared()
    work = Path(tempfile.mkdtemp(prefix="chaos"))
    mark = work.name
    # Ray looks at these when it is imported; a cluster of its own, apart from others on this machine.
    os.environ |= {
        MARK: mark,
        "TMPDIR": str(work),
        "RAY_TMPDIR": str(work),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    sys.path.insert(0, str(ROOT))
    start = time.monotonic()
    problems: list[str] = []
    chaos = Chaos(work, arguments.seed, arguments.tasks, arguments.steps)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for run in list(chaos.rounds)[-1:]:
                run.look(len(chaos.kills))

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        chaos.start_round()
        watcher.start()
        while len(chaos.kills) < arguments.kills:
            if not chaos.strike():
                print(f"list {chaos.rounds[-1].number} is finished", flush=True)
                chaos.start_round()
        chaos.finish()
        stop.set()
        for run in chaos.rounds:
            problems += run.problems()
        print(f"{len(chaos.rounds)} lists finished", flush=True)
    finally:
        stop.set()
        chaos.close()
    left = residue(work, mark, shared_before)
    summary = summary_of(chaos, problems, left, time.monotonic() - start, arguments)
    if not arguments.keep:
        shutil.rmtree(work, ignore_errors=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    table = table_of(summary)
    if arguments.table:
        put_table(arguments.table, table)
    print(table)
    for problem in [*problems, *(f"left behind: {name}" for name in left)]:
        print(f"chaos: {problem}", file=sys.stderr)
    done = summary["tasks_finished_exactly_once"] == summary["tasks"]
    return 0 if done and not problems and not left else 1


if __name__ == "__main__":
    sys.exit(main())
