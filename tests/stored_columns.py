"""A run folder with stored columns, made without training. Shared by tests."""

from pathlib import Path

from rllib_pnn.experiment.folder import RunFolder, create_experiment
from rllib_pnn.experiment.spec import load_plans
from rllib_pnn.network import ColumnStore, ProgressiveNetwork

SOUP = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  config: {num_env_runners: 0, train_batch_size_per_learner: 500, minibatch_size: 100}
  progressive:
    column: mlp
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 500}}
      - {name: flipped, env_config: {variant: flipped}, until: {num_env_steps: 500}}
"""


def soup_run(folder: Path) -> Path:
    """A run folder with two stored columns, as a finished run of `SOUP` leaves it."""
    (folder / "soup.yaml").write_text(SOUP)
    folder_of_run = RunFolder(create_experiment(folder / "runs", load_plans("soup.yaml")[0]) / "seed_0")
    network = ProgressiveNetwork((4,), 2, "mlp")
    store = ColumnStore(folder_of_run.columns)
    for index, task in enumerate(["plain", "flipped"]):
        network.add_column()
        network.freeze()
        store.save_column(network, index, task=task, env="rllib_pnn/CartPoleSoup-v0", env_config={"variant": task})
    return folder_of_run.path.relative_to(folder)
