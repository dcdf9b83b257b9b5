"""What is printed fits the terminal: at every width all is there, and in a file no line is broken."""

import contextlib
import pty
import sys
import termios

import pytest
from rich.cells import cell_len

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.terminal import columns_of, fitted, flowed, show, table

NAMES = ["base", "a-long-name-of-a-phase", "世界世界世界世界世界"]
HEADER = ["after", "from", "accuracy", "language_consistency_reward"]
ROWS = [[name, "base", "0.386 [0.318, 0.460]", f"0.{place}"] for place, name in enumerate(NAMES)]


def in_a_terminal(columns, do):
    """What a function writes to a terminal of so many columns, as standard output."""
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8") as screen, pytest.MonkeyPatch.context() as patch:
        termios.tcsetwinsize(writer, (40, columns))
        patch.setattr(sys, "stdout", screen)
        do()
    with open(reader, "rb", buffering=0) as written:
        parts = []
        with contextlib.suppress(OSError):  # the end
            while part := written.read(4096):
                parts.append(part)
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160, None])
def test_a_table_has_every_cell_at_every_width_and_no_line_is_wider(width):
    text = table(HEADER, ROWS, width, left=("from",))
    assert all(cell_len(line) <= (width or 1000) for line in text.split("\n"))
    words = text.split()
    assert all(words.count(one) == 1 for one in ("0.0", "0.1", "0.2", "language_consistency_reward"))
    assert text.count("0.386 [0.318, 0.460]") == 3 and all(text.count(name) >= 1 for name in NAMES)


def test_columns_without_room_come_below_with_the_names_again():
    header, rows = ["", "one", "two"], [["a", "1.0", "12.5"], ["bb", "-1.0", ""]]
    assert table(header, rows, None) == "     one   two\na    1.0  12.5\nbb  -1.0"
    assert table(header, rows, 8) == "     one\na    1.0\nbb  -1.0\n\n     two\na   12.5\nbb"


def test_a_name_without_room_beside_its_cells_has_a_line_of_its_own():
    rows = [["a_metric_of_a_long_name", "0.5"], ["short", "0.25"]]
    assert (
        table(["", "x"], rows, 24)
        == "                       x\na_metric_of_a_long_name\n                     0.5\nshort               0.25"
    )


def test_a_long_line_goes_on_further_in_and_a_path_stays_whole():
    path = "/a/path/of/many/folders/that/can/be/copied"
    assert fitted(f"  reward: one two three\n{path}", 14) == f"  reward: one\n      two\n      three\n{path}"
    assert fitted("日本 語で書 文章", 10) == "日本\n    語で書\n    文章", "a sign may take two columns"
    assert fitted("x " * 500, None) == "x " * 500
    assert list(flowed(["step 1/3", "  reward 0.5", "  peak 3 MiB"], 22, "  ")) == [
        "step 1/3  reward 0.5",
        "  peak 3 MiB",
    ]


def test_a_terminal_is_measured_and_a_file_is_not(tmp_path, capsys):
    line = "no option is silently ignored, and no line is broken in a file"
    assert (
        in_a_terminal(30, lambda: show(line))
        == "no option is silently ignored,\n    and no line is broken in a\n    file\n"
    )
    assert in_a_terminal(0, lambda: print(columns_of(sys.stdout))) == "80\n", "a terminal that does not say"
    show(f"{line}\x1b[2J")
    assert capsys.readouterr().out == f"{line}\\x1b[2J\n"
    with open(tmp_path / "file", "w") as file:
        assert columns_of(file) is None
    assert columns_of(file) is None, "of a file that is closed"


def test_a_table_of_a_benchmark_is_markdown_where_it_fits():
    text = measure.markdown_table(["way", "CPU ms", "peak"], [["ours", "1.25 (1.20 to 1.30)", "7"], ["TRL", "", "8"]])
    assert in_a_terminal(60, lambda: measure.show(text)) == f"{text}\n\n"
    narrow = "way                CPU ms\nours  1.25 (1.20 to 1.30)\nTRL\n\nway   peak\nours     7\nTRL      8\n\n"
    assert in_a_terminal(26, lambda: measure.show(text)) == narrow
