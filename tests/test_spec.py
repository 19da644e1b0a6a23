"""What a tuned example may say, and what it means."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rllib_pnn.experiment import spec
from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.source import key_path, read_yaml
from rllib_pnn.experiment.spec import Plan, load_experiment, load_plans
from rllib_pnn.text import did_you_mean

EXAMPLES = sorted((Path(__file__).parent.parent / "tuned_examples").glob("*.yaml"))

SOUP = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  config: {lr: 1e-3, seed: 5}
  progressive:
    column: mlp
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 4.0e+6}}
      - {name: flipped, env_config: {variant: flipped}, until: {episode_return_mean: 450}}
"""


def plan_of(text: str, folder: Path) -> Plan:
    (folder / "file.yaml").write_text(text)
    (plan,) = load_plans(folder / "file.yaml")
    return plan


def test_progressive_experiment(tmp_path: Path) -> None:
    plan = plan_of(SOUP, tmp_path)
    assert plan.name == "soup" and list(plan.runs) == ["seed_5"]
    experiment = plan.runs["seed_5"]
    assert experiment.config == {"lr": 0.001, "seed": 5}
    assert experiment.progressive is not None
    first, second = experiment.progressive.tasks
    assert first.until.num_env_steps == 4_000_000 and isinstance(first.until.num_env_steps, int)
    assert (second.name, second.env_config, second.until.episode_return_mean) == (
        "flipped",
        {"variant": "flipped"},
        450,
    )


def test_experiment_json_reads_back(tmp_path: Path) -> None:
    experiment = plan_of(SOUP, tmp_path).runs["seed_5"]
    (tmp_path / "experiment.json").write_text(json.dumps(experiment.model_dump(mode="json")))
    assert load_experiment(tmp_path / "experiment.json")[1] == experiment


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-4", 1e-4),
        ("1E6", 1e6),
        ("4.0e+6", 4e6),
        (".5", 0.5),
        ("-2", -2),
        ("1_000.5", 1000.5),
        (".inf", float("inf")),
        ("Infinity", float("inf")),  # as Python's JSON has it
        ("-Infinity", float("-inf")),
    ],
)
def test_numbers(written: str, number: float, tmp_path: Path) -> None:
    # PyYAML alone reads 1e-4 as text.
    (tmp_path / "n.yaml").write_text(f"x: {written}\n")
    assert read_yaml(tmp_path / "n.yaml").data == {"x": number}


@pytest.mark.parametrize("word", ["e5", "1.2.3", "1e", "v1e5"])
def test_words_that_look_like_numbers(word: str, tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text(f"x: {word}\n")
    assert read_yaml(tmp_path / "n.yaml").data == {"x": word}


def test_same_data_as_pyyaml() -> None:
    for path in EXAMPLES:
        assert read_yaml(path).data == yaml.safe_load(path.read_text()), path


def test_lines_of_keys(tmp_path: Path) -> None:
    (tmp_path / "l.yaml").write_text("a: &x\n  b: 1\nc:\n  - <<: *x\n    d: 2\n")
    source = read_yaml(tmp_path / "l.yaml")
    assert source.data == {"a": {"b": 1}, "c": [{"b": 1, "d": 2}]}
    assert source.lines[("a", "b")] == 2 and source.lines[("c", 0, "d")] == 5
    assert str(source.error(("c", 0, "nowhere"), "wrong")) == f"{source.path}:4: c[0].nowhere: wrong"


def test_sections_are_flattened(tmp_path: Path) -> None:
    plan = plan_of(
        "a: {run: PPO, env: E, config: {training: {lr: 1}, env_runners: {num_env_runners: 2}, gamma: 0.9}}", tmp_path
    )
    (experiment,) = plan.runs.values()
    assert experiment.config == {"lr": 1, "num_env_runners": 2, "gamma": 0.9, "seed": 0}
    assert "a.config.training.lr: no" in str(plan.error(("config", "lr"), "no"))
    with pytest.raises(InputError, match=r"'lr' is given twice.*directly in config"):
        plan_of("a: {run: PPO, env: E, config: {lr: 1, training: {lr: 2}}}", tmp_path)


def test_older_files(tmp_path: Path) -> None:
    plan = plan_of(
        "a: {run: PPO, checkpoint_freq: 5, keep_checkpoints_num: 2, config: {env: E}}",
        tmp_path,
    )
    (experiment,) = plan.runs.values()
    assert experiment.env == "E" and "env" not in experiment.config
    assert (experiment.checkpoint_config.checkpoint_frequency, experiment.checkpoint_config.num_to_keep) == (5, 2)
    assert spec.METRIC_NAMES["episode_reward_mean"] == "env_runners/episode_return_mean"


def test_several_experiments(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("a: {run: PPO, env: E}\nb: {run: DQN, env: F}\n")
    assert [(plan.name, *(e.run for e in plan.runs.values())) for plan in load_plans(tmp_path / "two.yaml")] == [
        ("a", "PPO"),
        ("b", "DQN"),
    ]


def test_samples_differ_in_their_seed(tmp_path: Path) -> None:
    plan = plan_of("a: {run: PPO, env: E, num_samples: 3, config: {seed: 7}}", tmp_path)
    assert {name: e.seed for name, e in plan.runs.items()} == {"seed_7": 7, "seed_8": 8, "seed_9": 9}


def test_no_seed(tmp_path: Path) -> None:
    plan = plan_of("a: {run: PPO, env: E, num_samples: 2, config: {seed: null}}", tmp_path)
    assert {name: e.seed for name, e in plan.runs.items()} == {"run_0": None, "run_1": None}


def test_grid_search(tmp_path: Path) -> None:
    text = SOUP.replace("lr: 1e-3", "lr: {grid_search: [1e-3, 1e-4]}").replace(
        "column: mlp", "lateral_scale: {grid_search: [1, 0.1]}"
    )
    plan = plan_of(text, tmp_path)
    values = {name: (e.config["lr"], e.progressive and e.progressive.lateral_scale) for name, e in plan.runs.items()}
    assert values == {
        "lr=0.001_lateral_scale=1_seed_5": (1e-3, 1),
        "lr=0.001_lateral_scale=0.1_seed_5": (1e-3, 0.1),
        "lr=0.0001_lateral_scale=1_seed_5": (1e-4, 1),
        "lr=0.0001_lateral_scale=0.1_seed_5": (1e-4, 0.1),
    }


def test_random_search_is_the_same_every_time(tmp_path: Path) -> None:
    text = (
        "a: {run: PPO, env: E, num_samples: 5, config: {lr: {loguniform: [1e-5, 1e-2]}, gamma: {choice: [0.9, 0.99]}}}"
    )
    runs = list(plan_of(text, tmp_path).runs.values())
    assert runs == list(plan_of(text, tmp_path).runs.values())
    rates = [e.config["lr"] for e in runs]
    assert len(set(rates)) == 5 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert {e.config["gamma"] for e in runs} <= {0.9, 0.99}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_examples_are_valid(path: Path) -> None:
    assert load_plans(path)
    comment = path.read_text().splitlines()
    assert comment[0].startswith("# ") and any("rllib train -f" in line for line in comment if line.startswith("#"))


def test_keys_are_those_of_make_progressive() -> None:
    from rllib_pnn.training.progressive import make_progressive

    parameters = inspect.signature(make_progressive).parameters
    # Where columns go is the run folder's business, and spaces are always checked.
    expected = parameters.keys() - {"config", "column_store", "check_spaces"}
    fields = spec.ProgressiveSpec.model_fields
    assert fields.keys() - {"source_tasks"} == expected  # that one is noted for the report
    for name in expected - {"tasks"}:
        assert fields[name].default == parameters[name].default, name


def test_algorithms_are_those_of_rllib() -> None:
    from ray.rllib.algorithms.registry import ALGORITHMS

    from rllib_pnn.experiment.algorithm import OWN_ALGORITHMS, algorithm_class

    assert set(spec.ALGORITHMS) == {*ALGORITHMS, *OWN_ALGORITHMS}
    for name in spec.PROGRESSIVE_ALGORITHMS:
        assert algorithm_class(name).__name__ == name


def test_sections_are_methods_of_algorithm_config() -> None:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    assert all(inspect.isfunction(getattr(AlgorithmConfig, section)) for section in spec.SECTIONS)


def test_reading_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(SOUP)
    program = (
        "import sys; from rllib_pnn.experiment.spec import load_plans; import rllib_pnn.cli\n"
        f"load_plans({str(tmp_path / 'file.yaml')!r})\n"
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lateral_scal", ["lateral", "lateral_scale"], "; did you mean 'lateral_scale'?"),
        ("learning_rate", ["lr"], "; did you mean 'lr'?"),
        ("lerning_rate", ["lr"], "; did you mean 'lr'?"),
        ("zzz", ["lr"], ""),
    ],
)
def test_did_you_mean(word: str, known: list[str], expected: str) -> None:
    assert did_you_mean(word, known, {"learning_rate": "lr"}) == expected


@pytest.mark.parametrize(
    ("metric", "meant"),
    [
        ("episode_retrun_mean", "episode_return_mean"),
        ("env_runners/episode_return_meen", "env_runners/episode_return_mean"),
        ("env_runner/episode_return_mean", "env_runners/episode_return_mean"),
        ("training_iterations", "training_iteration"),
        ("timestep_total", "timesteps_total"),
        ("env_runners/episode_return_min", None),
        ("evaluation/env_runners/agent_episode_return_mean/0", None),
        ("evaluation/env_runners/episode_return_mean", None),
        ("learners/default_policy/entropy", None),
        ("time_total_s", None),
        ("perf/cpu_util_percent", None),
    ],
)
def test_metrics_that_are_nearly_known_are_misspelt(metric: str, meant: str | None, tmp_path: Path) -> None:
    text = f"a: {{run: PPO, env: E, stop: {{{metric}: 5}}}}"
    if meant is None:
        assert plan_of(text, tmp_path).runs["seed_0"].stop == {metric: 5}
        return
    with pytest.raises(InputError, match=rf"a\.stop\.{metric}: no result has such a metric; did you mean '{meant}'\?"):
        plan_of(text, tmp_path)


def test_a_run_folder_of_an_earlier_version_may_have_a_stop_beside_its_tasks(tmp_path: Path) -> None:
    experiment = plan_of(SOUP, tmp_path).runs["seed_5"].model_dump(mode="json") | {"stop": {"episode_len_meen": 5}}
    (tmp_path / "experiment.json").write_text(json.dumps(experiment))
    assert load_experiment(tmp_path / "experiment.json")[1].progressive is not None


def test_key_path() -> None:
    assert key_path(("a", "tasks", 1, "until")) == "a.tasks[1].until"
