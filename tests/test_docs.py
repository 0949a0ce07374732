"""What the documents say is so: snippets run, verbs and files exist, tables and numbers are computed here or absent."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import decode_table
from loaders.families import FAMILIES
from loaders.quantization import quantizable
from parity.cli import EXIT_CODES, VERBS, main
from parity.zoo import make_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCS}
README = TEXT["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERB_NAMES = {verb for verb, _, _ in VERBS}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def snippets(language: str, text: str = README) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """Without code blocks, code spans, addresses, and the table that has a test of its own."""
    text = decode_table.SECTION.sub("", text)
    return re.sub(r"https?://\S+", "", CODE_SPAN.sub("", FENCE.sub("", text)))


def verbs_named(text: str) -> list[str]:
    """The verb of every command line, in a block or in a span."""
    blocks = "\n".join(body for _, body in FENCE.findall(text))
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    lines += [span.strip("`") for span in CODE_SPAN.findall(FENCE.sub("", text))]
    return [match[1] for line in lines if (match := re.match(r"tandem ([a-z][\w-]*)", line))]


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in TEXT for number, _ in enumerate(snippets("python", TEXT[name]))]
)
def test_every_python_snippet_of_a_document_runs(name, number, tmp_path):
    snippet = snippets("python", TEXT[name])[number]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_lines_of_the_readme_run_and_the_backends_agree(tmp_path, monkeypatch):
    checkpoint = make_checkpoint("qwen3", tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    lines = [
        shlex.split(line, comments=True)
        for body in snippets("sh")
        for line in body.splitlines()
        if line.startswith("tandem ")
    ]
    assert len(lines) >= 3
    for _, *arguments in lines:
        assert main([str(checkpoint) if argument == "CKPT" else argument for argument in arguments]) == 0, arguments


def test_the_readme_opens_with_an_example():
    assert snippets("python")


@pytest.mark.parametrize("name", TEXT)
def test_every_verb_that_a_document_names_exists(name):
    assert set(verbs_named(TEXT[name])) <= VERB_NAMES


def test_the_readme_has_a_row_for_every_verb():
    assert set(re.findall(r"^\| `tandem ([\w-]+)", README, re.MULTILINE)) == VERB_NAMES


def test_a_verb_in_a_block_and_a_verb_in_a_span_are_found():
    assert verbs_named("```sh\n$ tandem one x\n  tandem two\n```\n`tandem three --x` and tandem alone") == [
        "one",
        "two",
        "three",
    ]


def test_the_exit_codes_in_the_readme_are_those_of_the_command():
    sentence = README[README.index("Exit codes:") :].split(".")[0]
    assert " ".join(sentence.replace("`", "").lower().split()) == EXIT_CODES


@pytest.mark.parametrize("name", TEXT)
def test_every_relative_link_leads_to_a_file(name):
    targets = [target.partition("#")[0] for target in LINK.findall(FENCE.sub("", TEXT[name])) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / name).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_named_in_code_spans_exists(name):
    tops = {path.name for path in ROOT.iterdir()}
    named = {span.strip("`") for span in CODE_SPAN.findall(FENCE.sub("", TEXT[name]))}
    paths = [span for span in named if "/" in span and span.split("/")[0] in tops and not set(span) & set("<*({ ")]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert [path for path in missing if not path.endswith("/a.py")] == []


def test_every_make_target_that_a_document_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, text in TEXT.items():
        code = "\n".join([body for _, body in FENCE.findall(text)] + CODE_SPAN.findall(FENCE.sub("", text)))
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", code, re.MULTILINE)) <= targets, name


def test_a_number_in_the_readme_is_one_that_the_project_states_elsewhere():
    stated = {PROJECT["requires-python"].removeprefix(">=")}
    assert set(re.findall(r"(?<![\w.])\d[\d.,]*(?![\w])", prose(README))) <= stated


def test_the_table_of_decoding_is_what_was_measured_and_each_backend_is_no_slower_than_its_peer():
    figures = json.loads(decode_table.FIGURES.read_text(encoding="utf-8"))
    assert decode_table.SECTION.findall(README) == [decode_table.section(figures)]
    assert len(figures["cases"]) == 2
    for case, found in figures["cases"].items():
        assert {*decode_table.PEER, *decode_table.PEER.values()} == found["ms"].keys(), case
        assert found["speed"]["jax"] >= 1.0, case
        assert found["speed"]["torch"] >= 1.1, case


def test_speeds_are_medians_of_the_rounds_and_what_was_not_measured_is_said():
    seconds = {"transformers": [0.06, 0.08, 0.3], "torch": [0.05, 0.04, 0.1], "jax": [0.07, 0.07, 0.07]}
    found = decode_table.summed_up(seconds)
    assert found == {"ms": {"transformers": 80.0, "torch": 50.0, "jax": 70.0}, "speed": {"torch": 2.0}}
    assert decode_table.table({"one row": found}).splitlines() == [
        "| float32, ms a step | transformers | torch | jax | jax over tunix | torch over transformers |",
        "|---|---|---|---|---|---|",
        "| one row | 80 | 50 | 70 | not measured | 2.00x |",
    ]


@pytest.mark.parametrize(("column", "package"), [(1, "jax_models"), (2, "torch_models")])
def test_the_table_of_what_exists_says_what_the_models_have(column, package, tmp_path):
    model = importlib.import_module(package).load(make_checkpoint("qwen3", tmp_path / "checkpoint"))
    rows = re.findall(r"^\|[^|]*\| `model\.(\w+)` \| (yes|no) \| (yes|no) \|$", README, re.MULTILINE)
    assert len(rows) > 3
    assert {row[0]: row[column] for row in rows} == {row[0]: "yes" if hasattr(model, row[0]) else "no" for row in rows}


def test_the_readme_says_what_every_extra_is_for():
    extras = {name for name in PROJECT["optional-dependencies"] if name not in ("test", "check")}
    rows = re.findall(r"^\| (`[\w-]+`(?:, `[\w-]+`)*) \| ", README[: README.index("## First steps")], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"[\w-]+", row)} == extras


def test_the_readme_names_every_architecture_that_opens():
    assert set(re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", README)) == set(FAMILIES)


def test_every_dependency_has_its_reason_in_the_changelog():
    extras = PROJECT["optional-dependencies"]
    required = [
        *PROJECT["dependencies"],
        *(line for name in ("jax", "torch", "test", "check") for line in extras[name]),
    ]
    reasons = TEXT["CHANGELOG.md"].partition("### Dependencies")[2]
    names = [re.match(r"[\w-]+", line)[0] for line in required]
    assert [name for name in names if name not in reasons] == []


def test_quantised_checkpoints_name_the_version_that_wrote_them():
    assert PROJECT["version"] == quantizable.VERSION
