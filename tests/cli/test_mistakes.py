"""Wrong inputs: one line that tells what, where and what is allowed; exit code 2; nothing left."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from outcomes import ROWS, Ran, files, mlflow_runs
from servers import free_port

from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.run_images import open_images
from raygkd.workflows.resume import note_facts

Refused = Callable[..., str]
TOO_MANY = "4096"


def label_with(row: int, label: int | None) -> list[int | None]:
    return [label if number == row else number % 3 for number in range(ROWS)]


def command_line(*arguments: str, cwd: Path) -> Ran:
    """Run the installed command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "raygkd", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# images


@pytest.mark.parametrize("command", [("train",), ("tune",), ("data", "prepare", "--output", "new")])
def test_missing_data_folder(refused: Refused, tmp_path: Path, command: tuple[str, ...]) -> None:
    missing = tmp_path / "photos"
    error = refused(*command, "--dataset", "imagefolder", "--data-dir", missing)
    assert f"no folder '{missing}'; set --data-dir to an existing folder" in error


def test_data_folder_that_is_not_given(refused: Refused) -> None:
    assert "--dataset imagefolder needs --data-dir" in refused("train", "--dataset", "imagefolder")
    assert "--dataset parquet needs --data-dir" in refused("train", "--dataset", "parquet")


@pytest.mark.parametrize("command", [("train",), ("data", "prepare", "--output", "new")])
def test_class_without_images(
    refused: Refused, tree: Callable[..., Path], command: tuple[str, ...]
) -> None:
    root = tree(cat=2, dog=0)
    error = refused(*command, "--dataset", "imagefolder", "--data-dir", root)
    assert f"class 'dog' has no images in '{root}/dog' (known suffixes: jpg jpeg png" in error
    assert "add some or remove the folder" in error


@pytest.mark.parametrize("command", [("train",), ("data", "prepare", "--output", "new")])
def test_unreadable_image_in_a_folder(
    refused: Refused, tree: Callable[..., Path], command: tuple[str, ...]
) -> None:
    root = tree(cat=12, dog=12)
    (root / "dog" / "5.png").write_bytes(b"no image")
    error = refused(*command, "--dataset", "imagefolder", "--data-dir", root)
    assert f"error: {root}/dog/5.png: not a complete image (not a known image format)" in error
    assert error.endswith("remove it or pass --skip-bad\n")


def test_unreadable_image_among_the_first_of_a_parquet_file(
    refused: Refused, parquet: Callable[..., Path]
) -> None:
    path = parquet(cut_off=[33])
    error = refused("train", "--dataset", "parquet", "--data-dir", path)
    assert f"{path} row 33: not a complete image" in error
    assert "replace it or pass --skip-bad" in error


def test_unreadable_image_that_is_met_after_ray_has_started(
    refused: Refused, parquet: Callable[..., Path]
) -> None:
    """The images for the test are no part of the sample that is looked at first."""
    splits = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    path = parquet(cut_off=[57], split=splits)
    options = ("--dataset", "parquet", "--data-dir", path, "--batch-size", "8")
    error = refused("train", *options, "--method", "none")
    assert f"{path} row 57: not a complete image" in error
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": label_with(2, -3)}, "row 2: label -3 (allowed: 0 to 99999"),
        (
            {"label": label_with(59, 7), "metadata": {"classes": "a,b,c"}},
            "row 59: label 7 (allowed: 0 to 2, the named classes",
        ),
        (
            {"label": None, "category": label_with(0, 0)},
            "has no labels; add a column label (integer), or train without labels with --unla",
        ),
        (
            {"split": ["train"] * 59 + ["hold"]},
            "row 59: split 'hold' (allowed: train, val, test",
        ),
    ],
)
def test_parquet_with_wrong_contents(
    refused: Refused, parquet: Callable[..., Path], columns: dict, message: str
) -> None:
    path = parquet(**columns)
    assert f"'{path}' {message}" in refused("train", "--dataset", "parquet", "--data-dir", path)


def test_parquet_that_is_missing_or_is_none(refused: Refused, tmp_path: Path) -> None:
    run = ("tune", "--dataset", "parquet", "--data-dir")
    advice = "pass a .parquet file or a folder that 'raygkd data prepare' wrote"
    missing = tmp_path / "missing.parquet"
    assert f"no file or folder '{missing}'; {advice}" in refused(*run, missing)
    assert f"no .parquet files in '{tmp_path}'; {advice}" in refused(*run, tmp_path)
    missing.write_text("words")
    assert f"cannot read '{missing}' as Parquet" in refused(*run, missing)


@pytest.mark.parametrize("command", [("train",), ("data", "prepare", "--output", "new")])
def test_misspelled_data_set(refused: Refused, command: tuple[str, ...]) -> None:
    error = refused(*command, "--dataset", "digit")
    assert "did you mean 'digits' or 'digits-voc'? (known: cifar10, cifar100, " in error


@pytest.mark.parametrize("command", [("train",), ("data", "prepare", "--output", "new")])
def test_cifar_that_is_not_there(
    refused: Refused, tmp_path: Path, command: tuple[str, ...]
) -> None:
    error = refused(*command, "--dataset", "cifar10", "--data-dir", tmp_path)
    assert f"no complete cifar-10-batches-py in '{tmp_path}'" in error
    assert "set --data-dir to the folder that contains it, or pass --download" in error


def test_preparing_what_is_prepared(refused: Refused, tmp_path: Path) -> None:
    command = ("data", "prepare", "--dataset", "parquet", "--data-dir", "x.parquet")
    assert "train on it with --data-dir x.parquet" in refused(
        *command, "--output", tmp_path / "shards"
    )


def test_preparing_into_a_folder_that_is_not_empty(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    error = refused("data", "prepare", "--dataset", "digits", "--output", tmp_path)
    assert f"'{tmp_path}' is not empty; choose another folder" in error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--val-fraction", "0", "--val-fraction 0.0: must be above 0 and below 1"),
        ("--val-fraction", "1", "--val-fraction 1.0: must be above 0 and below 1"),
        ("--limit-train", "0", "--limit-train 0: must be at least 1"),
        ("--limit-train", "2", "--limit-train 2: must be at least 3, one image per class"),
    ],
)
def test_splits_that_cannot_be_cut(
    refused: Refused, good: tuple[str, ...], option: str, value: str, message: str
) -> None:
    assert message in refused("tune", *good, option, value)


@pytest.mark.parametrize("command", ["teacher", "train", "tune"])
def test_batch_larger_than_the_data(refused: Refused, good: tuple[str, ...], command: str) -> None:
    error = refused(command, *good, "--batch-size", "600")
    assert "48 training images are too few for one step of 1 x 600" in error
    assert "lower --batch-size or --workers" in error


# models


def test_teacher_of_other_classes(
    refused: Refused, good: tuple[str, ...], model_file: Callable[..., Path]
) -> None:
    path = model_file("cat", "dog")
    for command in ("train", "tune"):
        error = refused(command, *good, "--teacher", path)
        assert f"--teacher {path}: it has 2 classes (cat, dog), but the data has 3" in error
        assert "train a teacher on this data with 'raygkd teacher'" in error


def test_teacher_file_that_is_missing_or_damaged(
    refused: Refused, good: tuple[str, ...], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = model_file("a", "b", "c")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :])
    assert f"--teacher: {path} is damaged, or not a model file; pass a file written" in refused(
        "train", *good, "--teacher", path
    )
    path.write_text("words")
    assert f"{path} is damaged, or not a model file" in refused("train", *good, "--teacher", path)
    error = refused("tune", *good, "--teacher", tmp_path / "gone.pt")
    assert f"--teacher: cannot read model file {tmp_path}/gone.pt: No such file" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train", "--teacher", "resnet21"), "--teacher: unknown classifier 'resnet21'; did you"),
        (("teacher", "--teacher", "vgg9"), "--teacher: unknown classifier 'vgg9'; did you mean 'v"),
        (("tune", "--student", "resnet9"), "--student: unknown classifier 'resnet9'; did you mean"),
        (("train", "--student", "resnet18"), "'timm:resnet18' or 'torchvision:resnet18'?"),
        (
            ("train", "--student", "torchvision:resnet19"),
            "unknown torchvision classifier 'resnet19'; did you mean 'resnet18'",
        ),
        (
            ("train", "--student", "torchvision:alexnet", "--method", "none"),
            "--student: AlexNet cannot take images of 12 x 12 pixels",
        ),
        (
            ("train", "--student", "torchvision:alexnet", "--method", "none"),
            "(choose another --image-size)",
        ),
        (
            ("train", "--teacher", "torchvision:alexnet", "--teacher-weights", "none"),
            "--teacher: AlexNet cannot take images of 12 x 12 pixels",
        ),
        (
            ("train", "--teacher", "torchvision:alexnet", "--teacher-weights", "none"),
            "(choose another --teacher-image-size)",
        ),
    ],
)
def test_models_that_cannot_be_used(
    refused: Refused, good: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    assert message in refused(*options, *good)


def test_warm_up_longer_than_the_training_of_the_teacher(
    refused: Refused, good: tuple[str, ...]
) -> None:
    error = refused("train", *good, "--warmup-epochs", "4", "--teacher-epochs", "3")
    assert "--warmup-epochs 4.0: applies to the teacher, too, so it must be below" in error


def test_a_teacher_is_not_trained_from_a_file(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    error = refused("teacher", "--teacher", path)
    assert f"--teacher {path}: is a file, but 'raygkd teacher' trains a new model" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--dim", "16"),
            "--dim: level 1: dim must be from 1 to 15 for a map of 16 channels; got 16",
        ),
        (("--levels", "1,7"), "--levels: student resnet8 has no level 7 (allowed: 1, 2, 3)"),
        (("--levels", "2,2"), "--levels '2,2': must be different whole numbers from 1"),
        (
            ("--levels", "one"),
            "--levels 'one': must be levels such as 1,2, or pairs student:teacher",
        ),
    ],
)
def test_levels_and_dimension_that_the_teacher_does_not_have(
    refused: Refused, good: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    assert message in refused("train", *good, *options)


# settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trials", "0"), "--trials 0: must be at least 1"),
        (("--trials", "many"), "'--trials': 'many' is not a valid integer"),
        (("--temperature", "-1"), "--temperature -1.0: must be above 0"),
        (("--temperature", "nan"), "--temperature nan: must be a finite number"),
        (("--gpus-per-worker", "inf"), "--gpus-per-worker inf: must be a finite number"),
        (("--method", "cwd"), "--method cwd: does not support classification, the task"),
        (("--method", "grph"), "'--method': 'grph' is not one of 'none', 'graph', 'graph+kd', "),
        (
            ("--batch-size", "64", "--workers", "3"),
            "--batch-size 64 cannot be split evenly over --workers 3; use a multiple",
        ),
    ],
)
def test_values_that_are_not_allowed(
    refused: Refused, options: tuple[str, ...], message: str
) -> None:
    assert message in refused("tune", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--methods", "kd,ick"),
            "--methods 'ick': must be one of none, graph, graph+kd, graph+dist, graph+metrics, crd",
        ),
        (("--methods", "kd,kd"), "--methods 'kd,kd': must be different methods"),
        (
            ("--methods", "kd", "--preset", "ablation"),
            "--methods kd: --preset ablation sets its own methods",
        ),
        (("--preset", "all"), "'--preset': 'all' is not 'ablation'"),
        (("--seeds", "0"), "--seeds 0: must be at least 1"),
        (("--method", "kd"), "no option --method; did you mean '--methods'"),
    ],
)
def test_what_cannot_be_compared(refused: Refused, options: tuple[str, ...], message: str) -> None:
    assert message in refused("compare", *options)


def test_what_does_not_suit_the_images_is_told_of_every_method(
    refused: Refused, good: tuple[str, ...]
) -> None:
    error = refused("compare", *good, "--methods", "none,cwd,at,pkd", lines=2)
    assert [line.split()[1] for line in error.splitlines()] == ["cwd:", "pkd:"]


def test_all_wrong_values_are_told_at_once(refused: Refused) -> None:
    error = refused("tune", "--trials", "0", "--epochs", "0", "--lr", "-1", lines=3)
    assert [line.split()[1] for line in error.splitlines()] == ["--epochs", "--lr", "--trials"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--bach-size", "4"), "no option --bach-size; did you mean '--batch-size'"),
        (
            ("train", "--trials", "4"),
            "no option --trials; it is an option of tune (try 'raygkd train --help')",
        ),
        (("tune", "--trails", "4"), "no option --trails; did you mean '--trials'? (try"),
        (("teacher", "--inherit"), "no option --inherit; it is an option of tune, compare or"),
        (("train", "--epochs"), "option '--epochs' requires an argument"),
        (("train", "extra"), "unexpected extra argument (extra) (try 'raygkd train --help')"),
        (
            ("tun",),
            "no command 'tun'; did you mean 'tune'? (commands: bench, compare, data, doctor, e",
        ),
        (("data", "prepar"), "no command 'prepar'; did you mean 'prepare'? (commands: info, prep"),
        (("data", "prepare"), "missing option '--output' (try 'raygkd data prepare --help')"),
        (("data", "info"), "missing argument 'PATH' (try 'raygkd data info --help')"),
    ],
)
def test_misspelled_command_lines(
    refused: Refused, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {bach_size: 4}", "unknown key 'optim.bach_size'; did you mean 'batch_size'"),
        (
            "optm: {lr: 0.1}",
            "unknown key 'optm'; did you mean 'optim' or 'optimizer'? (sections: data, ",
        ),
        ("batch_size: 4", "unknown key 'batch_size' (it belongs under 'optim:')"),
        ("optim: {epochs: ten}", "--epochs 'ten': must be a whole number"),
        ("optim: {epochs: [1", "not valid YAML: line 1, column 19: expected ',' or ']'"),
        ("- epochs", "must contain keys and values, not list"),
    ],
)
def test_configuration_files_that_are_wrong(
    refused: Refused, yaml_file: Callable[[str], Path], text: str, message: str
) -> None:
    path = yaml_file(text)
    assert f"error: {path}: {message}" in refused("tune", "--config", path)


def test_configuration_files_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    error = refused("train", "--config", tmp_path / "gone.yaml")
    assert f"--config {tmp_path}/gone.yaml: cannot be read: No such file" in error
    assert f"--config {tmp_path}: cannot be read: Is a dir" in refused(
        "train", "--config", tmp_path
    )
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    assert "not valid YAML" in refused("train", "--config", tmp_path / "binary")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: {uniform: [0.1, 0.2]}", "'lrr' cannot be searched; did you mean 'lr'? (allowed: "),
        ("lr: {unifrm: [0.1, 0.2]}", "lr: must be one of {choice: a list of values; uniform: [low"),
        ("lr: {uniform: [0.2, 0.1]}", "lr: uniform takes [low, high] with low below high, not [0."),
        ("lr: {choice: [fast]}", "--lr 'fast': must be a number"),
        ("", "has no settings (allowed: image_size, augment, teacher, student, method, levels"),
    ],
)
def test_search_spaces_that_are_wrong(
    refused: Refused,
    good: tuple[str, ...],
    yaml_file: Callable[[str], Path],
    text: str,
    message: str,
) -> None:
    path = yaml_file(text)
    assert f"error: {path}: {message}" in refused("tune", *good, "--space", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dim: {choice: [4, 64]}",
            "--dim 64: the teacher's map at level 1 has 16 channels (allowed",
        ),
        ("levels: {choice: [[1], [9]]}", "search space: level 9 does not exist (allowed: 1, 2, 3)"),
        ("temperature: {uniform: [-1, 1]}", "search space: --temperature -1.0: must be above 0"),
        (
            "batch_size: {choice: [8, 4096]}",
            "48 training images are too few for one step of 1 x 4096",
        ),
    ],
)
def test_search_spaces_that_do_not_go_with_the_models(
    refused: Refused,
    good: tuple[str, ...],
    yaml_file: Callable[[str], Path],
    text: str,
    message: str,
) -> None:
    assert message in refused("tune", *good, "--space", yaml_file(text))


# resuming


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "train-20250101"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Config()))
    note_facts(folder, {})
    return folder


def test_resuming_what_is_no_run(refused: Refused, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        error = refused("tune", "--resume", folder)
        assert f"--resume {folder}: has no config.yaml; pass an output folder, or the" in error


def test_resuming_with_other_options(
    refused: Refused, run_folder: Path, yaml_file: Callable[[str], Path]
) -> None:
    config = yaml_file("{data: {dataset: cifar10}, optim: {epochs: 10}}")
    error = refused("train", "--resume", run_folder, "--lr", "0.3", "--config", config, lines=2)
    assert error.splitlines() == [
        f"error: {flag}: is {now}, but was {before} when the run started; omit it, or start "
        "another run"
        for flag, now, before in (("--dataset", "cifar10", "digits"), ("--lr", "0.3", "0.05"))
    ]


def test_resuming_an_output_folder_without_an_unfinished_run(
    refused: Refused, run_folder: Path
) -> None:
    (run_folder / "result.json").write_text("{}")
    output = run_folder.parent / "output"
    (output / "runs").mkdir(parents=True)
    run_folder.rename(output / "runs" / run_folder.name)
    for command in ("train", "tune"):
        error = refused(command, "--resume", output)
        assert f"--resume {output}: has no interrupted run of 'raygkd {command}'" in error


def test_a_run_of_the_same_name_with_other_options(
    refused: Refused, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    run_folder.rename(tmp_path / "runs" / "train-first")
    command = ("train", "--output", tmp_path, "--name", "first")
    named = with_settings(Config(), {"output": str(tmp_path), "name": "first"})
    (tmp_path / "runs" / "train-first" / "config.yaml").write_text(to_yaml(named))
    error = refused(*command, "--lr", "0.3")
    assert "--lr: is 0.3, but was 0.05 when the run started; omit it" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--dim", "two"), "invalid value for '--dim': 'two' is not a valid integer"),
        (("tune", "--trails", "4"), "no option --trails; did you mean '--trials'?"),
        (("tuen",), "'tuen' is not one of 'compare', 'evaluate', 'teacher', 'train'"),
        (("--now", "train"), "no option --now"),
        (("train",), "--output raygkd-output: a job runs in a temporary folder"),
        (("train", "--resume", "out"), "--resume out: a job runs in a temporary folder"),
        (
            ("train", "--output", "/shared", "--data-dir", "photos"),
            "--data-dir photos: a job runs in a temporary folder; pass the abs",
        ),
    ],
)
def test_a_job_that_could_not_run_is_not_sent(
    refused: Refused, arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused("submit", *arguments)


class OlderDashboard(http.server.BaseHTTPRequestHandler):
    """Says of itself what the dashboard of an older Ray does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        facts = {"version": "4", "ray_version": "2.40.0", "ray_commit": "0", "session_name": "s"}
        self.wfile.write(json.dumps(facts).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_job_for_a_cluster_of_another_version(refused: Refused) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OlderDashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        error = refused("jobs", "list", "--address", url)
        server.shutdown()
    versions = f"the cluster at {url} runs Ray 2.40.0 and this machine {ray.__version__}"
    assert f"{versions}; install 'ray[default,train,tune]==2.40.0' here" in error


def test_a_job_for_a_cluster_that_is_not_there(refused: Refused) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    submit = ("submit", "--address", url, "--", "train", "--output", "/shared")
    for command in (submit, ("jobs", "list", "--address", url)):
        error = refused(*command)
        assert f"no Ray dashboard answers at {url}" in error
        assert "pass that of the head node with --address, such as http://HOST:8265" in error


def test_evaluating_a_model_that_does_not_go_with_the_images(
    refused: Refused, good: tuple[str, ...], model_file: Callable[..., Path]
) -> None:
    error = refused("evaluate", "gone.pt", *good)
    assert "MODEL gone.pt: no such file; pass one written by" in error
    path = model_file("cat", "dog")
    error = refused("evaluate", path, *good)
    assert f"MODEL {path}: it has 2 classes (cat, dog), but the data has 3" in error


def test_a_name_that_is_a_path(refused: Refused) -> None:
    error = refused("train", "--name", "a/b")
    assert (
        "--name 'a/b': must consist of letters, digits, '-', '_' and '.', at most 200, and" in error
    )


def test_resuming_a_run_without_its_facts(refused: Refused, run_folder: Path) -> None:
    (run_folder / "facts.json").unlink()
    error = refused("train", "--resume", run_folder)
    assert f"--resume {run_folder}: has no facts.json" in error


def test_resuming_on_other_images_and_settings_of_the_search(
    raygkd: Callable[..., Ran], workplace: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tune-20250101"
    folder.mkdir()
    output = workplace / "raygkd-output"
    space = tmp_path / "space.yaml"
    space.write_text("{lr: {choice: [0.1, 0.3]}, dim: {choice: [2]}}")
    config = with_settings(
        Config(), {"space": str(space), "limit_train": 300, "output": str(output)}
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    open_images(config.data, seed=0, output=output)
    note_facts(
        folder,
        {
            "data set, train images": 500,
            "search space, lr": {"choice": [0.1, 0.2]},
            "search space, beta": {"choice": [1.0]},
        },
    )
    ran = raygkd("tune", "--resume", folder)
    assert (ran.code, ran.out) == (2, "")
    assert mlflow_runs(output / "mlflow.db") == 0
    changed = [line.split(": ", 3)[2:] for line in ran.err.splitlines() if "error" in line]
    shown = {name: rest.partition(" when")[0] for name, rest in changed}
    assert shown["data set, train images"] == "is 300 and was 500"
    assert shown["search space, lr"] == ("is {'choice': [0.1, 0.3]} and was {'choice': [0.1, 0.2]}")
    assert shown["search space, beta"] == "is missing and was {'choice': [1.0]}"
    assert shown["search space, dim"] == "is {'choice': [2]} and was missing"
    assert shown["data set, val images"] == "is 144 and was missing"


def test_resuming_the_run_of_another_command(refused: Refused, run_folder: Path) -> None:
    error = refused("tune", "--resume", run_folder)
    assert f"--resume {run_folder}: is not a run of 'raygkd tune'" in error
    assert "use the command that started it" in error


# the output folder, MLflow and the cluster


@pytest.mark.parametrize("command", ["teacher", "train", "tune"])
def test_output_folder_that_cannot_be_written(
    refused: Refused, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/raygkd")):
        error = refused(command, "--output", output)
        assert f"--output {output}: cannot be written (" in error
        assert "choose another folder" in error


def test_shards_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "below", Path("/proc/raygkd")):
        error = refused("data", "prepare", "--dataset", "digits", "--output", output)
        assert f"cannot write to '{output}': " in error
        assert "[Errno" not in error


def test_tracking_server_that_is_down(refused: Refused, closed_port: int) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    error = refused("train", "--tracking-uri", uri)
    assert f"MLflow at {uri} cannot be used: no answer; start it, or omit" in error


@pytest.mark.parametrize("uri", ["mlruns", "htp://host:5000", "file:///tmp/mlruns"])
def test_tracking_uri_of_no_known_kind(refused: Refused, uri: str) -> None:
    error = refused("tune", "--tracking-uri", uri)
    assert f"--tracking-uri {uri}: must be sqlite:///FILE or http(s)://HOST:PORT" in error


def test_mlflow_store_that_cannot_be_opened(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "words.db").write_text("words" * 1000)
    for path, reason in (
        (tmp_path / "words.db", "file is not a database"),
        (Path("/proc/mlflow.db"), "unable to open database file"),
    ):
        error = refused("train", "--tracking-uri", f"sqlite:///{path}")
        assert f"MLflow's store {path} cannot be used: {reason}; choose another" in error


@pytest.mark.parametrize("command", ["train", "tune"])
@pytest.mark.parametrize(
    ("options", "needs", "remedy"),
    [
        (
            ("--workers", TOO_MANY, "--batch-size", TOO_MANY),
            f"a run needs {TOO_MANY} worker(s) with 1 CPU and 0 GPU each",
            "add nodes, or lower --workers or --cpus-per-worker",
        ),
        (
            ("--gpus-per-worker", TOO_MANY),
            f"a run needs 1 worker(s) with 1 CPU and {TOO_MANY} GPU each",
            "add nodes, or lower --workers or --gpus-per-worker",
        ),
    ],
)
def test_more_than_the_cluster_has(
    raygkd: Callable[..., Ran],
    tmp_path: Path,
    command: str,
    options: tuple[str, ...],
    needs: str,
    remedy: str,
) -> None:
    """Refused before the images are prepared and MLflow's store is made, so before Ray starts."""
    ran = raygkd(command, "--output", tmp_path / "new", *options)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert ran.err.startswith(f"error: {needs}; the cluster has ")
    assert remedy in ran.err
    assert list((tmp_path / "new").iterdir()) == []


def test_cluster_that_does_not_answer(
    raygkd: Callable[..., Ran], good: tuple[str, ...], closed_port: int, workplace: Path
) -> None:
    before = files(workplace)
    ran = raygkd("train", *good, "--method", "none", "--address", f"127.0.0.1:{closed_port}")
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert f"error: no Ray cluster at 127.0.0.1:{closed_port}: " in ran.err
    assert "start one with 'ray start --head', or omit --address" in ran.err
    assert files(workplace) == before


# processes of their own; `ui` becomes the MLflow server where it is not refused


def test_no_free_port_for_the_ui(tmp_path: Path, listening: int) -> None:
    (tmp_path / "raygkd-output").mkdir()
    (tmp_path / "raygkd-output" / "mlflow.db").touch()
    ran = command_line("ui", "--port", str(listening), cwd=tmp_path)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert f"error: --port {listening}: cannot be used on 127.0.0.1 (Address already in" in ran.err
    assert f"choose another, such as --port {listening + 1}" in ran.err


def test_ui_over_a_folder_without_a_store(tmp_path: Path) -> None:
    ran = command_line("ui", "--output", "elsewhere", cwd=tmp_path)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert (
        f"error: --output {tmp_path}/elsewhere: contains no mlflow.db; pass the --output of an"
        in ran.err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_ends_without_a_traceback(
    tmp_path: Path, good: tuple[str, ...], workplace: Path
) -> None:
    ran = command_line("train", *good, "--teacher", "resnet21", cwd=workplace)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert ran.err.startswith("error: --teacher: unknown classifier 'resnet21'; did you mean")
    assert mlflow_runs(workplace / "raygkd-output" / "mlflow.db") == 0


def test_a_student_without_parameters_to_train(
    refused: Refused, good: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net(classes):\n"
        "    pool = nn.AdaptiveAvgPool2d(1)\n"
        "    net = nn.Sequential(pool, nn.Flatten(), nn.Linear(3, classes))\n"
        "    return net.requires_grad_(False)\n"
    )
    name = f"{tmp_path}/net.py:net"
    error = refused("train", *good, "--student", name, "--method", "kd", "--teacher", "resnet8")
    assert "--student: net.py:net has no parameters that can be trained; choose another" in error
