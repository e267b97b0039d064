"""Every command in the documents is one that the programs take."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import predict
from main import parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(pattern: str) -> list[list[str]]:
    """The words of all commands in indented or ticked code whose program matches ``pattern``, from there on."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for code in re.findall(r"^    (\S.*)$|`([^`\n]+)`", text, re.MULTILINE):
            words = re.search(rf"(?:python|torchrun)\b.*?\s({pattern}(?:\s.*)?)$", "".join(code))
            if words:
                found.append(shlex.split(words[1].partition(" #")[0]))
    return found


@pytest.mark.parametrize("command", commands(r"main\.py"), ids=" ".join)
def test_commands_of_main(command):
    words = ["configs/small.yaml" if word == "my.yaml" else word for word in command[1:]]  # the reader's own file
    if "--help" not in words:
        parse(words)


@pytest.mark.parametrize("command", commands(r"predict\.py"), ids=" ".join)
def test_commands_of_predict(command):
    predict.parse(command[1:])


@pytest.mark.parametrize("script", sorted({words[0] for words in commands(r"scripts/\w+\.py")}))
def test_commands_of_scripts(script):
    """The program is there and knows each flag."""
    usages = [words[1:] for words in commands(re.escape(script))]
    subcommands = {words[0] for words in usages if words and re.fullmatch("[a-z]+", words[0])}
    known = ""
    for subcommand in [[], *([name] for name in subcommands)]:
        done = subprocess.run(
            [sys.executable, script, *subcommand, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        known += done.stdout
    for words in usages:
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"


def test_the_documents_were_searched():
    assert len(commands(r"main\.py")) >= 8
    assert len(commands(r"predict\.py")) >= 2
    assert len(commands(r"scripts/\w+\.py")) >= 5
