"""The first day of a new user, on digits in place of photographs."""

import pytest
from conftest import write_digits
from first_day import commands_of, go


def test_the_commands_that_are_gone_through():
    assert commands_of("## Quick start") == ["bash scripts/quickstart.sh"]
    words = [command.split()[1] for command in commands_of("### Fine-tune on your own images")]
    assert words == [
        "scripts/check_dataset.py", "main.py", "main.py", "scripts/report.py", "predict.py", "scripts/export.py",
    ]  # fmt: skip


@pytest.mark.slow  # minutes
def test_the_way_of_a_new_user(tmp_path):
    assert go(write_digits(tmp_path / "photographs", 400), tmp_path) > 90
