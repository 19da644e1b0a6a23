"""The `rllib` command. Ray no longer ships one; this one also trains ordinary RLlib tuned examples.

Ray and torch are imported by the commands that need them, so that `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import gymnasium as gym
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rllib_pnn import __version__
from rllib_pnn.analysis.runs import MANIFEST_FILE, RunError, find_columns, home_of
from rllib_pnn.experiment.environment import prepare_ray
from rllib_pnn.experiment.errors import InputError, RunFailed
from rllib_pnn.experiment.folder import ERROR_FILE, EXPERIMENT_FILE, PLAN_FILE, RunFolder, find_runs
from rllib_pnn.experiment.spec import Plan, choose, load_plans
from rllib_pnn.text import did_you_mean, printable

if TYPE_CHECKING:
    from rllib_pnn.experiment.conclude import Conclusion
    from rllib_pnn.experiment.run import Outcome
    from rllib_pnn.network.store import ColumnStore

DONE, FAILED, BAD_INPUT = 0, 1, 2
EPISODES_TO_MEASURE = 16  # what a task's first observations look like, where its store does not say
_TEXTS = ("task", "environment", "fingerprint", "name", "shows", "run", "method")  # headers of columns that hold words

# Typer brings its own copy of click and exports this one exception of it; the bases are UsageError and ClickException.
_UsageError: Any
_ClickException: Any
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]

app = typer.Typer(
    name="rllib",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
example_app = typer.Typer(
    help="The tuned examples that ship in the package.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(example_app, name="example")


def _version(wanted: bool) -> None:
    if wanted:
        others = (f", {name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "gymnasium"))
        print(f"rllib_pnn {__version__}{''.join(others)}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions of this and what it runs on.")
    ] = False,
) -> None:
    """Train and examine Progressive Neural Networks, and any RLlib algorithm, from a YAML file."""


RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, as `rllib train` printed it, or a store.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON, with every episode's return, instead of a table.")]


@app.command()
def train(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[file FILE]", help="The same as -f FILE.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", metavar="FILE", help="A tuned example.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Of a `transfer` block, the trials of such names ('*zoom*') and what they wait for; may be repeated.",
        ),
    ] = None,
    storage: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the run folders go; all nodes of a cluster must see it.")
    ] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with a run, or all runs of an experiment, from the last checkpoint."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Join the Ray cluster of this node ('auto' or HOST:PORT).")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Ray's and Tune's own output too.")] = False,
) -> None:
    """Train what a tuned example describes.

    Ctrl-C writes a checkpoint and prints the command that goes on from it. A file with a `transfer` block has one
    folder: the same command again goes on there and repeats nothing that is finished; with --only it leaves the other
    trials as they are. With --resume a run keeps the settings that it was started with; a file given too must be of
    the same experiment, and what it says otherwise is printed and ignored.
    """
    path = _file_argument(words or [], file)
    if path is None and resume is None:
        raise InputError("rllib train: expected a tuned example (-f FILE) or --resume RUN")
    console = _console()
    if resume is not None:
        if only:
            raise InputError(
                f"--only {only[0]}: chooses trials of a file; expected -f FILE, or --resume RUN/TRIAL for one alone"
            )
        if not resume.exists() and (storage / resume).exists():
            resume = storage / resume
        find_runs(resume)
        prepare_ray(verbose=verbose)
        from rllib_pnn.experiment.run import resume as resume_run

        outcome = resume_run(resume, console=console, file=path, ray_address=ray_address, verbose=verbose)
        raise typer.Exit(_report(console, outcome))
    assert path is not None
    plans = load_plans(_existing(path))
    if only:
        plans = choose(plans, only)
    for plan in plans:
        if any(run.progressive is None and not run.stop for run in plan.runs.values()):
            console.print(f"{plan.name}: has no `stop`: trains until Ctrl-C", soft_wrap=True)
    prepare_ray(verbose=verbose)
    from rllib_pnn.experiment.run import train as train_plans

    code = DONE
    outcomes = train_plans(plans, storage=storage, console=console, ray_address=ray_address, verbose=verbose)
    for outcome, plan in zip(outcomes, plans, strict=False):  # a signal ends all of them
        code = _report(console, outcome, plan) or code
    raise typer.Exit(code)


@app.command()
def evaluate(
    run: RunArgument,
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|all|auto", help="On which task; auto: on all, columns chosen from first observations."
        ),
    ] = "all",
    column: Annotated[int | None, typer.Option(metavar="N", help="Which column; each task's own if not given.")] = None,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="How many episodes.")] = 10,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the environments and of the policy.")] = 0,
    deterministic: Annotated[
        bool, typer.Option(help="The most probable action rather than a sample of the policy.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Play the stored columns, every column on its own task (or any column on any task).

    With `--task auto` nobody says which column is to play: it is chosen from the first observations of each episode,
    and the table shows how often that was right.
    """
    home = _home(run)
    prepare_ray(verbose=False)
    import torch

    from rllib_pnn.registration import register
    from rllib_pnn.training.evaluation import evaluate_column

    torch.set_num_threads(1)  # threads that wait for each other cost more than a column's arithmetic
    store, tasks, own, normalize = stored = _stored(home)
    entries = store.entries
    if task == "auto":
        if column is not None:
            raise InputError(f"--column {column}: --task auto chooses the column itself; leave one of them out")
        return _evaluate_auto(stored, episodes, seed, deterministic, as_json)
    if task != "all" and task not in tasks:
        mend = did_you_mean(task, [*tasks, "auto"])
        raise InputError(f"--task {task}: no such task, the run has {', '.join(tasks)}{mend}")
    if column is not None and not -len(entries) <= column < len(entries):
        raise InputError(f"--column {column}: the run stored {len(entries)} columns, expected 0 to {len(entries) - 1}")
    chosen = [name for name in tasks if name in own or column is not None] if task == "all" else [task]
    if column is None and task != "all" and task not in own:
        raise InputError(
            f"--task {task}: its column is not frozen yet; frozen are {', '.join(own)}; or choose one with --column N"
        )
    network = store.load()
    register()

    console = _console(stderr=as_json)
    table = _table("task", "column", "episodes", "return", "+-", "shortest", "longest", "at freezing")
    results = []
    for name in chosen:
        index = own[name] if column is None else column % len(entries)
        env, env_config = tasks[name]
        playing = Text(printable(f"{name}: column {index} plays {episodes} episodes"))
        with _input_errors(), console.status(playing):
            played = evaluate_column(
                network,
                env,
                env_config,
                column=index,
                num_episodes=episodes,
                seed=seed,
                deterministic=deterministic,
                normalize_actions=normalize,
            )
        score = entries[index].score if own.get(name) == index else None
        spread = (sum((r - played.episode_return_mean) ** 2 for r in played.returns) / len(played.returns)) ** 0.5
        table.add_row(
            name,
            str(index),
            str(len(played.returns)),
            f"{played.episode_return_mean:.2f}",
            f"{spread:.2f}",
            str(min(played.lengths)),
            str(max(played.lengths)),
            "-" if score is None else f"{score:.2f}",
        )
        results.append(
            {
                "task": name,
                "column": index,
                "fingerprint": entries[index].fingerprint,
                "return_mean": played.episode_return_mean,
                "return_std": spread,
                "returns": played.returns,
                "lengths": played.lengths,
                "return_at_freezing": score,
            }
        )
    if as_json:
        _print_json({"store": str(store.path), "seed": seed, "deterministic": deterministic, "results": results})
    else:
        console.print(table)


@app.command()
def columns(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="JSON: all that the manifest says.")] = False,
) -> None:
    """List the stored columns and verify that each is what was frozen."""
    console = _console()
    found = []
    for folder, store in _stores(run):
        entries = store.entries
        store.verify()
        if not entries:
            raise InputError(f"{folder}: no column is frozen yet")
        if as_json:
            found.append({"store": str(store.path), "columns": [entry.model_dump(mode="json") for entry in entries]})
            continue
        console.print(f"{store.path}: {len(entries)} columns, fingerprints verified", soft_wrap=True)
        table = _table("column", "task", "steps", "return at freezing", "environment", "fingerprint")
        for index, entry in enumerate(entries):
            table.add_row(
                str(index),
                entry.task,
                "-" if entry.num_env_steps is None else f"{entry.num_env_steps:,}",
                "-" if entry.score is None else f"{entry.score:.2f}",
                " ".join([entry.env or "-", *(f"{key}={value}" for key, value in entry.env_config.items())]),
                entry.fingerprint[:12],
            )
        console.print(table)
    if as_json:
        _print_json({"verified": True, "stores": found})


@app.command()
def analyze(
    run: RunArgument,
    method: Annotated[str, typer.Option(metavar="afs|aps|both", help="Fisher, perturbation, or both.")] = "afs",
    column: Annotated[str, typer.Option(metavar="N|NAME", help="Whose policy: a column or its task.")] = "-1",
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Episodes of a score.")] = 10,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; RUN/analysis/ if not given.")] = None,
) -> None:
    """Show which columns and layers a policy depends on (AFS, APS), as JSON and PNG."""
    methods = {"afs": ("afs",), "aps": ("aps",), "both": ("afs", "aps")}.get(method)
    if methods is None:
        known = ("afs", "aps", "both")
        raise InputError(f"--method {method}: expected {', '.join(known)}{did_you_mean(method, known)}")
    home = _home(run)
    prepare_ray(verbose=False)
    import torch

    from rllib_pnn.analysis.analyze import analyze_run

    torch.set_num_threads(1)  # as for `evaluate`: most of it is play
    console = _console()
    with (
        _input_errors(),
        console.status(Text(printable(f"{method} of column {column}"))),
        contextlib.ExitStack() as stack,
    ):
        settings: dict[str, Any] = {}
        if "aps" in methods:
            # One search for each layer and column, of some 9 times `episodes` each.
            from rllib_pnn.experiment.parallel import over_ray
            from rllib_pnn.experiment.run import ray_session

            stack.enter_context(ray_session(None, verbose=False))
            settings["map"] = over_ray(lambda done, total: console.print(f"aps: {done} of {total} searches done"))
        summary = analyze_run(
            home, methods, column=_column(column), out=out, num_episodes=episodes, seed=seed, **settings
        )
    console.print(f"column {summary['column']} ({summary['task']}) returns {summary['episode_return_mean']:.2f}")
    for name in methods:
        table = _table(
            name, *(f"column {j} ({task})" for j, task in enumerate(summary["tasks"][: summary["column"] + 1]))
        )
        for layer, shares in zip(summary[name]["layers"], summary[name]["values"], strict=True):
            table.add_row(str(layer), *("-" if share is None else f"{share:.3f}" for share in shares))
        console.print(table)
    for file in summary["files"]:
        console.print(f"wrote {_relative(Path(file))}", soft_wrap=True)


@app.command()
def prune(
    run: RunArgument,
    column: Annotated[str, typer.Option(metavar="N|NAME", help="Whose laterals: a column or its task.")] = "-1",
    max_kl: Annotated[float, typer.Option(metavar="KL", min=0.0, help="How far the policy may move, in nats.")] = 3e-5,
    episodes: Annotated[int, typer.Option(metavar="N", min=1, help="Episodes of each return.")] = 30,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new store; RUN/pruned/ if not given.")] = None,
) -> None:
    """Cut the lateral inputs that carry nothing, into a new column store; the run's own stays as it is."""
    home = _home(run)
    import torch

    from rllib_pnn.analysis.analyze import prune_run

    torch.set_num_threads(1)
    console = _console()
    with _input_errors(), console.status(Text(printable(f"pruning column {column}"))):
        summary = prune_run(home, column=_column(column), out=out, max_kl=max_kl, num_episodes=episodes, seed=seed)
    table = _table("", "before", "after")
    before, after = summary["lateral_parameters_before"], summary["lateral_parameters_after"]
    cut = f"{after:,} (-{1 - after / before:.0%})" if before else f"{after:,}"
    table.add_row("lateral parameters", f"{before:,}", cut)
    errors = [summary[f"return_{when}_sem"] for when in ("before", "after")]  # None of a single episode
    returns = [
        f"{summary[f'return_{when}']:.2f} +- {'-' if error is None else f'{error:.2f}'}"
        for when, error in zip(("before", "after"), errors, strict=True)
    ]
    table.add_row(f"return over {episodes} episode{'s' if episodes != 1 else ''}", *returns)
    console.print(table)
    console.print(f"wrote {_relative(Path(summary['store']))}", soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    top: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Mean of the best N seeds, as the paper's top 3 of 25.")
    ] = None,
    floor: Annotated[
        float | None, typer.Option(metavar="R", help="Lowest return, for games whose own is not known.")
    ] = None,
) -> None:
    """Write one page with learning curves, transfer table and matrix, and sensitivities; opens offline."""
    from rllib_pnn.analysis.report import write_report

    if floor is not None and not math.isfinite(floor):
        raise InputError(f"--floor {floor}: expected a finite number")
    console = _console()
    with _input_errors(), console.status("reading runs"):
        summary = write_report(runs, out, top=top, floor=floor)
    for problem in summary["problems"]:
        print(f"rllib: left out: {printable(problem)}", file=sys.stderr)
    console.print(f"{summary['num_runs']} runs: wrote {_relative(Path(summary['html']))}", soft_wrap=True)


@example_app.command("list")
def list_examples() -> None:
    """The names of the tuned examples, and what each shows."""
    console = _console()
    table = _table("name", "shows")
    for name, text in _examples().items():
        table.add_row(name, text.splitlines()[0].lstrip("# ").rstrip("."))
    console.print(table)


@example_app.command("show")
def show_example(name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)]) -> None:
    """Print a tuned example; `rllib example show NAME > my.yaml` makes it yours."""
    examples = _examples()
    text = examples.get(name.removesuffix(".yaml"))
    if text is None:
        raise InputError(f"{name}: no such example, there are {', '.join(examples)}{did_you_mean(name, examples)}")
    sys.stdout.write(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns (as a console script: exits with) 0 done, 1 a run failed, 2 bad input.

    A run that a signal ended returns 128 plus the signal's number, as shells do.
    """
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="rllib", standalone_mode=False)
        return int(result or DONE)
    except InputError as error:
        return _fail(str(error), BAD_INPUT)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error.format_message()}\n")
            return BAD_INPUT
        command = error.ctx.command_path if error.ctx is not None else "rllib"
        return _fail(f"{command}: {error.format_message()} (see `{command} --help`)", BAD_INPUT)
    except _ClickException as error:
        return _fail(error.format_message(), BAD_INPUT)
    except RunFailed as error:
        return _fail(str(error), FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 128 + signal.SIGINT)
    except ValueError as error:
        # A file that another floor reads, such as a column store: it says in one line what is wrong with it.
        if type(error).__name__ not in ("ColumnStoreError", "RunError"):
            raise
        return _fail(str(error), BAD_INPUT)


# -- parts -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """The analysis floor says what is wrong with its input in a ValueError of one line, gymnasium in its own errors."""
    try:
        yield
    except (ValueError, gym.error.Error) as error:
        raise InputError(str(error)) from error


def _column(text: str) -> int | str:
    """A column's index, or the name of its task."""
    return int(text) if text.lstrip("-").isdigit() else text


def _fail(message: str, code: int) -> int:
    print(f"rllib: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _file_argument(words: list[str], file: Path | None) -> Path | None:
    """`-f FILE`, `file FILE` or `FILE`."""
    if words[:1] == ["file"]:
        words = words[1:]
        if not words and file is None:
            raise InputError("rllib train file: expected the path of a tuned example after it")
    if len(words) + (file is not None) > 1:
        raise InputError(
            f"rllib train: expected one tuned example, got {', '.join([*words, *([str(file)] if file else [])])}"
        )
    return Path(words[0]) if words else file


def _existing(path: Path) -> Path:
    name = path.name.removesuffix(".yaml")
    if not path.exists() and name in _examples():
        raise InputError(
            f"{path}: no such file; the package ships an example of that name: "
            f"`rllib example show {name} > {name}.yaml`"
        )
    return path


def _examples() -> dict[str, str]:
    """The text of every tuned example by name: from the installed package, or from the checkout that the package is."""
    folder = importlib.resources.files("rllib_pnn").joinpath("tuned_examples")
    if not folder.is_dir():
        checkout = Path(__file__).resolve().parent.parent / "tuned_examples"
        if not checkout.is_dir():
            raise RunFailed(f"the tuned examples are missing from the installation (neither {folder} nor {checkout})")
        folder = checkout
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def _home(path: Path) -> Path:
    """The folder of the one run that `path` names.

    That of an algorithm which was built in Python has columns alone; a run of `rllib train` has `experiment.json`.
    """
    if not any(os.path.lexists(path / name) for name in (EXPERIMENT_FILE, PLAN_FILE)):
        try:
            return home_of(path)
        except RunError as error:
            if any(path.glob(f"*/{MANIFEST_FILE}")):
                raise InputError(str(error)) from None  # there are several
        find_runs(path, expected="a run folder of `rllib train` or a column store")
    return _one_run(path).path


def _one_run(path: Path) -> RunFolder:
    runs = find_runs(path)
    if len(runs) > 1:
        raise InputError(f"{path}: holds {len(runs)} runs, choose one: {', '.join(str(run.path) for run in runs)}")
    return runs[0]


def _store(folder: RunFolder) -> ColumnStore:
    from rllib_pnn.network.store import ColumnStore

    store = ColumnStore(folder.columns)
    if not store.exists():
        raise InputError(f"{folder.path}: no column is frozen yet (there is no {folder.columns.name}/manifest.json)")
    return store


def _stores(path: Path) -> list[tuple[Path, ColumnStore]]:
    """The column stores of a run, of those of an experiment's runs that have one, or the one that `path` itself is."""
    from rllib_pnn.network.store import ColumnStore

    if os.path.lexists(path / PLAN_FILE):
        runs = find_runs(path)
        found = [(run.path, store) for run in runs if (store := ColumnStore(run.columns)).exists()]
        return found or [(run.path, _store(run)) for run in runs]
    home = _home(path)
    if os.path.lexists(home / EXPERIMENT_FILE):
        return [(home, _store(RunFolder(home)))]
    return [(home, ColumnStore(find_columns(home)))]


class _Stored(NamedTuple):
    """What `rllib evaluate` plays: columns, and each task's environment by its name."""

    store: ColumnStore
    tasks: dict[str, tuple[str, dict[str, Any]]]
    columns: dict[str, int]
    """Each task's own column, of tasks that have one already."""
    normalize_actions: bool


def _stored(home: Path) -> _Stored:
    """Of a run of `rllib train` as its experiment says, else as the manifest of the store says."""
    from rllib_pnn.analysis.analyze import refuse_module, task_name
    from rllib_pnn.network.store import ColumnStore

    tasks: dict[str, tuple[str, dict[str, Any]]] = {}
    normalize = True
    if os.path.lexists(home / EXPERIMENT_FILE):
        experiment = RunFolder(home).experiment
        if experiment.progressive is None or experiment.env is None:
            raise InputError(f"{home}: an ordinary RLlib run, expected a progressive one, which stores its columns")
        store = _store(RunFolder(home))
        base = experiment.config.get("env_config", {})
        tasks = {spec.name: (experiment.env, {**base, **spec.env_config}) for spec in experiment.progressive.tasks}
        normalize = bool(experiment.config.get("normalize_actions", True))
    else:
        store = ColumnStore(find_columns(home))
    columns = {entry.task: index for index, entry in enumerate(store.entries) if entry.task in tasks}
    for index, entry in enumerate(store.entries):
        # An environment that was given as a class or a function has no name. Of columns that came from another run
        # (`columns_from`) the experiment says nothing.
        if entry.task in columns or entry.env is None:
            continue
        with _input_errors():
            refuse_module(f"{store.path}: column of {entry.task}", entry.env)
        name = task_name(entry.task, entry.extra)
        name = entry.task if name in tasks else name
        tasks[name], columns[name] = (entry.env, entry.env_config), index
    if not tasks:
        raise InputError(
            f"{store.path}: names no environment to play in; from Python, `evaluate_column` of "
            "rllib_pnn.training.evaluation takes a class or a function"
        )
    return _Stored(
        store, dict(sorted(tasks.items(), key=lambda task: columns.get(task[0], len(columns)))), columns, normalize
    )


def _console(*, stderr: bool = False) -> Console:
    """Standard output, or what is said beside a document that goes there; wide lines where no terminal limits them."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Console(highlight=False, markup=False, emoji=False, width=width, stderr=stderr)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))


class _PlainTable(Table):
    """Cells are text from somebody's files: neither markup nor control sequences of a terminal."""

    def add_row(self, *cells: Any, **kwargs: Any) -> None:
        super().add_row(*(Text(printable(str(cell))) for cell in cells), **kwargs)


def _table(*headers: str) -> Table:
    table = _PlainTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(
            Text(printable(header)),
            justify="left" if header in _TEXTS else "right",
            overflow="fold",
        )
    return table


def _evaluate_auto(stored: _Stored, episodes: int, seed: int, deterministic: bool, as_json: bool) -> None:
    """Every task is played without its name; prints which columns were chosen and how well they did."""
    import numpy as np

    from rllib_pnn.analysis.analyze import refuse_module, task_name
    from rllib_pnn.registration import register
    from rllib_pnn.training.evaluation import evaluate_column, evaluate_recognised
    from rllib_pnn.training.recognition import KEY, Recogniser, Statistics, confused_pairs, features_of

    register()
    store, _, _, normalize = stored
    entries, network = store.entries, store.load()
    # A random column of baseline 4 has no task.
    known = {task_name(e.task, e.extra): k for k, e in enumerate(entries) if e.env is not None}
    with _input_errors():
        for k in known.values():
            refuse_module(f"{store.path}: column {k}", str(entries[k].env))
    if len(known) < 2:
        raise InputError(f"--task auto: {store.path} holds {len(known)} column of a known task, expected at least two")
    console = _console(stderr=as_json)
    size = features_of(np.zeros((1, *network.given_observation_shape)), network.channels_last_input).shape[1]
    statistics: dict[str, Statistics] = {}
    for name, k in known.items():
        if KEY in entries[k].extra:
            try:
                statistics[name] = Statistics.from_json(entries[k].extra[KEY])
            except ValueError as error:
                raise InputError(f"{store.path}: column {k}: extra.{KEY}: {error}") from None
            if len(statistics[name].mean) != size:
                del statistics[name]  # stores of earlier versions have those of the wrong part of (H, W, C) images
    missing = {name: k for name, k in known.items() if name not in statistics}
    if missing:
        console.print(
            f"the store says nothing that fits on the first observations of column "
            f"{', '.join(map(str, missing.values()))}: {EPISODES_TO_MEASURE} episodes of each are played first",
            soft_wrap=True,
        )
    for name, k in missing.items():
        with _input_errors(), console.status(f"{name}: column {k} shows what its task looks like"):
            seen = evaluate_column(
                network,
                str(entries[k].env),
                entries[k].env_config,
                column=k,
                num_episodes=EPISODES_TO_MEASURE,
                seed=seed + 1_000_003,
                normalize_actions=normalize,
            ).first_steps
        found = seen.statistics() if seen is not None else None
        assert found is not None  # episodes were played
        statistics[name] = found
        console.print(f"{name}: the first observations of column {k} are measured")
    try:
        recogniser = Recogniser([statistics[name] for name in known], len(network.given_observation_shape) > 1)
    except ValueError as error:
        raise InputError(f"{store.path}: {error}") from None
    columns, names = list(known.values()), list(known)
    confusion: dict[tuple[str, str], int] = {}
    results = []
    table = _table("task", *(f"{name} ({k})" for name, k in known.items()), "right %", "return", "at freezing")
    for name, k in known.items():
        with _input_errors(), console.status(f"{name}: {episodes} episodes"):
            played = evaluate_recognised(
                network,
                str(entries[k].env),
                entries[k].env_config,
                columns=columns,
                recogniser=recogniser,
                num_episodes=episodes,
                seed=seed,
                deterministic=deterministic,
                normalize_actions=normalize,
            )
        for chosen in played.chosen:
            pair = (name, names[columns.index(chosen)])
            confusion[pair] = confusion.get(pair, 0) + 1
        score = entries[k].score
        table.add_row(
            name,
            *(str(confusion.get((name, other), 0)) for other in names),
            f"{100 * confusion.get((name, name), 0) / len(played.chosen):.0f}",
            f"{played.episode_return_mean:.2f}",
            "-" if score is None else f"{score:.2f}",
        )
        results.append(
            {
                "task": name,
                "column": k,
                "chosen": {other: confusion.get((name, other), 0) for other in names},
                "return_mean": played.episode_return_mean,
                "returns": played.returns,
                "lengths": played.lengths,
                "return_at_freezing": score,
            }
        )
    right = sum(confusion.get((name, name), 0) for name in names)
    total = sum(confusion.values())
    pairs = confused_pairs(confusion, names)
    if as_json:
        settings = {"store": str(store.path), "seed": seed, "deterministic": deterministic}
        _print_json(settings | {"results": results, "right": right, "episodes": total, "confused": pairs})
        return
    console.print("episodes by task and by the column that was chosen for them:")
    console.print(table)
    console.print(f"right in {right} of {total} episodes ({100 * right / total:.1f} %)")
    for first, second in pairs:
        console.print(f"{first} and {second} can't be told apart by their first observations")


def _report(console: Console, outcome: Outcome, plan: Plan | None = None) -> int:
    """Says what came of an experiment and what to do next; returns the exit code."""
    chosen = plan if plan is not None and plan.only else None
    if chosen and outcome.finished_before:
        console.print("These trials are finished; to repeat one, remove its folder first", soft_wrap=True)
    if outcome.conclusion is not None:
        return _report_transfer(console, outcome, outcome.conclusion)
    rows = _result_rows(outcome) if not any(run.experiment.trial for run in outcome.runs) else []
    if rows and not outcome.finished_before:
        table = _table("run", "task", "column", "steps", "return at freezing", "fingerprint")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    def say(message: str) -> None:
        console.print(message, soft_wrap=True)

    shown = _relative(outcome.runs[0].path if len(outcome.runs) == 1 else outcome.path)
    go_on = chosen.command(Path(_relative(outcome.path))) if chosen else f"rllib train --resume {shown}"
    if outcome.stopped_by is not None:
        say(f"Stopped. Go on with:  {go_on}")
        return 128 + outcome.stopped_by
    if outcome.failed:
        _tell_failures(outcome)
        say(f"Once that is mended:  {go_on}")
        return FAILED
    say(f"{'Finished before, nothing is left to train' if outcome.finished_before else 'Done'}. Run folder: {shown}")
    if chosen:
        say(f"Next:  rllib train --resume {_relative(outcome.path)}  (the other trials, and the report on all of them)")
        return DONE
    first = _relative(outcome.runs[0].path)
    say(f"Next:  rllib evaluate {first}" if rows else f"Next:  tensorboard --logdir {shown}  (pip install tensorboard)")
    return DONE


def _tell_failures(outcome: Outcome) -> None:
    for run in outcome.failed:
        _fail(f"{_relative(run.path)}: failed: {run.failure()}; details in {ERROR_FILE} there", FAILED)


def _report_transfer(console: Console, outcome: Outcome, conclusion: Conclusion) -> int:
    """The same for a transfer experiment whose trials are over."""
    for part in conclusion.tables:
        if part["rows"]:
            console.print(f"{part['suite']}, transfer score in percent of scratch:")
            table = _table("method", "mean %", "median %", "trials")
            for row in part["rows"]:
                table.add_row(row["method"], f"{row['mean']:.0f}", f"{row['median']:.0f}", str(row["runs"]))
            console.print(table)
    for problem in conclusion.problems:
        print(f"rllib: {printable(problem)}", file=sys.stderr)
    left = [run for run in outcome.runs if run.state.status != "finished"]
    _tell_failures(outcome)
    if conclusion.report is not None:
        console.print(f"Report: {_relative(conclusion.report)}", soft_wrap=True)
    if left:
        waiting = len(left) - len(outcome.failed)
        console.print(
            f"{len(outcome.failed)} failed"
            + (f", {waiting} could not start without them" if waiting else "")
            + f". Once that is mended:  rllib train --resume {_relative(outcome.path)}",
            soft_wrap=True,
        )
        return FAILED
    console.print(f"Done. Folder: {_relative(outcome.path)}", soft_wrap=True)
    return DONE


def _result_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    from rllib_pnn.network.store import ColumnStore

    rows: list[tuple[str, ...]] = []
    for run in outcome.runs:
        for index, entry in enumerate(ColumnStore(run.columns).entries):
            if entry.extra.get("source"):
                continue  # it came with `columns_from`
            rows.append(
                (
                    run.path.name,
                    entry.task,
                    str(index),
                    "-" if entry.num_env_steps is None else f"{entry.num_env_steps:,}",
                    "-" if entry.score is None else f"{entry.score:.2f}",
                    entry.fingerprint[:12],
                )
            )
    return rows


def _relative(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    sys.exit(main())
