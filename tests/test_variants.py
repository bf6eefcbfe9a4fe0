"""A variant is the base and its technique: every block not named in its header is the base's, byte for byte; and vice versa."""

import ast
import difflib
import fnmatch
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "ppo_continuous.py"
LIMITS = {"ppo_rnn": 200, "ppo_cnn": 120, "ppo_rnd": 180, "ppo_symmetry": 120, "ppo_multigpu": 120, "distill_dagger": None}
SCRIPTS = [name for name in LIMITS if (ROOT / f"{name}.py").exists()]


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def span(node: ast.stmt, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return "\n".join(lines[first - 1 : node.end_lineno])


def blocks(text: str) -> dict[str, str]:
    """Top-level functions and classes by name, as exact source."""
    lines = text.splitlines()
    return {n.name: span(n, lines) for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def fields(text: str) -> dict[str, str]:
    """Fields of Args with their docstrings, as exact source."""
    lines = text.splitlines()
    (args,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    pairs = zip(args.body, args.body[1:])
    return {n.target.id: span(n, lines) + span(doc, lines) for n, doc in pairs if isinstance(n, ast.AnnAssign)}


def declared(text: str) -> dict[str, str]:
    """`- name: why` lines of the header's list of differences."""
    listing = ast.get_docstring(ast.parse(text)).partition("Differs from ppo_continuous.py:")[2]
    return dict(re.findall(r"^- (\w+):((?:.|\n(?!- |\n))*)", listing, re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_blocks_differ_exactly_where_the_header_says(name):
    base, variant, named = blocks(BASE.read_text()), blocks(source(name)), set(declared(source(name)))
    if name == "distill_dagger":  # another algorithm: only what it shares with the base is compared
        named, base = named & base.keys(), {k: v for k, v in base.items() if k in variant}
        variant = {k: v for k, v in variant.items() if k in base}
    differ = {block for block in base.keys() | variant.keys() if base.get(block) != variant.get(block)}
    assert not differ - named, "these differ without being named in the header"
    assert not (named & (base.keys() | variant.keys())) - differ, "these are named in the header and do not differ"
    assert named <= base.keys() | variant.keys(), "these are named in the header and do not exist"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "distill_dagger"])
def test_args_differ_exactly_where_the_header_says(name):
    base, variant, text = fields(BASE.read_text()), fields(source(name)), declared(source(name)).get("Args", "")
    for field in base.keys() | variant.keys():
        if base.get(field) != variant.get(field):
            named = any(fnmatch.fnmatch(field, word) for word in re.findall(r"[\w*]+", text))  # `cnn_*` names a family
            assert named, f"{field} differs and is not named under `- Args:` in the header"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if LIMITS[name]])
def test_changed_lines(name):
    """The + and - lines of `diff -U0`, without the header."""

    def body(text):
        return text.splitlines()[ast.parse(text).body[0].end_lineno :]

    diff = list(difflib.unified_diff(body(BASE.read_text()), body(source(name)), n=0, lineterm=""))[2:]
    changed = sum(line[0] in "+-" for line in diff)
    assert changed <= LIMITS[name], f"{changed} changed lines"


def test_the_test_sees_a_difference():
    text = BASE.read_text()
    edited = text.replace("decay[t] * advantages", "decay[t] *  advantages")
    assert blocks(edited)["compute_gae"] != blocks(text)["compute_gae"]
    edited = text.replace("gamma: float = 0.99", "gamma: float = 0.98")
    assert fields(edited)["gamma"] != fields(text)["gamma"]


def test_the_distillation_names_what_it_leaves_out():
    header = ast.get_docstring(ast.parse(source("distill_dagger")))
    gone = blocks(BASE.read_text()).keys() - blocks(source("distill_dagger")).keys()
    assert gone <= set(re.findall(r"\w+", header)), "these blocks of the base are gone without a word"
