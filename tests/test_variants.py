"""A variant is the base and its technique: every line in which it differs is in diffs/<variant>.diff, and every function and
class that differs is named in its header. Below the fence all scripts are the same.

After a change of a script `python tests/test_variants.py` writes the diffs anew: read with `git diff` what has changed in them.
"""

import ast
import difflib
import fnmatch
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIFFS = ROOT / "tests" / "diffs"
BASE = (ROOT / "ppo_continuous.py").read_text()
VARIANTS = ("ppo_rnn", "ppo_cnn", "ppo_rnd", "ppo_symmetry", "ppo_multigpu")
FENCE = "# ==== Below"


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def body(text: str) -> list[str]:
    """The lines below the header, which is each script's own."""
    return text.splitlines(keepends=True)[ast.parse(text).body[0].end_lineno :]


def difference(name: str, text: str) -> str:
    """As of `diff -U2`, but each hunk headed by where in the base it is, not by line numbers: those change with any change."""
    base, difference = body(BASE), []
    for line in difflib.unified_diff(base, body(text), "ppo_continuous.py", f"{name}.py", n=2):
        if line.startswith("@@"):
            above = base[: int(re.search(r"\d+", line)[0]) + 1]  # down to the first line that differs
            line = "@@ " + [x for x in ["the imports\n", *above] if x.startswith(("def ", "class ", "the "))][-1]
        difference.append(line)
    return "".join(difference)


def blocks(text: str) -> dict[str, list[str]]:
    """Top-level functions and classes by name, as lines of source."""
    lines, nodes = text.splitlines(), [x for x in ast.parse(text).body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    return {x.name: lines[min([x.lineno, *(d.lineno for d in x.decorator_list)]) - 1 : x.end_lineno] for x in nodes}


def fields(text: str) -> dict[str, list[str]]:
    """Fields of Args with their docstrings, as lines of source."""
    (args,) = [x for x in ast.parse(text).body if isinstance(x, ast.ClassDef) and x.name == "Args"]
    pairs = [(x, doc) for x, doc in zip(args.body, args.body[1:]) if isinstance(x, ast.AnnAssign)]
    return {x.target.id: text.splitlines()[x.lineno - 1 : doc.end_lineno] for x, doc in pairs}


def listing(text: str) -> str:
    """What the header says of the differences."""
    return ast.get_docstring(ast.parse(text)).partition("Differs from ppo_continuous.py:")[2]


def declared(text: str) -> dict[str, str]:
    """The same as a list, `- names: what`."""
    return dict(re.findall(r"^- ([\w, ]+):((?:.|\n(?!- |\n))*)", listing(text), re.M))


def faults(text: str) -> set[str]:
    """What is wrong with what the header says of functions and classes."""
    ours, theirs, leading = blocks(text), blocks(BASE), set(re.findall(r"\w+", " ".join(declared(text))))
    # Before a colon all words are names, elsewhere those that are no words of English or stand in backticks.
    named = leading | set(re.findall(r"`?\b(\w+_\w+|[A-Z]\w*|(?<=`)\w+(?=`))\b", listing(text)))
    differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    found = {f"{name} differs and is not named" for name in differ - named}
    found |= {f"{name} is named and does not differ" for name in named & ours.keys() - differ}
    return found | {f"{name} is named and does not exist" for name in leading - ours.keys() - theirs.keys()}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_difference_is_the_one_on_record(name):
    recorded = (DIFFS / f"{name}.diff").read_text()
    assert difference(name, source(name)) == recorded, "meant? `python tests/test_variants.py` records it; read `git diff`"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_statement_more_in_any_function_is_seen(name):
    """Before its last one, also where the function is the base's. In all of one script, in some of the others: it takes long."""
    recorded, text = (DIFFS / f"{name}.diff").read_text(), source(name)
    lines, some = text.splitlines(keepends=True), {"compute_gae", "train", "forward", "save"}
    functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]
    assert some <= {x.name for x in functions}
    for function in functions if name == "ppo_rnn" else [x for x in functions if x.name in some]:
        last = function.body[-1]
        more = [*lines[: last.lineno - 1], " " * last.col_offset + "torch.manual_seed(0)\n", *lines[last.lineno - 1 :]]
        assert difference(name, "".join(more)) != recorded, function.name


@pytest.mark.parametrize("name", [*VARIANTS, "distill_dagger"])
def test_below_the_fence_all_scripts_are_the_same(name):
    ours, theirs = (text[text.index(f"\n{FENCE}") :] for text in (source(name), BASE))
    assert ours == theirs


@pytest.mark.parametrize("name", VARIANTS)
def test_the_header_names_what_differs_and_nothing_else(name):
    assert not faults(source(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_header_names_the_settings_that_differ(name):
    """`cnn_*` names a family."""
    ours, theirs = fields(source(name)), fields(BASE)
    said = " ".join(what for names, what in declared(source(name)).items() if "Args" in names.split(", "))
    words = re.findall(r"[\w*]+", said)
    for field in [x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x)]:
        assert any(fnmatch.fnmatch(field, word) for word in words), f"{field} differs and is not named under `- Args`"
    for word in [word for word in words if word in theirs or "*" in word]:
        assert any(fnmatch.fnmatch(x, word) and ours.get(x) != theirs.get(x) for x in ours | theirs), f"{word} does not differ"


def test_the_header_of_the_distillation_names_what_it_changes_and_what_it_leaves_out():
    """What is new there, another algorithm, is as much as the rest."""
    text = source("distill_dagger")
    ours, theirs, words = blocks(text), blocks(BASE), re.findall(r"\w+", listing(text))
    assert not [name for name in theirs if ours.get(name) != theirs[name] and name not in words]


def test_the_check_of_the_header_sees_a_fault():
    text = source("ppo_cnn")
    assert not faults(text)
    assert faults(text.replace("- CNN, SpatialSoftmax: new", "- CNN, SpatialSoftmax, save, gone: new")) == {
        "save is named and does not differ",
        "gone is named and does not exist",
    }
    more = text.replace("def compute_gae", "def added():\n    pass\n\n\ndef compute_gae").replace("delta_t =", "delta_t:")
    assert faults(more) == {"added differs and is not named", "compute_gae differs and is not named"}


if __name__ == "__main__":
    DIFFS.mkdir(exist_ok=True)
    for name in VARIANTS:
        (DIFFS / f"{name}.diff").write_text(difference(name, source(name)))
