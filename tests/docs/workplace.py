"""A folder laid out as the README's commands expect it, with everything in it small, and how each command is run there.

The archive has 48 phantom-like images of 64 x 48 pixels, the experiments keep their names and their choices (see
tests.test_experiments.shrunk), downloads have the published shapes. `TREATMENTS` says for every kind of command how it
is run; a command that none of them knows is an error.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from launch import cli, demo
from msmil.config_io import dump_config, load_config
from tests.archives import GroupedArchive, make_grouped_archive, write_csv
from tests.benchmarks import manifest, memory, streaming, variants
from tests.docs.alone import alone
from tests.docs.pages import ROOT
from tests.experiments import TINY, save_blank
from tests.msmil.models.published.test_convert import head_only, mammoclip
from tests.runs import reset
from tests.servers import serving
from tests.test_experiments import NAMES, shrunk
from tests.worlds import environment, wait_for

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
REPLICATES = 20


def lay_out(folder: Path) -> None:
    """Archive, tables, downloads, experiments."""
    archive = make_grouped_archive(folder, exams=12)
    shutil.copytree(archive.images, folder / "images")
    write_csv(folder / "mine.csv", [_own_row(cells) for cells in archive.rows])
    for name in NAMES:
        _write_small(name, folder)
    (folder / "my_experiment.yaml").write_text(yaml.safe_dump(_from_published_encoder(archive)), encoding="utf-8")
    _save(mammoclip(), folder / "b2-model-best-epoch-10.tar")
    _save(head_only("fpn_abmil"), folder / "best_model.pth")


def _own_row(cells: dict[str, str]) -> dict[str, str]:
    own = {key: cells[key] for key in ("patient_id", "laterality", "view", "split", "Mass")}
    return {"image": f"{cells['patient_id']}/{cells['image_id']}.png", **own}


def _write_small(name: str, folder: Path) -> None:
    data = "demo" if Path(name).stem == "demo" else "vindr"
    config = shrunk(name, Path(f"data/{data}/shards"), folder)
    features = "data/vindr/features" if config.data.features else ""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    small = replace(
        config,
        output_dir="runs",
        data=replace(config.data, features=features),
        train=replace(config.train, epochs=1),
        evaluate=replace(config.evaluate, bootstrap_replicates=REPLICATES),
    )
    file.write_text(dump_config(small), encoding="utf-8")


def _from_published_encoder(archive: GroupedArchive) -> dict[str, object]:
    """One step with Mammo-CLIP's encoder."""
    model = TINY["model"] | {"backbone": "mammoclip_b2", "backbone_options": {}, "scales": [16, 32]}
    data = {"shards": "data/vindr/shards", "labels": ["Mass"], "workers": 0, "last_batch": "drop"}
    train = TINY["train"] | {"epochs": 1, "batch_size": 16}
    return TINY | {"name": "my_experiment", "model": model, "data": data, "train": train}


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    torch.save({"model": {key: value.contiguous() for key, value in tensors.items()}}, file)


def plain(line: str) -> None:
    """As it stands; figures are looked at in the tests of the report."""
    name, *arguments = shlex.split(line)
    assert name == "msmil"
    with mock.patch("matplotlib.figure.Figure.savefig", save_blank):
        assert cli.main(arguments) == 0, line


def small_phantoms(line: str) -> None:
    """Three exams instead of five hundred."""
    plain(line.replace("400", "2").replace("100", "1"))


def one_repetition(line: str) -> None:
    """One run of five; tests/launch/test_repeat_command.py trains two folds."""
    if "--folds" in line:
        assert callable(cli.parse(shlex.split(line)[1:]).run)
    else:
        plain(line.replace("--runs 5", "--runs 1"))


def small_recipe(line: str) -> None:
    """Mammo-CLIP's recipe to a twentieth of its size."""
    plain(f"{line} --height 76 --width 46")


def one_graph(line: str) -> None:
    """The graph of one format; tests/launch/test_export_command.py writes the other."""
    assert " --format torch-export" in line
    plain(line.replace(" --format torch-export", ""))


def small_tiles(line: str) -> None:
    """The published model on tiles of 128 pixels instead of 512; its weights fit any."""
    config = load_config(Path(shlex.split(line)[2]) / "config.yaml")
    assert config.bags.tile_size_px == 512
    small = replace(config, bags=replace(config.bags, tile_size_px=128))
    small = replace(small, evaluate=replace(small.evaluate, bootstrap_replicates=REPLICATES))
    small = replace(small, data=replace(small.data, workers=0))
    (Path(shlex.split(line)[2]) / "config.yaml").write_text(dump_config(small), encoding="utf-8")
    plain(line)


def small_demo(line: str) -> None:
    """The Makefile's target is `msmil demo`, which is run on eight exams."""
    assert re.search(r"^demo: install\n\t\$\(BIN\)/msmil demo$", MAKEFILE, flags=re.MULTILINE)
    with mock.patch.object(demo, "TRAINING_EXAMS", 6), mock.patch.object(demo, "TEST_EXAMS", 2):
        plain("msmil demo --ranks 1")


def target_of_make(line: str) -> None:
    """A target of the Makefile whose commands make can tell; `make test` would run itself."""
    target = line.split()[1]
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def activate(line: str) -> None:
    """The environment that the Makefile makes."""
    assert line == ". .venv/bin/activate"
    assert "VENV ?= .venv\n" in MAKEFILE


def small_scaling(line: str) -> None:
    """One step of one rank on images of this folder's size."""
    plain(f"{line.replace('1520x912', '64x48')} --ranks 1 --steps 1")


def by_launcher(line: str) -> None:
    """Read by the launcher's own parser, then one rank here; test_train_command.py and test_layouts.py start both
    launchers for real."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    words = shlex.split(line)
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        assert (args.nproc_per_node, args.standalone) == ("4", True)
    else:
        args = launch_command_parser().parse_args(words[2:])
        if args.config_file is not None:
            assert yaml.safe_load((ROOT / args.config_file).read_text())["num_processes"] == 4
        else:
            assert (args.num_processes, args.multi_gpu) == (4, True)
    if args.training_script == "launch.cli":
        assert cli.main(args.training_script_args) == 0  # alone: test_doctor_collectives.py starts two
        return
    assert (args.module, args.training_script) == (True, "launch.train")
    name = f"by_{words[0]}"
    assert alone("launch.train", [*args.training_script_args, f"name={name}"]) == 0
    assert (Path("runs") / name / "checkpoints" / "latest").exists()


def by_srun(line: str) -> None:
    """One task of it here; tests/cluster runs the line under a real SLURM."""
    words = shlex.split(line)
    python = words.index("python")
    assert words[python + 1 : python + 3] == ["-m", "launch.train"]
    assert (ROOT / "tests" / "cluster" / "test_slurm.py").is_file()
    assert alone("launch.train", [*words[python + 3 :], "name=by_srun"]) == 0


def watched(line: str) -> None:
    """Until it serves; then it is ended as Ctrl-C ends it."""
    words = [sys.executable, "-m", "launch.cli", *shlex.split(line)[1:]]
    said = Path("watch.txt")
    with said.open("w") as file, subprocess.Popen(words, env=environment(), stdout=file) as process:
        try:

            def serves() -> bool:
                assert process.poll() is None, f"{line} ended with {process.returncode}"
                return "http://" in said.read_text()

            wait_for(serves, deadline_s=60)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def from_a_server(line: str) -> None:
    """From a web server in place of the cloud; tests/shards/remote/test_s3.py reads from S3."""
    address = "s3://bucket/vindr/shards"
    assert address in line
    assert "data.cache_gb=200" in line
    with serving(Path("data/vindr/shards")) as server:
        cache = f"data.cache_gb=0.1 data.cache_dir={Path('cache').absolute()}"
        plain(line.replace(address, server.url).replace("data.cache_gb=200", cache))


def small_benchmark(line: str) -> None:
    """A thousand images instead of a million; eight small ones instead of eighty."""
    program = {"manifest": manifest, "streaming": streaming}[line.rpartition(".")[2]]
    small = "--exams 2 --height 64 --width 48 --batch-size 2 --workers 0 --step-s 0 --latency-s 0"
    program.main(["--rows", "1000"] if program is manifest else small.split())


def parsed_alone(line: str) -> None:
    """It looks at the machine for half a minute; tests of its own run it."""
    assert callable(cli.parse(shlex.split(line)[1:]).run)
    assert list((ROOT / "tests").rglob("test_*doctor*.py")), "nothing tests msmil doctor"


def cheapest_row(line: str) -> None:
    """The row that needs no backbone; tests/benchmarks/test_memory.py computes a larger one."""
    assert line == "python -m tests.benchmarks.memory"
    memory.main(["--only", "stored features", "--images", "1"])


def small_variants(line: str) -> None:
    """Two variants on small images; their networks at full size are built in tests/benchmarks/test_variants.py."""
    assert line == "python -m tests.benchmarks.variants --rounds 3"
    small = ["--height", "128", "--width", "128", "--rounds", "1", "--backbone", "test_efficientnet"]
    variants.main([*small, "--only", "mass_nested"])


def short_bench(line: str) -> None:
    """One round, after which accelerate forgets the device and the precision."""
    reset()
    plain(f"{line} --steps 1" if line.startswith("msmil bench train") else f"{line} --images 8 --rounds 1")
    reset()


def order_alone(line: str) -> None:
    """It starts processes that import torch; tests/benchmarks/test_order.py runs it on fewer images."""
    assert line == "python -m tests.benchmarks.order"
    assert (ROOT / "tests" / "benchmarks" / "test_order.py").is_file()


def figure(line: str) -> None:
    """Drawn into this folder."""
    _, script, *arguments = shlex.split(line)
    spec = importlib.util.spec_from_file_location("figure", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"figure": module}):
        spec.loader.exec_module(module)
        module.main([*arguments, "--out", "figure.jpg"])
    assert Path("figure.jpg").stat().st_size > 1000


TREATMENTS: tuple[tuple[str, Callable[[str], None]], ...] = (
    (r"make demo", small_demo),
    (r"make (test|docs|figures)", target_of_make),
    (r"\. .*", activate),
    (r"(torchrun|accelerate launch) .*", by_launcher),
    (r"srun .*", by_srun),
    (r"python docs/figures/maps.py .*", figure),
    (r"python -m tests.benchmarks.memory", cheapest_row),
    (r"python -m tests.benchmarks.variants .*", small_variants),
    (r"python -m tests.benchmarks.(manifest|streaming)", small_benchmark),
    (r"msmil train .* data.shards=s3://.*", from_a_server),
    (r"python -m tests.benchmarks.order", order_alone),
    (r"msmil phantom .*", small_phantoms),
    (r"msmil pack .* --recipe mammoclip", small_recipe),
    (r"msmil repeat .*", one_repetition),
    (r"msmil evaluate weights/.*", small_tiles),
    (r"msmil export .* --format onnx .*", one_graph),
    (r"msmil bench scaling .*", small_scaling),
    (r"msmil watch .*", watched),
    (r"msmil doctor.*", parsed_alone),
    (r"msmil bench (train|loader) .*", short_bench),
    (r"msmil (pack|verify|train|extract|convert|evaluate|export|report|runs) ?.*", plain),
)


def treat(line: str) -> None:
    """Run a command of the pages in the working folder."""
    for pattern, treatment in TREATMENTS:
        if re.fullmatch(pattern, line):
            treatment(line)
            return
    pytest.fail(
        f"no treatment knows {line!r}: add one to TREATMENTS, so that the pages hold no command that is not run"
    )
