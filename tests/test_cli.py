"""The command line: quick help, and every mistake found before anything is read or written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import fire
import numpy as np
import pytest
import truth
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from snipdedup import __version__, cli, commands, config
from snipdedup.commands import Settings, is_required
from snipdedup.config import COMMANDS
from snipdedup.errors import SnipError, UsageError

HEAVY = ("torch", "faiss", "numpy", "pyarrow")


@pytest.fixture
def calls(monkeypatch):
    """Note the settings with which a command would run, and run nothing."""
    noted: list[Settings] = []
    monkeypatch.setattr(commands.Command, "run", lambda self, options: noted.append(options))
    return noted


@pytest.fixture
def refused(calls, capsys, tmp_path, monkeypatch):
    """Run a command line that must be wrong usage; return what it says."""
    monkeypatch.chdir(tmp_path)

    def refuse(*words: str) -> str:
        assert cli.run(list(words)) == 2
        assert not calls
        assert not list(tmp_path.iterdir())
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("snip: ")
        assert shown.err.count("\n") == 1
        return shown.err.removeprefix("snip: ").strip()

    return refuse


def words_for(command, **given):
    """A shortest valid command line, with texts of our own where given."""
    words = [command.name]
    for field in command.fields(positional=True):
        words.append(given.pop(field.name, (field.metadata.get("choices") or "x")[0]))
    for field in command.fields(positional=False):
        needed = is_required(field) or (command.name, field.name) == ("apply", "move")
        if field.name in given or needed:
            words.append(f"--{field.name}={given.pop(field.name, 'x')}")
    return words


# ---- help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview(words, capsys):
    assert cli.run(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for command in COMMANDS.values():
        assert f"  {command.name} " in shown.out
        assert command.does in shown.out
    order = [shown.out.index(f"\n{group}\n") for group in ("start here", "the chain", "trying")]
    assert order == sorted(order)
    assert max(map(len, shown.out.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("form", ["{} --help", "{} -h", "help {}", "{} x --out y --help"])
def test_help_of_each_command_names_each_setting(command, form, capsys, calls):
    assert cli.run(form.format(command.name).split()) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert not calls
    assert shown.out.startswith(f"snip {command.name}: {command.does}\n")
    assert command.example in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100
    for field in dataclasses.fields(command.options):
        name = field.name.upper() if field.metadata.get("positional") else f"--{field.name}"
        lines = [
            line
            for line in shown.out.splitlines()
            if line.startswith(f"  {name} ") or line == f"  {name}"
        ]
        assert len(lines) == 1, name
        first_words = " ".join(field.metadata["help"].split()[:2])
        assert first_words in " ".join(shown.out.split())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda c: c.name)
def test_each_command_points_at_a_function_that_takes_its_settings(command):
    path = Path(cli.__file__).parents[1] / f"{command.module.replace('.', '/')}.py"
    assert "def run(options: " in path.read_text(encoding="utf-8")


def test_examples_are_valid(calls):
    for command in COMMANDS.values():
        line = command.example.replace("'", "")
        assert cli.run(line.split()[1:]) == 0, line
    assert len(calls) == len(COMMANDS)


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"snip {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["dedup", "--help"], ["train", "-h"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom snipdedup import cli\nstatus = cli.run(sys.argv[1:])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_importing_the_package_is_light():
    code = f"import sys, snipdedup; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_opens_no_pager(tmp_path):
    environment = os.environ | {"PAGER": f"touch {tmp_path}/paged; cat", "TERM": "xterm"}
    for words in ([], ["--help"], ["dedup", "--help"]):
        subprocess.run(
            [sys.executable, "-m", "snipdedup", *words],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=30,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


# ---- mistakes


MISTAKES = {
    "unknown flag": (
        "dedup x --out o --thresold .9",
        "dedup has no flag --thresold, did you mean --threshold?; see: snip dedup --help",
    ),
    "unknown flag with =": ("dedup x --outt=o", "no flag --outt, did you mean --out?"),
    "unknown flag with dashes": ("dedup x --max-mem 2GB", "no flag --max-mem, did you mean --max_"),
    "unknown flag far from all": ("dedup x --zzzz 1 --out o", "no flag --zzzz; see: snip dedup"),
    "three dashes": ("dedup x ---out o", "no flag ---out, did you mean --out?"),
    "short form": ("dedup x -t o", "no flag -t"),
    "short form, twice": ("train x -o o --out p", "--out is given more than once"),
    "flag of another command": ("filter m --is_dup d --out o --dim 3", "filter has no flag --dim"),
    "unknown command": ("dedpu x --out o", "no command 'dedpu', did you mean dedup?"),
    "unknown command, help": ("dedpu --help", "no command 'dedpu', did you mean dedup?"),
    "flag for a command": ("--out o", "no flag '--out'"),
    "stray word": ("dedup x y --out o", "unexpected word 'y'; see: snip dedup --help"),
    "stray flag name": (
        "dedup x threshold .9 --out o",
        "unexpected word 'threshold', did you mean --threshold?",
    ),
    "no value at the end": ("dedup x --out", "--out needs a value"),
    "no value before a flag": (
        "dedup x --out --seed 3",
        "--out needs a value (one that begins with a dash: --out=--seed)",
    ),
    "no value, short": ("dedup x --out o -k", "-k needs a value"),
    "empty value": ("dedup x --out=", "out is empty"),
    "not a number": ("dedup x --out o --threshold high", "--threshold must be a number, found 'hi"),
    "not whole": ("dedup x --out o --seed 1.5", "--seed must be a whole number, found '1.5'"),
    "infinite": ("dedup x --out o --seed inf", "--seed must be a whole number, found 'inf'"),
    "no number": ("dedup x --out o --seed nan", "--seed must be a whole number, found 'nan'"),
    "out of range": ("dedup x --out o --threshold 1.5", "--threshold must lie between -1 and 1"),
    "nan": ("dedup x --out o --threshold nan", "--threshold must lie between -1 and 1, found nan"),
    "no choice": ("dedup x --out o --grouping stra", "must be one of star, components, found 'st"),
    "no amount": ("dedup x --out o --max_memory 2XB", "amount of memory such as 2GB or 500MB, fo"),
    "twice": ("dedup x --out o --out p", "--out is given more than once"),
    "twice, two forms": ("dedup x --out o --chunk_rows 1 --chunk-rows=1", "given more than once"),
    "on and off": ("dedup x --out o --overwrite --nooverwrite", "--overwrite is given more than"),
    "place and flag": ("dedup x --out o --features y", "FEATURES is given more than once"),
    "switch with a word": (
        "dedup x --out o --overwrite true",
        "unexpected word 'true' (a switch takes no value)",
    ),
    "switch with a text": ("dedup x --out o --overwrite=yes", "--overwrite is a switch: give it w"),
    "needed flag": ("filter m --out o", "filter needs --is_dup; for example: snip filter metadata"),
    "needed word": ("train --out o", "train needs FEATURES; for example: snip train img_emb"),
    "all needed": ("compress", "compress needs FEATURES, --encoder, --out; for example:"),
    "separator": ("dedup x --out o - upper", "unexpected '-'"),
    "two dashes": ("dedup x --out o -- --trace", "unexpected '--'"),
    "attribute of the result": ("dedup x --out o __class__", "unexpected word '__class__'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(refused, what):
    line, said = MISTAKES[what]
    assert said in refused(*line.split())


def test_an_empty_word(refused):
    assert "features is empty" in refused("dedup", "", "--out", "o")
    assert "no command ''" in refused("")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda c: c.name)
def test_each_flag_is_known_each_misspelt_one_is_not(command, refused):
    for field in command.fields(positional=False):
        typo = f"--{field.name}x"
        said = refused(*words_for(command), typo, "1")
        assert said.startswith(f"{command.name} has no flag {typo}")


def test_the_help_of_dedup_has_eight_common_flags_and_each_other_once(capsys):
    assert cli.run(["dedup", "--help"]) == 0
    shown = capsys.readouterr().out
    heads = re.findall(r"^(\w[^:\n]*|.*too\))$", shown, re.M)
    assert heads[:2] == ["arguments", "common flags"]
    assert set(heads) >= set(config.FLAG_GROUPS["dedup"])
    common = shown.partition("common flags\n")[2].partition("\n\n")[0]
    assert len(re.findall(r"^  --\w+", common, re.M)) == 8
    every = [field.name for field in COMMANDS["dedup"].fields(positional=False)]
    assert sorted(re.findall(r"^  --(\w+)", shown, re.M)) == sorted(every)


def test_o_is_out(calls):
    assert cli.run(["dedup", "x", "-o", "y"]) == 0
    assert cli.run(["dedup", "x", "-o=z"]) == 0
    assert cli.run(["top", "-o", "w"]) == 0
    assert [options.out for options in calls] == ["y", "z", "w"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Features, tables, and folders as snip makes them."""
    folder = tmp_path_factory.mktemp("places")
    for name, kind in (("clean", "dedup"), ("encoder", "encoder"), ("index", "index")):
        (folder / name).mkdir()
        (folder / name / "snip.json").write_text(f'{{\n  "kind": "{kind}",')
    for name in ("img_emb/a.npy", "img_emb/b.npy", "metadata/a.parquet", "metadata/b.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("audit img_emb clean", "OUT and FEATURES are swapped: OUT is clean, FEATURES is img_emb;"),
        ("why 123 clean", "OUT and KEY are swapped: OUT is clean, KEY is 123;"),
        ("compress encoder --encoder img_emb -o x", "--encoder and FEATURES are swapped: --encod"),
        ("filter clean --is_dup metadata --out x", "--is_dup and METADATA are swapped"),
        ("search index --index 7", "--index and QUERY are swapped: --index is index, QUERY is 7;"),
        ("report photos --images clean", "OUT and --images are swapped"),
        ("dedup metadata --metadata img_emb -o x", "--metadata and FEATURES are swapped: --meta"),
        ("dedup img_emb/a.npy img_emb/b.npy -o x", "quote it, such as 'img_emb/*.npy')"),
        ("dedup img_emb -o x --metadata metadata/a.parquet metadata/b.parquet", "/*.parquet')"),
        ("download here s3://bucket/meta", "SOURCE comes first"),
    ],
)
def test_what_is_swapped_or_expanded_is_said(places, calls, monkeypatch, capsys, line, said):
    monkeypatch.chdir(places)
    assert cli.run(line.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert said in shown
    assert not calls


@pytest.mark.parametrize(
    "line",
    [
        "audit clean img_emb", "why clean 123", "compress img_emb --encoder encoder --out x",
        "filter metadata --is_dup clean --out x", "search 7 --index index", "diff clean clean",
        "report clean --images clean", "dedup img_emb --metadata metadata --out x",
        "dedup metadata --metadata metadata --out x", "dedup clean --out clean2",
        "filter clean --is_dup img_emb/a.npy --out x", "dedup img_emb --reference clean --out x",
    ],
)  # fmt: skip
def test_what_is_in_its_place_is_not_called_swapped(places, calls, monkeypatch, line):
    monkeypatch.chdir(places)
    assert cli.run(line.split()) == 0
    assert len(calls) == 1


def test_swapped_words_below_home(places, calls, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(places))
    assert cli.run(["audit", "~/img_emb", "~/clean"]) == 2
    assert "OUT is ~/clean" in capsys.readouterr().err
    assert cli.run(["audit", "~nobody-of-this-name", "x" * 5000]) == 0


def test_stray_words_that_are_no_files_of_a_glob(places, refused):
    assert "unexpected word" in refused("dedup", "a", "x" * 5000, "--out", "o")
    assert "quote it" not in refused("dedup", f"{places}/img_emb/a.npy", "x.npy", "--out", "o")


def test_a_mistyped_flag_in_a_real_run_touches_nothing(snip, tmp_path):
    done = snip("dedup", "FEATURES", "--out", tmp_path / "OUT", "--thresold", ".9", status=2)
    assert "--threshold" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# ---- values


FLAGGED = [["--out={}"], ["--out", "{}"]]
TEXTS = [
    "2024_01", "1e5", "None", "True", "[1,2]", "(1,)", "{'a': 1}", "a b", "0x10", "1_000", "a=b",
    "/x/{part:04d}.npy", "~/x", "ü", "'q'", '"q"', "1.0", "00012", "a,b", "#x",
]  # fmt: skip


@pytest.mark.parametrize("form", FLAGGED)
@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_as_they_were_typed(calls, form, text):
    assert cli.run(["dedup", text, *(part.format(text) for part in form)]) == 0
    assert (calls[0].features, calls[0].out) == (text, text)


@pytest.mark.parametrize("text", ["-x", "--x", "-1"])
def test_texts_that_begin_with_a_dash(calls, text):
    assert cli.run(["dedup", "x", f"--out={text}"]) == 0
    assert calls[0].out == text


@given(st.text(min_size=1).filter(lambda text: not cli.is_flag(text) and text not in ("-", "--")))
@hypothesis_settings(deadline=None, max_examples=150)
def test_any_text_stays_as_it_was_typed(text):
    command = COMMANDS["dedup"]
    options = cli.parse(command, [text, "--out", text, f"--metadata={text}"])
    assert (options.features, options.out, options.metadata) == (text, text, text)


@given(st.lists(st.text("-=ox0 kéN_", max_size=5), max_size=5))
@hypothesis_settings(deadline=None, max_examples=150)
def test_no_words_break_the_parser(words):
    with contextlib.suppress(UsageError):
        cli.parse(COMMANDS["dedup"], words)


NUMBERS = [
    ("--margin -5", "margin", -5.0),
    ("--margin=-5", "margin", -5.0),
    ("--seed +5", "seed", 5),
    ("--threshold -0.5", "threshold", -0.5),
    ("--threshold -.5", "threshold", -0.5),
    ("--threshold=-1e-3", "threshold", -1e-3),
    ("--threshold 1", "threshold", 1.0),
    ("--chunk_rows 1e5", "chunk_rows", 100_000),
    ("--chunk-rows=1e5", "chunk_rows", 100_000),
    ("--seed 9007199254740993", "seed", 2**53 + 1),  # not by way of a float
    ("-k 7", "k", 7),
    ("--k=7", "k", 7),
    ("--overwrite", "overwrite", True),
    ("--overwrite=True", "overwrite", True),
    ("--overwrite=false", "overwrite", False),
    ("--nooverwrite", "overwrite", False),
    ("--no-overwrite", "overwrite", False),
]


@pytest.mark.parametrize(("words", "name", "value"), NUMBERS)
def test_numbers_and_switches(calls, words, name, value):
    assert cli.run(["dedup", "x", "--out", "o", *words.split()]) == 0
    found = getattr(calls[0], name)
    assert found == value
    assert type(found) is type(value)


def test_flags_may_stand_anywhere(calls):
    for line in ("--overwrite x --out o", "--out o --overwrite x", "x --overwrite --out o"):
        assert cli.run(["dedup", *line.split()]) == 0
    assert calls[0] == calls[1] == calls[2]
    assert calls[0].features == "x"
    assert calls[0].overwrite


def test_a_word_in_place_may_be_named(calls):
    assert cli.run(["filter", "--metadata", "m", "--is_dup", "d", "--out", "o"]) == 0
    assert (calls[0].metadata, calls[0].is_dup) == ("m", "d")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda c: c.name)
def test_defaults_are_those_of_the_settings(command, calls):
    words = words_for(command)
    assert cli.run(words) == 0
    for field in dataclasses.fields(command.options):
        if not (f"--{field.name}=x" in words or field.metadata.get("positional")):
            assert getattr(calls[0], field.name) == field.default


# ---- how a run ends


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SnipError("a.npy: row 3 is NaN"), 1, "snip: a.npy: row 3 is NaN\n"),
        (UsageError("--out is missing"), 2, "snip: --out is missing\n"),
        (
            KeyboardInterrupt(),
            130,
            "snip: interrupted; the same command continues from what is complete\n",
        ),
        (OSError(28, "No space left on device", "o/x"), 1, "snip: o/x: No space left on device\n"),
        (MemoryError("3 GB"), 1, "snip: out of memory: 3 GB; lower --max_memory or --chunk_rows\n"),
    ],
)
def test_errors_become_one_line_and_a_status(monkeypatch, capsys, error, status, said):
    def fail(self, options):
        raise error

    monkeypatch.setattr(commands.Command, "run", fail)
    assert cli.run(["dedup", "x", "--out", "o"]) == status
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", said)


def test_results_go_to_stdout(monkeypatch, capsys):
    monkeypatch.setattr(commands.Command, "run", lambda self, options: "12 rows")
    assert cli.run(["dedup", "x", "--out", "o"]) == 0
    assert capsys.readouterr().out == "12 rows\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["dedup", "x", "--out", "o"])
    assert ended.value.code == 0


def test_a_reader_that_has_seen_enough(tmp_path):
    script = f"{sys.executable} -m snipdedup dedup --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "0"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Features, a finished run of them, and one that an audit finds wrong."""
    folder = tmp_path_factory.mktemp("small")
    np.save(folder / "e.npy", truth.clustered(200, 8, 0))
    for out in ("good", "bad"):
        assert truth.snip("dedup", folder / "e.npy", "--out", folder / out)[0] == 0
    (folder / "bad" / "is_dup.npy").write_bytes((folder / "bad" / "is_dup.npy").read_bytes() + b"x")
    return folder


@pytest.mark.parametrize(
    ("words", "status", "both"),
    [
        ("audit bad", 1, False),
        ("audit bad", 1, True),
        ("top good", 0, False),
        ("dedup e.npy --out new", 0, True),
        ("dedup e.npy --out new2 --threshold 9", 2, True),
        ("demo --out demo --pictures 50", 141, False),
    ],
)
def test_no_command_fails_on_a_reader_that_is_gone(small_run, words, status, both):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "snipdedup", *words.split()], cwd=small_run, check=False,
            stdout=pipe, stderr=subprocess.STDOUT if both else subprocess.PIPE,
        )  # fmt: skip
    assert done.returncode == status
    if not both:
        assert b"Traceback" not in done.stderr
        assert b"roken" not in done.stderr
    assert (small_run / "new" / "snip.json").is_file() or "new" not in words.split()


def test_the_home_of_nobody(small_run, capsys):
    words = ["dedup", str(small_run / "e.npy"), "--out", "~nobody-of-this-name/x"]
    assert cli.run(words) == 1
    assert "begins with ~ and an unknown user name" in capsys.readouterr().err


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    def break_off(words):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "answer", break_off)
    assert cli.run(["audit", "x"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


def test_a_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "snipdedup", "--help"],
            stdout=pipe, stderr=subprocess.PIPE, check=True,
        )  # fmt: skip
    assert done.stderr == b""


def test_fire_matches_the_words(monkeypatch):
    """Words in places, flags with and without dashes, switches, a value that looks like a flag."""
    calls, original = [], fire.Fire
    monkeypatch.setattr(fire, "Fire", lambda *a, **k: (calls.append(a[1]), original(*a, **k)))
    words = ["-5", "--index", "x", "--k", "3", "--html=--y", "--json"]
    options = cli.parse(COMMANDS["search"], words)
    assert (options.query, options.index, options.k) == ("-5", "x", 3)
    assert (options.html, options.json) == ("--y", True)
    assert calls == [["-5", "--index=x", "--k=3", "--html=--y", "--json=true"]]
