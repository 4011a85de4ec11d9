"""Runs that are resumed after files of their models have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raygkd.config import Config, to_yaml, with_settings
from raygkd.errors import ConfigError
from raygkd.storage.atomic_files import place, write_text
from raygkd.workflows.preflight import with_lasting_paths
from raygkd.workflows.resume import CONFIG, check_facts, note_facts, own_config


def test_another_file_of_the_model_is_refused_in_one_line(tmp_path: Path) -> None:
    nets, output = tmp_path / "nets.py", tmp_path / "out"
    nets.write_text("def net(classes): ...\n")
    name = f"{nets}:net"
    config = with_settings(Config(), {"student": name, "output": str(output)})
    write_text(place(str(output / CONFIG)), to_yaml(with_lasting_paths(config, place(str(output)))))
    asked = {"student": name}
    kept = own_config(place(str(output)), asked).model.student
    assert Path(kept.rpartition(":")[0]).parent == output / "inputs"
    nets.write_text("def net(classes): return None\n")
    with pytest.raises(ConfigError, match=r"^--student: is .*nets\.py:net, but was .*") as caught:
        own_config(place(str(output)), asked)
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = place(str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    facts = {"teacher, starting weights": "0f", "teacher, class names": ["a", "b"]}
    note_facts(folder, facts)
    check_facts(folder, facts)
    with pytest.raises(
        ConfigError, match=r"^--resume: teacher, starting weights: is 1e and was 0f"
    ):
        check_facts(folder, facts | {"teacher, starting weights": "1e"})
