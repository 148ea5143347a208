"""cluster.yaml, and what it makes of a recipe's resources and of what sbatch is asked for."""

from pathlib import Path

import pytest

from nemoflow import cluster
from nemoflow.errors import NemoflowError
from nemoflow.progress import seconds
from nemoflow.recipe import Resources
from nemoflow.session import Session

RECIPES = [Path(__file__).resolve().parents[1] / "config/recipes"]


def described(tmp_path: Path, text: str) -> cluster.Cluster:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return cluster.load(file)


def test_without_a_file_slurm_decides(tmp_path):
    assert cluster.load(tmp_path / "cluster.yaml") == cluster.Cluster()
    assert described(tmp_path, "# account: me\n") == cluster.Cluster()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("acount: me", "acount: unknown key; did you mean 'account'?"),
        ("gpus_per_node: four", "gpus_per_node: 'four': input should be a valid integer"),
        ("container: {runtime: docker}", "container.runtime: 'docker': input should be 'pyxis' or 'apptainer'"),
        ("container: {mounts: [data]}", "container.mounts[0]: 'data': write /PATH, or /HOST/PATH:/CONTAINER/PATH"),
        ("env: {HF_TOKEN: abc}", "env.HF_TOKEN: 'abc': secrets do not stand in files; export it"),
        ("env: {2X: a}", "env.2X: 'a': is no name of an environment variable"),
        ("stages: {sft: {time: 90}}", "stages.sft.time: 90: give a time such as 4h, 90m or 1d12h"),
        ("stages: {sft: {gpus: 8}}", "stages.sft.gpus: unknown key; did you mean 'gpu'?"),
        ("budget: 0", "budget: 0: input should be greater than 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, error):
    with pytest.raises(NemoflowError) as raised:
        described(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path}/cluster.yaml: {error}")


def test_wall_times_in_seconds():
    assert [seconds(t) for t in ("4h", "90m", "1d12h", "1d2h3m", "30s", "", "4", "h")] == [
        14400, 5400, 129600, 93780, 30, 0, 0, 0,
    ]  # fmt: skip


def test_stages_get_the_same_number_of_gpus_on_nodes_of_this_size(tmp_path):
    here = described(tmp_path, "{gpus_per_node: 4, gpu: b200, stages: {sft: {nodes: 3}, nano3@rl: {time: 1h}}}")
    asked = Resources(nodes=16, gpus_per_node=8, gpu="h100", memory=900)

    def got(stage: str, asked: Resources = asked) -> tuple:
        found = here.resources("nano3", stage, asked)
        return found.nodes, found.gpus_per_node, found.gpu, found.time, found.memory

    assert got("phase1") == (32, 4, "b200", "4h", 900)
    assert got("phase1", Resources(nodes=2)) == (1, 2, "b200", "4h", None)
    assert got("sft") == (3, 8, "b200", "4h", 900)
    assert got("rl") == (32, 4, "b200", "1h", 900)
    with pytest.raises(NemoflowError, match=r"gpus_per_node: the 6 GPUs of nano3@phase1 do not fill nodes of 4"):
        got("phase1", Resources(nodes=1, gpus_per_node=6))


def test_an_engine_without_an_image_is_an_error_only_in_containers(tmp_path):
    assert described(tmp_path, "{}").image("mine") is None
    with pytest.raises(NemoflowError, match=r"container\.images\.mine: is missing"):
        described(tmp_path, "container: {runtime: pyxis}").image("mine")
    own = described(tmp_path, "container: {runtime: apptainer, images: {mine: /images/mine.sif}}")
    assert own.launch("mine")["image"] == "/images/mine.sif"


def submissions(tmp_path: Path, here: cluster.Cluster | None) -> dict[str, dict]:
    """What each job of the toy recipe asks Slurm for, by its title."""
    session = Session(tmp_path / "artifacts", RECIPES)
    session.cluster = here
    session.resolve(["hf_export/nano3-tiny"])
    (target,) = session.names["hf_export/nano3-tiny"].values()
    identities = {stage.identity for stage, _ in session.store.ancestors(target.stage.identity)}
    return {session.title(identity): session.submission(identity) for identity in identities}


def test_on_this_machine_nothing_is_asked_of_slurm(tmp_path):
    assert set(map(len, submissions(tmp_path, None).values())) == {0}


def test_what_jobs_ask_slurm_for(tmp_path):
    text = "{account: llm, partition: gpu, cpu_partition: cpu, gpu: h100, gpus_per_node: 8, cpus_per_gpu: 6, stages: "
    text += "{phase1: {nodes: 2, gpus_per_node: 4, time: 90m, memory: 500}}}"
    found = submissions(tmp_path, described(tmp_path, text))
    assert found["shards of topics"] == {
        "slurm_account": "llm",
        "slurm_partition": "cpu",
        "slurm_extra": "--open-mode=append",
    }
    assert found["pretrain phase1 of nano3-tiny"] == {
        "slurm_account": "llm",
        "slurm_partition": "gpu",
        "slurm_extra": "--open-mode=append",
        "mpi": "srun",
        "nodes": 2,
        "tasks_per_node": 4,
        "cpus_per_task": 6,
        "runtime": 90,
        "mem_mb": 500_000,
        "gres": "gpu:h100:4",
    }
    # The plugin's MPI form takes no single task per node
    assert found["sft of nano3-tiny"]["tasks_per_node"] == 2
    assert found["sft of nano3-tiny"]["gres"] == "gpu:h100:1"
    export = found["hf_export of nano3-tiny@dpo"]
    assert (export["slurm_partition"], export["mpi"], export["nodes"]) == ("cpu", "srun", 1)
    assert "gres" not in export
    assert found["data of nano3-tiny@phase1"]["mem_mb"] == 8000


def test_where_there_are_no_gpus_none_are_asked_for(tmp_path):
    found = submissions(tmp_path, described(tmp_path, "gpus_per_node: 0"))
    assert not any("gres" in asked for asked in found.values())
    assert found["pretrain phase1 of nano3-tiny"]["nodes"] == 1
