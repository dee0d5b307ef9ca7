"""Files for `accelerate launch` hold process layout alone; srun's variables in words of torch.

tests/cluster trains under a real SLURM.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from msmil.config import TrainConfig
from msmil.engine.environment import first_host, refuse_environment, task_variables
from tests.experiments import write_tiny
from tests.worlds import ROOT, run

FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
LAYOUT = {
    "compute_environment", "distributed_type", "num_machines", "num_processes", "machine_rank", "main_process_ip",
    "main_process_port", "rdzv_backend", "same_network", "gpu_ids",
}  # fmt: skip
EXPERIMENTS = (
    TrainConfig(),
    TrainConfig(precision="fp32", accumulation=4),
    TrainConfig(precision="fp16", compile=True),
    TrainConfig(engine="deepspeed", zero_stage=3),
)


def test_every_layout_that_is_promised_is_there() -> None:
    counts = {file.stem: yaml.safe_load(file.read_text())["num_processes"] for file in FILES}
    assert counts == {"gpus_1": 1, "gpus_2": 2, "gpus_4": 4, "gpus_8": 8, "machines_2": 16}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_holds_nothing_but_layout(file: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    assert set(tree) <= LAYOUT
    load_config_from_file(str(file))  # accelerate knows every key


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_accelerate_makes_of_it_contradicts_no_experiment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (command,) = re.findall(r"^# (accelerate launch .*)$", file.read_text(), flags=re.MULTILINE)
    words = shlex.split(command)[2:]
    assert words[:2] == ["--config_file", str(file.relative_to(ROOT))]
    args = launch_command_parser().parse_args(["--config_file", str(file), *words[2:]])
    args, _, _ = _validate_launch_command(args)
    tree = yaml.safe_load(file.read_text())
    assert (args.num_processes, args.num_machines) == (tree["num_processes"], tree["num_machines"])
    assert args.multi_gpu == (tree["num_processes"] > 1)
    made = prepare_multi_gpu_env(args) if args.multi_gpu else prepare_simple_launcher_cmd_env(args)[1]
    for config in EXPERIMENTS:
        refuse_environment(config, made)


DEEPSPEED = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 1, gradient_clipping: 0.5}
num_machines: 1
num_processes: 2
main_process_port: 0
"""


@pytest.mark.slow
def test_two_processes_of_a_file_with_deepspeed_train(tmp_path: Path, packed: Path) -> None:
    """accelerate's own launcher of DeepSpeed; what the file says of it is what the experiment says."""
    (tmp_path / "two.yaml").write_text(DEEPSPEED)
    sections = {"train": {"epochs": 1, "engine": "deepspeed", "zero_stage": 2}, "optim": {"clip_grad_norm": 0.5}}
    config = str(write_tiny(tmp_path, packed, **sections))
    command = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml"), "-m", "launch.train"]
    done = run([sys.executable, *command, config], deadline_s=120)
    assert done.returncode == 0, done.stderr
    assert "ranks: 2 on CPU" in (tmp_path / "runs" / "tiny" / "environment.txt").read_text()


def srun_says(rank: int, nodes: str = "127.0.0.1", job: str = "4711") -> dict[str, str]:
    """What a task of `srun -n 2` finds in its environment."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9],cpu1", "gpu03"), ("gpu[7,9]", "gpu7"), ("r[1-2]n[04-08].x,b", "r1n04.x")],
)
def test_the_first_host_of_a_compressed_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_variables_of_srun_in_words_of_torch() -> None:
    found = [task_variables(srun_says(rank, "gpu[3-4]")) for rank in range(2)]
    assert [one.pop("RANK") for one in found] == [one.pop("LOCAL_RANK") for one in found] == ["0", "1"]
    assert found[0] == found[1], "they meet at the same place"
    assert (found[0]["WORLD_SIZE"], found[0]["MASTER_ADDR"]) == ("2", "gpu3")
    assert task_variables(srun_says(0, job="4712"))["MASTER_PORT"] != found[0]["MASTER_PORT"]
    ports = [int(task_variables(srun_says(0, job=str(job)))["MASTER_PORT"]) for job in (1, 1714, 4712, 987654321)]
    assert all(20_000 <= port < 32_000 for port in ports), "Linux gives higher ones to connections"
    own = task_variables(srun_says(0) | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, srun_says(0) | {"RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}],
)
def test_nothing_is_translated_without_tasks_or_where_a_launcher_has_the_word(environment: dict[str, str]) -> None:
    assert task_variables(environment) == {}
