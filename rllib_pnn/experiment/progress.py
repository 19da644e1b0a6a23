"""What the user sees while runs train: a live table in a terminal, plain lines anywhere else. No Ray, no torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rllib_pnn.experiment.spec import METRIC_NAMES, Experiment

LINE_EVERY_S = 10.0
SPEED_WINDOW_S = 60.0
MAX_ROWS = 12  # of the live table, unless more runs are at work


class RunProgress:
    """Where one run stands, from its training results.

    Args:
        name: the run folder's name.
        experiment: what it runs; gives the steps that each task may take.
        clock: seconds, monotonic.
    """

    def __init__(self, name: str, experiment: Experiment, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.phase = "waiting"
        self.number: int | None = None  # which of the runs it is, in the order of their starts
        self.task: str | None = None
        self.task_index = 0
        self.column: int | None = None
        self.steps = 0  # env steps on this task
        self.total_steps = 0
        self.steps_before = 0  # of them, those that an earlier session took
        self.episode_return = math.nan
        self.target: float | None = None
        self.iteration = 0
        self._experiment = experiment
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        tasks = experiment.progressive.tasks if experiment.progressive else []
        self.num_tasks = len(tasks)
        self._budgets = [task.until.num_env_steps for task in tasks]
        self._targets = [task.until.episode_return_mean for task in tasks]
        stop = {METRIC_NAMES.get(metric, metric): value for metric, value in experiment.stop.items()}
        self._total_budget = stop.get("num_env_steps_sampled_lifetime")
        if not tasks:
            self.target = stop.get("env_runners/episode_return_mean")

    def started(self, phase: str) -> None:
        """A process (re)starts the run: `phase` is "starting" or "resuming"."""
        self.phase = phase
        self._recent.clear()

    def update(self, result: Mapping[str, Any]) -> bool:
        """Takes in a training result; True if it is the first of a task or ends one."""
        before = (self.phase == "training", self.task_index)
        first_of_session = self.phase == "resuming" and not self.total_steps
        self.phase = "training"
        self.iteration = int(result.get("training_iteration") or 0)
        runners = result.get("env_runners") or {}
        self.total_steps = int(result.get("num_env_steps_sampled_lifetime") or self.total_steps)
        if first_of_session:
            self.steps_before = self.total_steps
        progressive = result.get("progressive")
        if progressive:
            self.task = str(progressive["task"])
            self.task_index = int(progressive["task_index"])
            self.column = int(progressive["column"])
            self.steps = int(progressive["task_env_steps"])
            self.episode_return = _number(progressive.get("episode_return_mean"))
            self.target = self._targets[self.task_index] if self.task_index < len(self._targets) else None
        else:
            self.steps = self.total_steps
            self.episode_return = _number(runners.get("episode_return_mean"))
        now = self._clock()
        self._recent.append((now, self.total_steps))
        while len(self._recent) > 2 and now - self._recent[0][0] > SPEED_WINDOW_S:
            self._recent.popleft()
        over = bool(progressive and progressive.get("task_over")) or bool(result.get("done"))
        return over or (True, self.task_index) != before

    def frozen(self, result: Mapping[str, Any]) -> str | None:
        """A line about the column that was frozen in this result; None if none was."""
        if not (result.get("progressive") or {}).get("task_over"):
            return None
        score = ((result.get("columns") or {}).get(self.task) or {}).get("frozen_episode_return_mean")
        return (
            f"{self.name}: task {self.task_index + 1}/{self.num_tasks} {self.task} is over after {self.steps:,} steps; "
            f"column {self.column} is frozen and returns {_return(_number(score))}"
        )

    @property
    def budget(self) -> int | None:
        """Env steps that the task (without tasks: the run) may take at most."""
        if self._budgets:
            return self._budgets[self.task_index] if self.task_index < len(self._budgets) else None
        return None if self._total_budget is None else int(self._total_budget)

    @property
    def steps_per_s(self) -> float:
        """Env steps per second over the last minute; NaN before the second result."""
        if len(self._recent) < 2:
            return math.nan
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else math.nan

    @property
    def eta_s(self) -> float:
        """Seconds until every task has used all its steps (some end sooner, at their return); NaN if unknown."""
        if self.phase == "finished":
            return 0.0
        if self.budget is None or (self._budgets and None in self._budgets[self.task_index :]):
            return math.nan
        later = sum(budget or 0 for budget in self._budgets[self.task_index + 1 :])
        return (max(0, self.budget - self.steps) + later) / self.steps_per_s if self.steps_per_s > 0 else math.nan

    @property
    def steps_left(self) -> int:
        """Env steps that its tasks may still take; 0 if over or unknown."""
        if self.phase in ("finished", "failed"):
            return 0
        budgets = self._budgets or [self.budget]
        return max(0, sum(budget or 0 for budget in budgets[self.task_index :]) - self.steps)

    def line(self) -> str:
        """Everything in one line."""
        if self.phase != "training":
            return f"{self.name}  {self.phase}"
        parts = [self.name]
        if self.task is not None:
            parts += [f"task {self.task_index + 1}/{self.num_tasks} {self.task}", f"column {self.column}"]
        parts += [
            f"{self.steps:,}{f'/{self.budget:,}' if self.budget else ''} steps",
            f"{_steps_per_s(self.steps_per_s)} steps/s",
            f"return {_return(self.episode_return)}{f' (until {self.target:g})' if self.target is not None else ''}",
            f"ETA {_eta(self.eta_s)}",
        ]
        return "  ".join(parts)


class Display:
    """Shows the progress of several runs on a console.

    Args:
        console: where to; a live table if it is a terminal, else a line every ten seconds and at each task's end.
        title: stands above the table.
        runs: the runs, in order.
    """

    def __init__(self, console: Console, title: str, runs: Iterable[RunProgress]) -> None:
        self.console = console
        self.runs = list(runs)
        self._title = title
        self._over_before = sum(run.phase == "finished" for run in self.runs)
        self._start = time.monotonic()
        self._last_line: dict[str, float] = {}
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=2, transient=True, redirect_stderr=False
        )

    def __enter__(self) -> Display:
        self._start = time.monotonic()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into `tuner.pkl`, and a terminal can't be kept there."""
        return {}

    def started(self, run: RunProgress, phase: str) -> None:
        """A run (re)starts; it gets its number at its first start."""
        run.started(phase)
        if run.number is None:
            run.number = self._over_before + 1 + sum(other.number is not None for other in self.runs)

    def ended(self, run: RunProgress, phase: str) -> None:
        """A run is "finished" or "failed"; says where all stand if there are several."""
        run.phase = phase
        if len(self.runs) > 1:
            self.say(f"{_duration(time.monotonic() - self._start)}  {self.standing()}")

    def standing(self) -> str:
        """How many runs are over, and how long the rest may take."""
        over = sum(run.phase == "finished" for run in self.runs)
        failed = sum(run.phase == "failed" for run in self.runs)
        text = f"{over} of {len(self.runs)} finished" + (f", {failed} failed" if failed else "")
        left = sum(run.steps_left for run in self.runs)
        taken = sum(run.total_steps - run.steps_before for run in self.runs if run.number is not None)
        elapsed = time.monotonic() - self._start
        # Over all that has happened since the start: starting a run takes its time too.
        return text + (f", {_eta(left * elapsed / taken)} left" if left and taken > 0 else "")

    def changed(self, run: RunProgress, *, now: bool) -> None:
        """A run made progress; `now` if that is worth a line of its own."""
        if self.console.is_terminal:
            return  # the table is drawn anew twice a second
        elapsed = time.monotonic() - self._start
        if now or elapsed - self._last_line.get(run.name, -math.inf) >= LINE_EVERY_S:
            self._last_line[run.name] = elapsed
            number = f"{run.number}/{len(self.runs)}  " if run.number is not None and len(self.runs) > 1 else ""
            self.say(f"{_duration(elapsed)}  {number}{run.line()}")

    def say(self, message: str) -> None:
        """A line that stays, above the table."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> Table:
        """The table as it stands now."""
        progressive = any(run.num_tasks for run in self.runs)
        title = Text.assemble((self._title, "bold"), ("   " + _duration(time.monotonic() - self._start), "dim"))
        if len(self.runs) > 1:
            title.append(f"   {self.standing()}", "dim")
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("run", no_wrap=True)
        if progressive:
            table.add_column("task", no_wrap=True)
            table.add_column("column", justify="right")
        table.add_column("", width=16)
        for header in ("steps", "steps/s", "return", "ETA"):
            table.add_column(header, justify="right", no_wrap=True)
        for run in self._shown():
            name = Text(run.name if run.number is None or len(self.runs) == 1 else f"{run.number}  {run.name}")
            if run.phase != "training":
                table.add_row(name, Text(run.phase, "dim"))
                continue
            cells: list[Any] = [name]
            if progressive:
                cells += [Text(f"{run.task_index + 1}/{run.num_tasks} {run.task}"), str(run.column)]
            cells.append(ProgressBar(total=run.budget or 1, completed=run.steps if run.budget else 0, width=16))
            of_budget = f" / {_compact(run.budget)}" if run.budget else ""
            target = f" / {run.target:g}" if run.target is not None else ""
            cells += [
                f"{_compact(run.steps)}{of_budget}",
                _steps_per_s(run.steps_per_s),
                f"{_return(run.episode_return)}{target}",
                _eta(run.eta_s),
            ]
            table.add_row(*cells)
        return table

    def _shown(self) -> list[RunProgress]:
        """All runs if they fit, else those that are at work, and then the next ones."""
        if len(self.runs) <= MAX_ROWS:
            return self.runs
        working = [run for run in self.runs if run.phase not in ("waiting", "finished")]
        waiting = [run for run in self.runs if run.phase == "waiting"]
        return [*working, *waiting][: max(MAX_ROWS, len(working))]


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _compact(count: int) -> str:
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:.1f}k" if count < 1e6 else f"{count / 1e6:.2f}M"


def _return(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _steps_per_s(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _eta(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"< {_duration(seconds)}" if seconds > 0 else _duration(0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
