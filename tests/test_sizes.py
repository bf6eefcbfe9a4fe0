"""The scripts stay small. Counted by Python's own tokens: comments, docstrings, line ends and indentation are free."""

import ast
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE, DISTILLATION = "ppo_continuous", "distill_dagger"
VARIANTS = ("ppo_rnn", "ppo_cnn", "ppo_rnd", "ppo_symmetry", "ppo_multigpu")
SCRIPTS = (BASE, *VARIANTS, DISTILLATION)
FENCE = "# ==== Below"

LIMITS = {
    "code lines of the base": 1096,
    "tokens of the base": 12_542,
    "tokens of the base above the fence": 4684,
    "code lines of the distillation": 1281,
    "tokens of the distillation": 14_852,
    "tokens of the distillation above the fence": 6994,
    "tokens of a variant beyond the base's": 1176,
    "tokens of the five variants beyond the base's": 4966,
    "tokens of all seven, below the fence counted once": 47_922,
    "tokens per code line": 13,
    "characters per line": 110,
}
FREE = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def size(text: str) -> tuple[int, int]:
    """Code lines and tokens."""
    strings = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)]
    docs = {line for x in strings if isinstance(x.value.value, str) for line in range(x.lineno, x.end_lineno + 1)}
    tokens, depth = [], 0
    for x in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[x.type]
        depth -= kind == "FSTRING_END"
        # One token, as up to Python 3.11: since then an f-string comes in its parts.
        if x.start[0] not in docs and kind not in (*FREE, "FSTRING_END") and depth == 0:
            tokens.append(x)
        depth += kind == "FSTRING_START"
    return len({line for x in tokens for line in range(x.start[0], x.end[0] + 1)}), len(tokens)


def above(text: str) -> str:
    return text[: text.index(f"\n{FENCE}") + 1]


def measured() -> dict[str, float]:
    lines, tokens = ({name: size(source(name))[i] for name in SCRIPTS} for i in (0, 1))
    own = {name: size(above(source(name)))[1] for name in SCRIPTS}
    beyond = {f"{name}: tokens of a variant beyond the base's": tokens[name] - tokens[BASE] for name in VARIANTS}
    return {
        "code lines of the base": lines[BASE],
        "tokens of the base": tokens[BASE],
        "tokens of the base above the fence": own[BASE],
        "code lines of the distillation": lines[DISTILLATION],
        "tokens of the distillation": tokens[DISTILLATION],
        "tokens of the distillation above the fence": own[DISTILLATION],
        **beyond,
        "tokens of the five variants beyond the base's": sum(beyond.values()),
        "tokens of all seven, below the fence counted once": sum(own.values()) + tokens[BASE] - own[BASE],
        **{f"{name}: tokens per code line": tokens[name] / lines[name] for name in SCRIPTS},
        **{f"{name}: characters per line": max(map(len, source(name).splitlines())) for name in SCRIPTS},
    }


def limit(what: str) -> float:
    return LIMITS[what.partition(": ")[2] or what]


def test_sizes():
    """`python tests/test_sizes.py` prints all figures."""
    assert {what: number for what, number in measured().items() if number > limit(what)} == {}


TEXT = '''"""Header.

Of three lines."""

x = 1  # one


def f(
    a,
):
    """Says so."""
    return (
        "a"
    )
'''


def test_what_is_counted():
    assert size(TEXT) == (7, 3 + 7 + 4)
    assert size(TEXT.replace("# one", "# another")) == size(TEXT)
    assert size(TEXT.replace("1", "1 + 1")) == (7, 16)
    assert size(TEXT.replace("1", 'f"{x + 1} of {f(2)!r}"')) == size(TEXT)
    fenced = f"x = 1\n{FENCE} ===\ny = 2\n"
    assert size(fenced) == (2, 6) and above(fenced) == "x = 1\n"


if __name__ == "__main__":
    for what, number in measured().items():
        print(f"{number:10.5g} of {limit(what):6}  {what}")
