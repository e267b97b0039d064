"""Starting from weights by name, from the hub, a URL, a folder or a file; and what a run follows them in."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY_RUN, Result
from safetensors.torch import save_file

from engine.following import settings_to_follow
from main import parse
from models.pretrained import locate, source_of
from tasks.trained import load_trained
from utils.errors import UserError

STILL = ("TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0")
FINETUNE = (
    "--cfg", "configs/finetune.yaml", "--tag", "run", "--batch-size", "12", "--opts",
    "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "DATA.NUM_WORKERS", "0", *STILL,
)  # fmt: skip
PREPARATION = dict(input_size=[3, 48, 48], crop_pct=0.9, interpolation="bilinear", mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=48).state_dict()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve ``OWNER/NAME/FILE`` as the Hugging Face hub does, and the files themselves; yields the address."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            self.answer(with_content=True)

        def answer(self, with_content: bool) -> None:
            path = folder / self.path.partition("?")[0].lstrip("/").replace("/resolve/main/", "/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if path.parent.is_dir() else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) * (2 if path.name == "cut.pth" else 1)))
            self.end_headers()
            if with_content:
                self.wfile.write(content)

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def as_folder(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """As the hub has timm's models."""
    folder.mkdir(parents=True)
    config = {"architecture": "test_vit", "num_classes": 10, "model_args": {"img_size": 48}}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": PREPARATION}))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_weights_of_the_hub(run_main, digits, weights, tmp_path):
    as_folder(tmp_path / "hub" / "timm" / "test_vit.mine", weights)
    command = (*FINETUNE, "--data-path", digits, "--pretrained", "timm/test_vit.mine")
    how = {"fresh": True, "HF_HOME": str(tmp_path / "cache")}
    with serving(tmp_path / "hub") as address:
        done = run_main(*command, **how, HF_ENDPOINT=address)
    folder = tmp_path / "cache" / "hub" / "models--timm--test_vit.mine" / "snapshots" / ("0" * 40)
    assert (
        f"as {folder} says: DATA.IMG_SIZE 48, DATA.INTERPOLATION bilinear, DATA.MEAN [0.5, 0.5, 0.5], DATA.STD "
        "[0.25, 0.25, 0.25], TEST.CROP True, TEST.CROP_PCT 0.9, MODEL.NAME test_vit\n"
    ) in done.stdout
    assert f"starting from {folder}: {len(weights)} weights matched, the head too" in done.stdout
    trained = torch.load(tmp_path / "output/test_vit/run/checkpoints/last.pth", weights_only=True)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in trained.items())


@pytest.mark.slow  # each in a process of its own
def test_weights_of_the_cache_alone(run_main, digits, weights, tmp_path):
    as_folder(tmp_path / "hub" / "timm" / "test_vit.mine", weights)
    command = (*FINETUNE, "--data-path", digits, "--pretrained", "timm/test_vit.mine")
    how = {"fresh": True, "HF_HOME": str(tmp_path / "cache")}
    with serving(tmp_path / "hub") as address:
        run_main(*command, **how, HF_ENDPOINT=address)
    again = run_main(*command, "--tag", "again", **how, HF_ENDPOINT=address)  # nobody answers there any more
    assert "the head too" in again.stdout


@pytest.mark.slow  # each in a process of its own
def test_models_of_the_hub_that_cannot_be_had(run_main, digits, weights, tmp_path):
    as_folder(tmp_path / "hub" / "timm" / "test_vit.mine", weights)
    command = (*FINETUNE, "--data-path", digits)
    how = {"fresh": True, "HF_HOME": str(tmp_path / "cache")}
    with serving(tmp_path / "hub") as address:
        for name, says in (("empty", None), ("other", {"model_type": "bert"})):
            (tmp_path / "hub" / "them" / name).mkdir(parents=True)
            if says:
                (tmp_path / "hub" / "them" / name / "config.json").write_text(json.dumps(says))
        others = [
            run_main(*command, "--pretrained", f"hf-hub:them/{name}", **how, HF_ENDPOINT=address, ok=False).error
            for name in ("empty", "other")
        ]
        unknown = run_main(*command, "--pretrained", "hf-hub:nobody/nothing", **how, HF_ENDPOINT=address, ok=False)
    assert "them/empty has no config.json, so it is no model of timm's" in others[0]
    assert "config.json is not what timm writes: it names no architecture" in others[1]
    assert (unknown.status, unknown.error.strip()) == (
        2, "error: nobody/nothing: the hub has no such model, or not for you (log in with: hf auth login)",
    )  # fmt: skip
    gone = run_main(*command, "--pretrained", "timm/other", **how, HF_HUB_OFFLINE="1", ok=False)
    assert gone.status == 2
    assert gone.error.strip() == (
        "error: timm/other is not in the cache and the hub cannot be reached (HF_HUB_OFFLINE is set); where there is a "
        "network run: hf download timm/other config.json model.safetensors --local-dir FOLDER, bring the folder here "
        "and name it"
    )


def test_weights_at_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "files").mkdir()
    torch.save(timm.create_model("crossformer_micro").state_dict(), tmp_path / "files" / "plain.pth")
    digest = hashlib.sha256((tmp_path / "files" / "plain.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "files" / "elsewhere").mkdir()
    (tmp_path / "files" / "elsewhere" / "plain.pth").write_bytes(b"other")
    (tmp_path / "files" / "cut.pth").write_bytes(bytes(10))
    for name in (f"good-{digest}.pth", "wrong-0123abcd.pth", "dated-20211105.pth"):
        (tmp_path / "files" / name).write_bytes((tmp_path / "files" / "plain.pth").read_bytes())
    with serving(tmp_path / "files") as address:
        paths = [locate(f"{address}/{name}", "") for name in ("plain.pth?download=1", f"good-{digest}.pth")]
        with pytest.raises(UserError, match="wrong-0123abcd.pth cannot be fetched: its name says that its"):
            locate(f"{address}/wrong-0123abcd.pth", "")
        with pytest.raises(UserError, match=r"nothing.pth cannot be fetched: .*; fetch it where there is a network"):
            locate(f"{address}/nothing.pth", "")
        other = locate(f"{address}/elsewhere/plain.pth", "")
        dated = locate(f"{address}/dated-20211105.pth", "")
        with pytest.raises(UserError, match=r"cannot be fetched: only [\d,]+ of [\d,]+ bytes have come"):
            locate(f"{address}/cut.pth", "")
        with pytest.raises(UserError, match=r"für nichts.pth cannot be fetched: Not Found"):
            locate(f"{address}/für nichts.pth", "")
    assert Path(paths[0]).parent == tmp_path / "torch" / "hub" / "checkpoints"
    assert paths[0].endswith("-plain.pth")
    assert Path(paths[1]).name == f"good-{digest}.pth", "as timm and torchvision call it"
    assert Path(other).read_bytes() == b"other"
    assert dated.endswith("-dated-20211105.pth")
    assert [path.name for path in Path(other).parent.glob(".*")] == [], "nothing is left of what was cut short"
    assert [Path(path).read_bytes() for path in paths] == 2 * [(tmp_path / "files" / "plain.pth").read_bytes()]
    assert locate(f"{address}/plain.pth?download=1", "") == paths[0], "it is there, so nobody is asked"
    assert load_trained(f"{address}/plain.pth?download=1", torch.device("cpu")).config.MODEL.NAME == "crossformer_micro"


def test_what_timm_has_for_a_name():
    assert source_of("resnet50") == "hf-hub:timm/resnet50.a1_in1k"
    assert source_of("resnet50.a2_in1k") == "hf-hub:timm/resnet50.a2_in1k"
    with pytest.raises(UserError, match="timm has no weights for MODEL.NAME crossformer_small; its authors publish"):
        locate("default", "crossformer_small")
    with pytest.raises(UserError, match="resnet5 is not a model that timm knows; did you mean"):
        locate("default", "resnet5")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (
            "weights/crossformer-s.pth",
            "; the authors of CrossFormer publish it at https://github.com/cheerss/CrossFormer",
        ),
        ("resnet50.a1_in1k", "; for timm's weights write timm/resnet50.a1_in1k"),
        ("facebook/deit", "; if it is a model of the Hugging Face hub write hf-hub:facebook/deit"),
        ("my.pth", ""),
    ],
)
def test_files_that_are_not_there(source, hint):
    with pytest.raises(UserError) as caught:
        locate(source, "")
    assert str(caught.value) == f"{source} is not a file; expected a checkpoint (.pth){hint}"


# ---- following


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> Result:
    """A run with an architecture and a preparation of its own."""
    from commands import start

    output = tmp_path_factory.mktemp("trained")
    done = start(
        "main.py", *TINY_RUN, "--data-path", digits, "--output", output, "--batch-size", "12", "--opts",
        "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]", "DATA.IMG_SIZE", "40", "TEST.CROP", "True", "TEST.CROP_PCT", "0.8",
        "DATA.MEAN", "[0.4, 0.4, 0.4]", "DATA.UPRIGHT", "True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Result(done.returncode, done.stdout, done.stderr, output / "crossformer_micro" / "run")


def last_eval(output: str) -> str:
    """Accuracies and loss of the last evaluation."""
    line = [line for line in output.splitlines() if line.startswith("eval ")][-1]
    return line.partition("top-1")[2].partition(" images")[0]


def test_fine_tuning_starts_where_the_weights_were(run_main, trained, digits):
    best = trained.results / "checkpoints" / "best.pth"
    command = (*FINETUNE, "--data-path", digits, "--pretrained", best)
    done = run_main(*command, nproc=2)
    score = last_eval(run_main("--data-path", digits, "--eval", "--resume", best, "--batch-size", "12").stdout)
    assert last_eval(done.stdout) == score == last_eval(trained.stdout.rpartition(" -> ")[0])
    assert "DATA.IMG_SIZE 40" in done.stdout
    assert "TEST.CROP True, TEST.CROP_PCT 0.8, DATA.UPRIGHT True" in done.stdout
    other = run_main(*command, "--tag", "other", "--opts", "DATA.IMG_SIZE", "48", "TEST.CROP_PCT", "1.0")
    assert "; as was asked for: DATA.IMG_SIZE 48, TEST.CROP_PCT 1.0\n" in other.stdout


def test_a_run_outlives_the_weights_that_it_began_from(run_main, trained, digits, tmp_path):
    best = tmp_path / "best.pth"
    best.write_bytes((trained.results / "checkpoints" / "best.pth").read_bytes())
    command = (*FINETUNE, "--data-path", digits, "--pretrained", best)
    run_main(*command)
    best.unlink()
    again = run_main(*command, "--opts", "TRAIN.EPOCHS", "2")
    assert "carrying on from" in again.stdout
    assert f"MODEL.PRETRAINED {best} is not used, for this run has begun" in again.stdout
    assert "is not a file" in run_main(*command, "--tag", "new", ok=False).error


def keys_followed(*arguments) -> set[str]:
    config = parse([str(argument) for argument in arguments])[0]
    return {key for key, *_ in settings_to_follow(config, config.MODEL.PRETRAINED)}


@pytest.mark.slow
def test_the_run_is_found_without_its_weights(run_main, trained, digits):
    """As long as it is the only one of its tag; a new one is not led astray."""
    best = trained.results / "checkpoints" / "best.pth"
    command = (*FINETUNE, "--data-path", digits)
    run_main(*command, "--tag", "[a]", "--pretrained", best, tag="[a]")
    again = run_main(*command, "--tag", "[a]", "--opts", "TRAIN.EPOCHS", "2")
    assert "carrying on from" in again.stdout
    new = run_main(*command, "--tag", "b", "--opts", "MODEL.NAME", "crossformer_micro", "DATA.IMG_SIZE", "32")
    assert "starting from random weights" in new.stdout
    last = trained.results / "checkpoints" / "last.pth"
    resumed = run_main(
        *TINY_RUN,
        "--data-path",
        digits,
        "--batch-size",
        "12",
        "--tag",
        "c",
        "--resume",
        last,
        "--opts",
        "TRAIN.EPOCHS",
        "3",
    )
    assert "DATA.MEAN [0.4, 0.4, 0.4]" in resumed.stdout


def test_what_is_followed(trained, weights, tmp_path):
    best, vit = trained.results / "checkpoints" / "best.pth", tmp_path / "vit.pth"
    torch.save(weights, vit)
    preparation = {"DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "TEST.CROP", "TEST.CROP_PCT"}
    followed = keys_followed("--pretrained", best)
    assert preparation | {"MODEL.NAME", "MODEL.CROSSFORMER.DEPTHS", "MODEL.KWARGS", "DATA.UPRIGHT"} <= followed
    assert not followed & {"TRAIN.EPOCHS", "AUG.SCALE", "TEST.VIEWS", "SEED", "MODEL.DROP_PATH_RATE"}
    other = keys_followed("--pretrained", best, "--cfg", "configs/small.yaml")
    assert preparation <= other
    assert not any(key.startswith("MODEL.") for key in other), "another network was asked for, and will be refused"
    assert keys_followed("--pretrained", vit) == set(), "nobody knows what it is"
    assert preparation <= keys_followed("--pretrained", vit, "--opts", "MODEL.NAME", "test_vit")
    dense = keys_followed("--pretrained", best, "--cfg", "configs/segmentation/upernet_small.yaml")
    assert dense == {"DATA.MEAN", "DATA.STD"}
