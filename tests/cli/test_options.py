"""Options and YAML files: the same names everywhere, merged one over the other, and given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from outcomes import Ran

from raygkd.cli.options import resolve
from raygkd.cli.run_commands import compare, teacher, train, tune
from raygkd.config import (
    SECTIONS,
    Config,
    LevelPair,
    OptimConfig,
    option_settings,
    settings,
    to_yaml,
    with_settings,
)
from raygkd.errors import ConfigError
from raygkd.workflows.preflight import with_lasting_paths

COMMANDS = {"teacher": teacher, "train": train, "tune": tune}
COMPARE = {"methods", "preset", "seeds"}
EVERYWHERE = """
    --dataset --data-dir --teacher --student --method --epochs --batch-size --workers
    --gpus-per-worker --output --tracking-uri --experiment --seed --config --resume --json
"""
HEAVY = ("torch", "ray", "mlflow", "numpy", "pyarrow", "rich")


def resolved(command: str, *arguments: str | Path) -> Config:
    """Return the configuration that a command line amounts to."""
    options = COMMANDS[command].make_context(command, list(map(str, arguments))).params
    config_file, resume = options.pop("config_file"), options.pop("resume")
    options.pop("as_json")
    config, _ = resolve(command, config_file, options, resume)
    return config


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_by_the_same_names(command: str) -> None:
    flags = {flag for param in COMMANDS[command].params for flag in param.opts}
    assert set(EVERYWHERE.split()) <= flags


def test_what_only_one_command_uses_is_an_option_of_that_command() -> None:
    names = {
        command: {param.name for param in COMMANDS[command].params} & set(option_settings())
        for command in COMMANDS
    }
    search = {name for name, (section, _, _) in option_settings().items() if section == "search"}
    others = set(option_settings()) - COMPARE
    of_train = {"control", "start_from", "quantize"}
    assert names["tune"] == others - of_train | {"methods"}
    assert names["train"] == others - search
    others -= of_train
    method = {name for name, (section, _, _) in option_settings().items() if section == "method"}
    students = method - {"method"} | {
        *("student_weights", "inherit", "teacher_epochs", "teacher_mode", "teacher_classes"),
        *("class_names", "prompts", "unlabelled", "unlabelled_share", "recipe"),
    }
    assert names["teacher"] == others - search - students
    compared = {param.name for param in compare.params} & set(option_settings())
    single = {"method", "baseline_weight", *of_train}
    assert compared == set(option_settings()) - (search - {"max_concurrent"}) - single


def test_an_option_means_the_same_in_every_command() -> None:
    options = ("--student", "resnet14", "--method", "kd", "--epochs", "3", "--seed", "7")
    assert len({to_yaml(resolved(command, *options)) for command in COMMANDS}) == 1


def test_one_file_serves_every_command(yaml_file: Callable[[str], Path]) -> None:
    path = yaml_file("search: {trials: 3}\nmodel: {teacher_epochs: 5}\noptim: {lr: 1e-2}")
    for command in COMMANDS:
        config = resolved(command, "--config", path)
        assert (config.search.trials, config.model.teacher_epochs, config.optim.lr) == (3, 5, 0.01)


def test_a_teacher_needs_no_student(raygkd: Callable[..., Ran]) -> None:
    ran = raygkd("teacher", "--student", "nonsense", "--dataset", "nonsense")
    assert ran.err.startswith("error: --dataset 'nonsense'")


def test_options_override_the_file_and_the_file_the_defaults(
    yaml_file: Callable[[str], Path],
) -> None:
    path = yaml_file("optim: {epochs: 3, lr: 0.2}")
    config = resolved("train", "--config", path, "--epochs", "4")
    assert config == Config(optim=OptimConfig(epochs=4, lr=0.2))


@pytest.mark.parametrize("name", ["download", "skip_bad", "compile"])
def test_a_flag_can_be_taken_back(yaml_file: Callable[[str], Path], name: str) -> None:
    section, dashed = settings()[name][0], name.replace("_", "-")
    path = yaml_file(f"{section}: {{{name}: true}}")
    assert getattr(getattr(resolved("train", "--config", path), section), name) is True
    assert resolved("train", "--config", path, f"--no-{dashed}") == Config()
    assert resolved("train", f"--{dashed}") == resolved("train", "--config", path)


def test_options_of_several_numbers() -> None:
    config = resolved("train", "--levels", "2,3", "--milestones", "0.5,0.75")
    assert config.method.levels == (LevelPair(2), LevelPair(3))
    assert config.optim.milestones == (0.5, 0.75)
    assert resolved("train", "--levels", "2").method.levels == (LevelPair(2),)
    assert resolved("train", "--levels", "2:1,4").method.levels == (LevelPair(2, 1), LevelPair(4))
    with pytest.raises(click.BadParameter, match="numbers separated by commas"):
        resolved("train", "--milestones", "half")
    for value in ("2.5", "2;3", "1:", "a:b"):
        with pytest.raises(ConfigError, match="must be levels such as 1,2, or pairs"):
            resolved("train", "--levels", value)


def test_the_stored_configuration_is_given_back(tmp_path: Path) -> None:
    changes = {"levels": (1, 3), "limit_train": 200, "lr": 1e-3, "milestones": (0.5,), "space": "s"}
    config = with_settings(Config(), changes)
    run = tmp_path / "tune-1"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    assert resolved("tune", "--config", run / "config.yaml") == config
    (run / "facts.json").write_text("{}")
    given = {"epochs": None, "lr": 1e-3, "max_failures": 7}
    resumed = with_settings(config, {"max_failures": 7})
    assert resolve("tune", None, given, str(run)) == (resumed, run)


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["data", "info", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from raygkd.cli.main import run
sys.argv = ["raygkd", *{arguments}]
assert run() == 0
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("Usage: raygkd ")


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_no_command_is_answered_with_help(
    raygkd: Callable[..., Ran], arguments: tuple[str, ...]
) -> None:
    assert raygkd(*arguments) == raygkd(*arguments, "--help")
    assert raygkd(*arguments).code == 0


def test_help_has_a_part_for_each_section_of_a_file(raygkd: Callable[..., Ran]) -> None:
    sections = [section for section in SECTIONS if section != "train"]
    parts = raygkd("tune", "--help").out.split("\n\n")[-1 - len(sections) :]
    titles = [part.partition(":\n")[0] for part in parts]
    assert titles == ["Options", *(section.capitalize() for section in sections)]
    for section, part in zip(sections, parts[1:], strict=True):
        listed = {line.split()[0] for line in part.splitlines() if line.startswith("  --")}
        known = {
            f"--{n.replace('_', '-')}" for n, (s, _, _) in option_settings().items() if s == section
        }
        assert listed == (known if section != "compare" else {"--methods"})


def test_help_shows_defaults(raygkd: Callable[..., Ran]) -> None:
    text = " ".join(raygkd("tune", "--help").out.split())
    for default in ("[default: digits]", "[default: 0.05]", "[default: 0]", "[default: 0.0]"):
        assert default in text
    assert "[default: 0.625,0.75,0.875]" in text
    assert "None" not in text


def test_stored_paths_hold_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"data_dir": "s3://bucket/photos", "output": "~/out", "space": "space.yaml"}
    settings = with_settings(Config(), given | {"teacher": "run/model.pt"})
    stored = with_lasting_paths(settings, tmp_path / "out")
    assert stored.data.data_dir == "s3://bucket/photos"
    assert stored.output.output == str(Path("~/out").expanduser())
    assert stored.search.space == str(tmp_path / "space.yaml")
    assert stored.model.teacher == str(tmp_path / "run/model.pt")
    assert with_lasting_paths(Config(), tmp_path).model.teacher == Config().model.teacher


def test_a_file_of_a_jobs_folder_is_kept_with_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    output = tmp_path / "out"
    kept = []
    for job in ("first", "second"):
        folder = tmp_path / job
        folder.mkdir()
        (folder / "0-space.yaml").write_text("lr: {uniform: [0.1, 0.2]}")
        monkeypatch.chdir(folder)
        stored = with_lasting_paths(with_settings(Config(), {"space": "0-space.yaml"}), output)
        kept.append(Path(stored.search.space or ""))
    assert kept[0] == kept[1]
    assert kept[0].is_relative_to(output)
    assert kept[0].read_text() == "lr: {uniform: [0.1, 0.2]}"


def test_what_a_job_names_elsewhere_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (tmp_path / "job").mkdir()
    (tmp_path / "space.yaml").touch()
    monkeypatch.chdir(tmp_path / "job")
    given = {"space": str(tmp_path / "space.yaml"), "output": str(tmp_path / "job")}
    stored = with_lasting_paths(with_settings(Config(), given), tmp_path / "out")
    assert stored.search.space == str(tmp_path / "space.yaml")
    assert stored.output.output == str(tmp_path / "job")
