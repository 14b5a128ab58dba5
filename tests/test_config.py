"""Each setting refuses what is out of its range, by name, before any work."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from snipdedup import commands, config
from snipdedup.commands import (
    ANYWHERE,
    STORED,
    bare_type,
    is_required,
    parse_bytes,
    setting_name,
    usual_value,
)
from snipdedup.config import COMMANDS
from snipdedup.errors import UsageError

CLASSES = [command.options for command in COMMANDS.values()]


def make(kind, **values):
    """Settings with every place and every needed flag filled in."""
    needed = {
        f.name: (f.metadata.get("choices") or "x")[0]
        for f in dataclasses.fields(kind)
        if is_required(f) or f.metadata.get("positional")
    }
    if kind is config.Apply and not {"move", "link", "undo"} & set(values):
        needed["move"] = "y"
    if "undo" in values:
        needed.pop("out")
    if {"unmatched", "ambiguous"} & set(values):
        needed["on"] = "url"  # what these flags go with
    return kind(**(needed | values))


def numbers():
    """Every setting that is a number."""
    for kind in CLASSES:
        for name, hint in get_type_hints(kind).items():
            if bare_type(hint) in (int, float):
                yield pytest.param(kind, name, bare_type(hint), id=f"{kind.__name__}.{name}")


RANGES = [
    ("Embed", "shard_rows", 1, 10**7),
    ("Embed", "max_pixels", 1, 2**40),
    ("Embed", "every", 1e-2, 10**6),
    ("Embed", "threads", 0, 4096),
    ("Embed", "num_tasks", 1, 10**6),
    ("Embed", "task_index", 0, 10**6),
    ("Train", "dim", 2, 4096),
    ("Train", "steps", 1, 10**7),
    ("Train", "batch", 16, 10**6),
    ("Train", "hidden", 1, 10**5),
    ("Train", "learning_rate", 1e-9, 1),
    ("Train", "temperature", 1e-4, 10),
    ("Train", "subset_rows", 64, 10**9),
    ("Train", "validation_rows", 16, 10**6),
    ("Train", "threads", 0, 4096),
    ("Compress", "threads", 0, 4096),
    ("BuildIndex", "nlist", 0, 2**24),
    ("BuildIndex", "m", 1, 256),
    ("BuildIndex", "nbits", 4, 8),
    ("BuildIndex", "train_rows", 0, 10**9),
    ("BuildIndex", "threads", 0, 4096),
    ("Dedup", "threshold", -1, 1),
    ("Dedup", "text_threshold", -1, 1),
    ("Dedup", "keep_fraction", 0, 1),
    ("Dedup", "max_pairs", 0, 2**62),
    ("Dedup", "clusters", 0, 2**24),
    ("Dedup", "recall", 0.5, 1),
    ("Dedup", "precision", 0, 1),
    ("Dedup", "k", 1, 1024),
    ("Dedup", "merge_captions", 1, 10**6),
    ("Dedup", "calibration_rows", 1, 10**6),
    ("Dedup", "nprobe", 1, 2**24),
    ("Dedup", "chunk_rows", 1, 10**9),
    ("Dedup", "threads", 0, 4096),
    ("Dedup", "num_tasks", 1, 10**6),
    ("Dedup", "task_index", 0, 10**6),
    ("Download", "jobs", 1, 256),
    ("Demo", "pictures", 50, 100_000),
    ("Train", "text_temperature", 1e-4, 10),
    ("Audit", "sample", 0, 2**40),
    ("Audit", "probe_rows", 0, 10**6),
    ("Report", "groups", 1, 100_000),
    ("Audit", "n", 1, 10**6),
    ("Audit", "threads", 0, 4096),
    ("Apply", "threads", 0, 4096),
    ("Threshold", "sample", 2, 10_000),
    ("Threshold", "pool", 2, 10**9),
    ("Threshold", "threads", 0, 4096),
    ("Threshold", "seed", 0, 2**63 - 1),
    ("Top", "n", 1, 10**7),
    ("Diff", "n", 0, 10**6),
    ("Search", "k", 1, 10**6),
    ("Search", "nprobe", 1, 2**24),
    ("Search", "rerank", 0, 10**6),
    ("Eval", "dim", 2, 4096),
    ("Eval", "nlist", 0, 2**24),
    ("Eval", "queries", 1, 10**6),
    ("Eval", "train_rows", 256, 10**8),
    ("Eval", "steps", 1, 10**7),
    ("Eval", "threshold", -1, 1),
    ("Eval", "flag_nprobe", 1, 2**24),
    ("Eval", "threads", 0, 4096),
    *(
        (kind, "seed", 0, 2**63 - 1)
        for kind in ("Train", "BuildIndex", "Dedup", "Demo", "Report", "Audit", "Eval")
    ),
    ("Plan", "rows", 1, 1e13),
    ("Plan", "dim", 2, 65536),
    ("Plan", "duplicates", 0, 0.99),
    ("Plan", "cores", 0, 4096),
    ("Plan", "nodes", 1, 10**5),
    ("Plan", "threshold", -1, 1),
    ("Plan", "recall", 0.5, 1),
    ("Plan", "seed", 0, 2**63 - 1),
]


NO_RANGE = ("margin", "start", "end")


@pytest.mark.parametrize(("kind", "name", "low", "high"), RANGES)
def test_both_ends_are_allowed_and_what_lies_outside_is_refused(kind, name, low, high):
    kind = getattr(config, kind)
    assert getattr(make(kind, **{name: low}), name) == low
    assert getattr(make(kind, **{name: high}), name) == high
    whole = isinstance(low, int) and bare_type(get_type_hints(kind)[name]) is int
    step = 1 if whole else 1e-9
    for wrong in (low - step, high + step * max(1, abs(high))):
        with pytest.raises(UsageError, match=rf"^--{name} must lie between .* and .*, found"):
            make(kind, **{name: wrong})


def test_each_number_has_its_range():
    tested = {(kind, name) for kind, name, _, _ in RANGES}
    for kind, name, _ in (parameter.values for parameter in numbers()):
        assert (kind.__name__, name) in tested or name in NO_RANGE, f"{kind.__name__}.{name}"


@pytest.mark.parametrize(("kind", "name", "type_"), list(numbers()))
def test_no_number_may_be_nan(kind, name, type_):
    if type_ is float:
        with pytest.raises(UsageError, match=f"--{name} must lie between"):
            make(kind, **{name: math.nan})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_choices(kind):
    for field in dataclasses.fields(kind):
        choices = field.metadata.get("choices") or ()
        for choice in choices:
            assert getattr(make(kind, **{field.name: choice}), field.name) == choice
        if choices:
            with pytest.raises(
                UsageError, match=rf"^{setting_name(field)} must be one of .*'nope'"
            ):
                make(kind, **{field.name: "nope"})


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("first", ([], "first")),
        ("random", ([], "random")),
        ("max:width", ([("max", "width")], "first")),
        ("max:a, min:b:c,last", ([("max", "a"), ("min", "b:c")], "last")),
    ],
)
def test_keep_rules(text, rules):
    assert commands.keep_rules(text) == rules


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_are_allowed_and_of_their_own_type(kind):
    made = make(kind)
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = getattr(made, field.name)
        hint = bare_type(hints[field.name])
        assert hint in (int, float, bool, str, Any)
        assert value is None or hint not in (int, float, bool, str) or type(value) is hint
    assert made.as_dict() == {f.name: getattr(made, f.name) for f in dataclasses.fields(kind)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.threads = 3


AMOUNTS = {
    "2GB": 2 * 10**9,
    "500 MB": 5 * 10**8,
    "1.5g": 15 * 10**8,
    "2GiB": 2 * 1024**3,
    "512 mib": 512 * 1024**2,
    "1kb": 1000,
    "4096": 4096,
    "4096b": 4096,
    " 1 T ": 10**12,
}


@pytest.mark.parametrize("text", AMOUNTS)
def test_amounts_of_memory(text):
    assert parse_bytes(text) == AMOUNTS[text]


@pytest.mark.parametrize("text", ["", "GB", "2PB", "-1GB", "0", "1..2GB", "2 G B", "1e9", "nan"])
def test_texts_that_are_no_amount(text):
    with pytest.raises(UsageError, match="expected an amount of memory such as 2GB or 500MB"):
        parse_bytes(text)
    with pytest.raises(UsageError, match="expected an amount of memory"):
        make(config.Dedup, max_memory=text)


def test_a_default_is_shown_in_one_form():
    for options in (config.Dedup, config.Eval, config.Report, config.Filter):
        for field in dataclasses.fields(options):
            text = field.metadata["help"]
            assert "default" not in text, field.name
            assert not text.endswith(f"({usual_value(field)})"), field.name
            if field.default is True:
                assert f"--no{field.name}" in text
                assert usual_value(field) == "on"
    by_name = {field.name: usual_value(field) for field in dataclasses.fields(config.Dedup)}
    assert (by_name["seed"], by_name["threshold"], by_name["grouping"]) == (
        "0",
        "the model's, else .95; OUT's own",
        "star",
    )
    assert (by_name["out"], by_name["overwrite"]) == ("", "")


LOCAL = (
    "out", "out1", "out2", "index", "encoder", "base", "html", "sheet", "judged", "images",
    "prompts", "rates", "export_faiss", "cumulative_sizes", "is_dup", "move", "link", "undo",
)  # fmt: skip
ELSEWHERE = {
    ("Embed", "images"),
    ("Download", "cumulative_sizes"),
    ("Download", "is_dup"),
}  # files or URLs


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_url_where_a_local_path_is_meant(kind):
    for field in dataclasses.fields(kind):
        if field.name not in LOCAL or (kind.__name__, field.name) in ELSEWHERE:
            assert field.metadata.get("path") in (None, "", ANYWHERE)
            continue
        flag = field.name.upper() if field.metadata.get("positional") else f"--{field.name}"
        for url, shown in (
            ("s3://bucket/a", "s3://bucket/a"),
            ("s3://me:hush@bucket/a?token=hush", "s3://bucket/a"),
            (Path("gs://bucket/a"), "gs:/bucket/a"),
            ("FILE:///a/b", "FILE:///a/b"),
        ):
            if field.metadata["path"] == STORED and str(url).startswith("s3://"):
                make(kind, **{field.name: url})
                continue
            said = f"^{flag} {re.escape(shown)}: expected a local path, found a URL; "
            with pytest.raises(UsageError, match=said) as refused:
                make(kind, **{field.name: url})
            assert "hush" not in str(refused.value)
        for path in ("s3/bucket", "a:b", "./s3://b", Path("x/y"), "C:/x"):
            make(kind, **{field.name: path})


def test_a_url_as_a_query_is_vectors_by_its_name_only():
    with pytest.raises(UsageError, match="QUERY is a URL of vectors: fetch the file first"):
        config.Search(query="https://host/a.npy", index="x")
    config.Search(query="https://host/a.npy", index="x", text=True)
    config.Search(query="what is at https://host", index="x")


VALUES = {
    "runner": "ray", "num_tasks": 3, "task_index": 0, "clusters": 5, "epsilon": 0.1,
    "grouping": "star", "keep_fraction": 0.5, "pairs": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "methods"), [(name, methods) for methods, names in config.ONLY_WITH for name in names]
)
def test_a_setting_of_some_methods_is_refused_with_the_others(name, methods):
    given = {"features": "x", name: VALUES.get(name, "y")}
    for method in config.METHODS:
        if method in methods:
            assert config.Dedup(method=method, **given).is_given(name)
        else:
            said = rf"^--{name}( \w+)? goes with --method {' or '.join(methods)}, not {method}$"
            with pytest.raises(UsageError, match=said):
                config.Dedup(method=method, **given)
            assert not config.Dedup(features="x", method=method).is_given(name)


def test_settings_compare_and_print_by_all_their_values():
    one, other = config.Demo(out="q"), config.Demo(out="r")
    assert one != other
    assert one == config.Demo(out="q")
    assert "out='q'" in repr(one)
    given = config.Dedup(features="a", out="x", threshold=0.9)
    assert "threshold=0.9" in repr(given)
    assert given != config.Dedup(features="a", out="x", threshold=0.8)


def test_a_list_where_numbers_by_comma_are_meant_is_wrong_usage():
    with pytest.raises(UsageError, match="--code_bytes must be whole numbers"):
        config.Eval(features="x", out="y", code_bytes=[4, 8])


def test_numbers_of_numpy_are_taken_and_others_refused():
    made = config.Dedup(
        features="x", threshold=np.float32(0.5), k=np.int64(7), recall=np.float64(1)
    )
    assert (made.threshold, made.k, made.recall) == (0.5, 7, 1)
    assert [type(value) for value in (made.threshold, made.k)] == [float, int]
    with pytest.raises(UsageError, match="--k must lie between 1 and 1024, found 0"):
        config.Dedup(features="x", k=np.int64(0))
    for value in ("abc", [0.9]):
        with pytest.raises(UsageError, match="--threshold must be a number, found"):
            config.Dedup(features="x", threshold=value)
