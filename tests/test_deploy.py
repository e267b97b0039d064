"""What deploy/ asks for is there: commands, files, folders, time to save, and the statuses that its rules go by."""

import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args

import main
from config import Config
from engine.run import RESCUE_SECONDS
from engine.stopping import PATIENCE_SECONDS
from utils.processes import PEER_LOST_STATUS

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PAGE = (ROOT / "docs" / "clusters.md").read_text()
USER_ERROR_STATUS = 2
RECIPE_BATCH = 1024
"""Images of a step of the published recipe, on all GPUs together."""


def objects(name: str) -> dict[str, dict]:
    """The objects of a file, by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((DEPLOY / name).read_text())}


def instructions(name: str) -> list[str]:
    """What follows an instruction of the Dockerfile, each time that it is there."""
    return [text.replace("\\\n", "") for text in re.findall(rf"^{name} ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)]


def parsed(words: list[str]) -> tuple[int | str, Config]:
    """The processes of a host and the config, of a command as the Dockerfile, its comment and the objects have it."""
    python, start, launch, *rest = words
    assert (python, start, launch) == ("python3", "deploy/start.py", "scripts/launch.py")
    assert (ROOT / start).is_file()
    assert (ROOT / launch).is_file()
    given = parse_args(rest)
    assert given.training_script == "main.py"
    processes = given.nproc_per_node
    return int(processes) if processes.isdecimal() else processes, main.parse(given.training_script_args)[0]


class Started(NamedTuple):
    """What a file starts: Job and TrainJob say the same in different places."""

    words: list[str]
    hosts: int
    pod: dict
    env: list[dict]
    resources: dict
    job: dict

    def mounts(self) -> dict[str, dict]:
        """What is mounted where, and how."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {mount["mountPath"]: {**volumes[mount["name"]], **mount} for mount in self.container["volumeMounts"]}

    @property
    def container(self) -> dict:
        (container,) = self.pod["containers"]
        return container


def of_job() -> Started:
    job = objects("job.yaml")["Job"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    (entrypoint,) = map(json.loads, instructions("ENTRYPOINT"))
    return Started([*entrypoint, *container["args"]], 1, pod, container["env"], container["resources"], job)


def of_train_job() -> Started:
    """With the numbers as flags that Kubeflow puts into torchrun's variables."""
    found = objects("trainjob.yaml")
    runtime, asked = found["TrainingRuntime"], found["TrainJob"]["spec"]
    assert asked["runtimeRef"]["kind"] == "TrainingRuntime"
    assert asked["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    job, trainer = replicated["template"]["spec"], asked["trainer"]
    assert replicated["name"] == job["template"]["spec"]["containers"][0]["name"] == "node"  # which Kubeflow looks for
    words = [*trainer["command"], "--nproc_per_node", str(trainer["numProcPerNode"]), *trainer["args"]]
    pod = job["template"]["spec"]
    return Started(words, trainer["numNodes"], pod, trainer["env"], trainer["resourcesPerNode"], job)


@pytest.fixture(params=[of_job, of_train_job])
def started(request, monkeypatch) -> Started:
    monkeypatch.chdir(ROOT)
    return request.param()


def test_what_is_started(started):
    processes, config = parsed(started.words)
    assert processes * started.hosts * config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS == RECIPE_BATCH
    assert {started.resources[kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {processes}


def test_what_is_started_by_hand(monkeypatch):
    """By the comment in the Dockerfile, and without any flags."""
    monkeypatch.chdir(ROOT)
    (entrypoint,) = map(json.loads, instructions("ENTRYPOINT"))
    (flags,) = map(json.loads, instructions("CMD"))
    assert parse_args([*entrypoint[3:], *flags]).training_script_args == ["--help"]
    comment = re.sub(r"\\?\n# *", " ", DOCKERFILE.partition("ARG ")[0])
    words = shlex.split(comment.partition("docker run ")[2])
    image = words.index("crossformer")
    _, config = parsed([*entrypoint, *words[image + 1 :]])
    docker = words[:image]
    mounted = [word.split(":")[1] for before, word in pairwise(docker) if before == "-v"]
    (home,) = instructions("WORKDIR")
    assert [config.DATA.DATA_PATH, str(Path(home, config.OUTPUT))] == mounted
    assert int(docker[docker.index("--stop-timeout") + 1]) > PATIENCE_SECONDS + RESCUE_SECONDS


def test_folders_are_mounted(started):
    """What a run writes outlasts its pod: results, and the list of images, which cannot be kept beside the data."""
    _, config = parsed(started.words)
    mounts = started.mounts()
    assert mounts[config.DATA.DATA_PATH]["readOnly"]
    (cache,) = (variable["value"] for variable in started.env if variable["name"] == "XDG_CACHE_HOME")
    claim = objects("results.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # the pods of a TrainJob are on several hosts
    for folder in (config.OUTPUT, cache):
        (over,) = (path for path in mounts if Path(folder).is_relative_to(path))
        assert "readOnly" not in mounts[over]
        assert mounts[over]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_to_delete_a_job_leaves_the_results():
    assert {*objects("job.yaml")} == {"Job"}
    assert {*objects("trainjob.yaml")} == {"TrainingRuntime", "TrainJob"}


def test_a_pod_has_time_to_save(started):
    seconds = started.pod["terminationGracePeriodSeconds"]
    assert seconds > PATIENCE_SECONDS + RESCUE_SECONDS
    assert f"{seconds} s to save" in PAGE


def test_what_is_started_again(started):
    """All but an error of the user's; and only a pod that is not started again in its place lets a rule decide."""
    (fails,) = [rule for rule in started.job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert fails["onExitCodes"] == {
        "containerName": started.container["name"], "operator": "In", "values": [USER_ERROR_STATUS],
    }  # fmt: skip
    assert started.pod["restartPolicy"] == "Never"


def test_how_often():
    job, train_job = of_job().job, of_train_job().job
    ignored = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert [pattern["type"] for rule in ignored for pattern in rule["onPodConditions"]] == ["DisruptionTarget"]
    assert f"`backoffLimit` ({job['backoffLimit']})" in PAGE
    # One that is started again alone would wait for others which have ended with status 0
    assert train_job["backoffLimit"] == 0
    assert len(train_job["podFailurePolicy"]["rules"]) == 1
    policy = objects("trainjob.yaml")["TrainingRuntime"]["spec"]["template"]["spec"]["failurePolicy"]
    assert f"`maxRestarts` ({policy['maxRestarts']})" in PAGE
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize(
    ("of_ranks", "status"),
    [
        ([USER_ERROR_STATUS, -15], USER_ERROR_STATUS),
        ([PEER_LOST_STATUS, -15], PEER_LOST_STATUS),
        ([1, -15], 1),
        ([-9, PEER_LOST_STATUS], PEER_LOST_STATUS),
    ],
)
def test_the_launcher_ends_with_what_the_rules_go_by(monkeypatch, of_ranks, status):
    """The first rank that fails is why the others do."""
    spec = importlib.util.spec_from_file_location("launch", ROOT / "scripts" / "launch.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    failures = {rank: ProcessFailure(rank, 4711 + rank, code, "") for rank, code in enumerate(of_ranks)}
    for rank, failure in failures.items():
        failure.timestamp = rank

    def run(given):
        raise ChildFailedError("main.py", failures)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "STOP_SIGNALS", ())
    assert launch.main(["main.py"]) == status


SIGNALS = f"{{{signal.SIGTERM:d}, {signal.SIGUSR1:d}}}"
WAITS = f"""import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNALS})
print(flush=True)
if signal.sigtimedwait({SIGNALS}, 30) is None:
    raise SystemExit(4)
"""


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        (WAITS, signal.SIGTERM, 143),
        (WAITS, signal.SIGUSR1, 138),
        (f"{WAITS}raise SystemExit(3)", signal.SIGTERM, 3),
        ("print()", None, 0),
        ("print(); raise SystemExit(2)", None, 2),
        ("import os; print(flush=True); os.kill(os.getpid(), 9)", None, 137),
    ],
    ids=["stopped by SIGTERM", "by SIGUSR1", "failed to stop", "done", "failed", "killed"],
)
def test_statuses_of_a_container(command, number, status):
    start = [sys.executable, "-S", DEPLOY / "start.py", "-S", "-c", command]
    with subprocess.Popen(start, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        if number:
            process.send_signal(number)
        assert process.wait(timeout=60) == status


def is_left_out(path: str) -> bool:
    """Whether .dockerignore keeps a file of the project out of the image."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{pattern}(/.*)?", path):
            return True
    return False


def test_what_the_image_holds():
    sources = [source for text in instructions("COPY") for source in text.split()[:-1]]
    assert sources == ["requirements.txt", "."]
    folders = "configs data deploy engine lr_scheduler models optimizer scripts tasks utils".split()
    needed = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    needed = [str(path.relative_to(ROOT)) for path in needed if path.is_file() and "__pycache__" not in path.parts]
    assert len(needed) > 100
    assert [path for path in [*sources, *needed] if is_left_out(path)] == []


def test_what_the_image_leaves_out():
    """History, environments, results, and whatever git ignores."""
    ignored = [line.rstrip("/").replace("*", "x") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert len(ignored) > 5
    for name in (".git", *ignored):
        assert is_left_out(f"{name}/file"), name
    assert is_left_out("data/__pycache__/folder.pyc")


def test_the_dockerfile_keeps_the_torch_of_its_image():
    """pip is told the versions that are there, and holds to them."""
    install, check = instructions("RUN")
    code, constraint = re.search(r'python3 -c "(.*?)"\s+> (\S+)', install).groups()
    assert f"--constraint {constraint}" in install
    assert "--requirement requirements.txt" in install
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==\S+\ntorchvision==\S+\n", said)
    for module in re.search(r"import (.*)\"", check)[1].split(", "):
        assert importlib.util.find_spec(module)


def test_the_page_names_what_is_there():
    named = re.findall(r"deploy/[\w.]+\w", PAGE)
    assert {"deploy/Dockerfile", "deploy/results.yaml", "deploy/trainjob.yaml", "deploy/start.py"} <= {*named}
    for name in (*named, "deploy/job.yaml"):
        assert (ROOT / name).is_file(), name
