"""Stores, logs, packs and orders: no row is lost or read in half, no example is cut."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramr2.data import Store, order, pack
from gramr2.extras.row_log import RowLog
from gramr2.files import InputError
from gramr2.records import Pair

ROWS = [{"i": i, "text": "é⟦\n" * (i % 7)} for i in range(50)]


def write(path, rows, end=""):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + end, encoding="utf-8"
    )
    return path


def test_a_pipe_is_refused_in_one_line(tmp_path):
    """`cat pairs.jsonl | infer.py --pairs /dev/stdin`: rows are read by their place, which a pipe has not."""
    os.mkfifo(tmp_path / "pipe")
    keep = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(InputError, match="expected a file on disk"):
        Store(tmp_path / "pipe")
    os.close(keep)


def test_store_reads_at_random_what_a_plain_reader_reads(tmp_path):
    """The first time through the file, the second through the index beside it."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    for _ in range(2):
        store = Store(path)
        assert list(store) == ROWS and len(store) == 50
        assert [store[i] for i in (49, 0, 17, -1)] == [ROWS[49], ROWS[0], ROWS[17], ROWS[49]]
        for i in (50, -51):
            with pytest.raises(IndexError):
                store[i]
    assert (tmp_path / "rows.jsonl.idx").stat().st_size == 8 * (4 + 50)


def test_a_stale_or_broken_index_is_not_believed(tmp_path):
    """Offsets into another file would read rows in half."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    Store(path)
    write(path, ROWS[::-1][:20])
    assert list(Store(path)) == ROWS[::-1][:20]
    for junk in (b"", b"abc", b"x" * 80):
        (tmp_path / "rows.jsonl.idx").write_bytes(junk)
        assert len(Store(path)) == 20


def test_blank_lines_and_an_unended_last_line_are_no_loss(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[:2], end='\n  \n{"i": 2}')
    assert list(Store(path)) == [*ROWS[:2], {"i": 2}] and Store(path).torn == 0
    assert list(Store(write(tmp_path / "empty.jsonl", []))) == []


def test_a_torn_last_line_is_dropped_and_said(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", ROWS[:3], end='{"i": 3, "te')
    store = Store(path)
    assert list(store) == ROWS[:3] and store.torn == 12
    assert "torn last line of 12 bytes" in capsys.readouterr().err
    with RowLog(path, b'{"') as log:
        log.write(ROWS[3])
    assert "torn last line of 12 bytes" in capsys.readouterr().err
    assert list(Store(path)) == ROWS[:4] and not capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 2, 30, 70000])
def test_a_log_cut_anywhere_keeps_every_whole_row(tmp_path, cut):
    """A kill leaves a prefix of the file, which may end in the middle of a character or of a long row."""
    path = tmp_path / "rows.jsonl"
    rows = [*ROWS[:5], {"long": "é" * 100000}]
    with RowLog(path, b'{"') as log:
        for row in rows:
            log.write(row)
    os.truncate(path, path.stat().st_size - cut)
    with RowLog(path, b'{"') as log:
        log.write({"after": 1})
    assert list(Store(path)) == (rows if cut == 1 else rows[:5]) + [{"after": 1}]


def test_what_was_written_survives_a_kill(tmp_path):
    """Rows that a process has written are in the file though it never closed it."""
    path, root = tmp_path / "rows.jsonl", Path(__file__).parents[1]
    words = [sys.executable, root / "tests/scripts/write_and_die.py", path]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run(words, env=environment, check=False).returncode == 9
    assert list(Store(path)) == [{"i": 1}]


def test_a_bad_row_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[:1], end="{nonsense\n" + '{"question": "q"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl: row 2 is not JSON"):
        Store(path)[1]
    with pytest.raises(InputError, match=r"rows\.jsonl: row 3: no field .response_a"):
        Store(path, Pair.from_json)[2]
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(InputError, match="row 1 is not UTF-8"):
        Store(path)[0]
    with pytest.raises(InputError, match="absent"):
        Store(tmp_path / "absent.jsonl")


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 200))
def test_packs_hold_every_example_once_and_no_more_than_the_budget(lengths, budget):
    packs = pack(lengths, budget)
    assert Counter(i for one in packs for i in one) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= budget for one in packs)
    assert packs == pack(list(lengths), budget)
    # No two packs could have been one: otherwise packing is worse than the simplest way.
    full = sorted(sum(lengths[i] for i in one) for one in packs)
    assert len(full) < 2 or full[0] + full[1] > budget


def test_an_over_long_example_is_never_cut():
    with pytest.raises(InputError, match="example 1 has 10 tokens"):
        pack([3, 10], 9)


def test_order_is_a_function_of_seed_and_epoch():
    assert sorted(order(100, 0, 0)) == list(range(100))
    assert order(100, 3, 1).tolist() == order(100, 3, 1).tolist()
    assert len({tuple(order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
