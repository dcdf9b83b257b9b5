r"""Pairs of answers that are not the same, and that are: each goes through accuracy_reward, both ways round.

What math-verify alone, or the reward before, took for the same stands first in each group.
"""

import pytest

from lowmem_grpo.rewards import accuracy_reward
from lowmem_grpo.rewards.words import reading

WORDS = [
    ("listen", "silent"), (r"\text{listen}", "silent"), (r"\mathrm{dog}", r"\textbf{god}"), ("Listen", "SILENT"),
    ("dog bites man", "man bites dog"), ("New York", "York New"), ("now here", "nowhere"), ("on", "no"), ("evil", "vile"),
    ("well-known", "known-well"), ("no-one", "on-neo"), ("Newton's law", "law Newton's"), ("Mary", "Army"),
    ("Monday", "dynamo"), ("yes", "no"), ("True", "False"), ("a rat", "a tar"), ("café", "face"), ("Ñandú", "nandu"),
    ("Иван", "Наив"), ("東京", "京東"), ("上", "下"), ("שלום", "םולש"), ("राम", "मरा"), ("سلام", "ملاس"), ("ναι", "ανι"),
    (r"\text{no solution}", r"\text{infinitely many}"), ("Chapter 7, verse 3", "Chapter 3, verse 7"), ("May 5", "yaM 5"),
    (r"3\text{ apples and }4\text{ pears}", r"3\text{ pears and }4\text{ apples}"), ("iv", "vi"), ("DNA", "AND"),
    ("mgh", "hgm"), ("abcd", "dcba"), ("2abcd", "2dcba"), ("b, a", "a, b"),
]  # fmt: skip
OPTIONS = [
    ("AB", "BA"), ("(AB)", "(BA)"), ("A", "B"), ("(A)", "(B)"), (r"\text{(A)}", r"\textbf{(C)}"), ("ABC", "CBA"),
    ("A, B, C", "C, A, B"), ("A, C", "A"), ("A and C", "A or C"), ("AC", "A, D"), ("A) 12", "B) 12"),
    ("A. 12", "C. 12"), ("(A) 12", "12"), ("IV", "VI"), ("II", "-1"), ("A-B-C", "C-B-A"), ("3A", "A3"), ("B12", "12B"), ("abc123", "cab123"),
    (r"\angle ABC", r"\angle CBA"), (r"\triangle ABC", r"\triangle BCA"), (r"\overline{AB}", r"\overline{BA}"),
    ("AB = 5", "BA = 5"), (r"2AB", r"2BA"), (r"\frac{AB}{CD}", r"\frac{BA}{DC}"), ("H_2O", "OH_2"), ("NaCl", "ClNa"),
    ("C_2H_6", "H_6C_2"), ("CO_2", "OC_2"),
]  # fmt: skip
UNITS = [
    ("2t", "2"), ("2ab", "2"), ("x + 2c", "x + 2"), (r"\frac{1}{2}h", r"\frac{1}{2}"), (r"4\sqrt{3}s", r"4\sqrt{3}"),
    (r"2 \pi r h", r"2 \pi r"), (r"\pi r^2 h", r"\pi r^2"), ("5 cm", "5 km"), ("5 m", "5 s"), ("5cm", "5mm"),
    (r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ cm}^2", r"5\text{ cm}^3"), (r"5\text{ cm}^2", r"5\text{ cm}"),
    ("7am", "7pm"), ("7:30 am", "7:30 pm"), ("3 dogs", "3 gods"), ("5 apples", "5 pears"), ("5 apples", "5 cm"), ("12 miles", "12 limes"),
    (r"25^\circ C", r"25^\circ F"), ("5 dollars", "5 euros"), ("18 thousand", "18"), ("2 dozen", "2"),
    ("60 km/h", "60 km"), ("9.8 m/s^2", "9.8 m/s"), (r"9.8\text{ m/s}^2", r"9.8\text{ m/s}"), ("5'10\"", "510"),
    ("lw", r"w \cdot l"), ("V=IR", "W=IR"), (r"\text{no}", r"o \cdot n"), (r"1,\ 200", "1200"),
    (r"3\text{ million}", "3"), (r"x\text{ squared}", "x"), (r"(A)\text{ Paris}", r"A\text{ London}"), ("30s", "30m"),
    (r"\$5", "€5"), (r"\$5", "5 euros"), ("5", "/5"), (r"5\text{-}", "6"), ("540m", r"540\text{ km}"), ("2n", "2"), ("2a", "2"), ("5 mph", r"5\text{ km/h}"), (r"2\pi\text{ cm}", r"2\pi\text{ m}"),
]  # fmt: skip
NEAR = [
    ("2^{-99}", "2^{-98}"), ("1E-20", "2E-20"), ("10^{-20}", r"2 \cdot 10^{-20}"), ("0.00000001", r"\frac{1}{10^9}"),
    (r"\frac{1}{10^{20}}", r"\frac{2}{10^{20}}"), (r"1.6 \times 10^{-19}", r"1.7 \times 10^{-19}"), ("e^{-100}", "e^{-101}"),
    ("2^{-99}", "0"), ("e^{-100}", "0"), (r"\frac{1}{100!}", r"\frac{1}{101!}"), ("10^{-400}", "10^{-401}"),
    (r"\sqrt{2} \cdot 10^{-20}", r"\sqrt{3} \cdot 10^{-20}"), (r"\sin(10^{-20})", r"\sin(2 \cdot 10^{-20})"),
    ("(2^{-99}, 1)", "(2^{-98}, 1)"), ("[0, 2^{-99}]", "[0, 2^{-98}]"), (r"\{2^{-99}, 1\}", r"\{2^{-98}, 1\}"),
    ("2^{-99}, 2^{-98}", "2^{-99}, 2^{-97}"), (r"(10^{-20}, 1) \cup (2, 3)", r"(2 \cdot 10^{-20}, 1) \cup (2, 3)"),
    ("(0.00000001, 2, 3)", "(0.00000002, 2, 3)"), (r"\{0.00000001, 2\}", r"\{0.00000002, 2\}"), (r"\pm 2^{-99}", r"\pm 2^{-98}"),
    (r"\begin{pmatrix} 0.00000001 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 0.00000002 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 2^{-99} \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2^{-98} \\ 2 \end{pmatrix}"),
    ("x = 2^{-99}", "x = 2^{-98}"), ("x < 2^{-99}", "x < 2^{-98}"), ("2^{-99}<x<1", "2^{-98}<x<1"),
    ("2^{-99}x", "2^{-98}x"), ("x^2 + 10^{-20}", "x^2"), ("1 + 2^{-100}", "1 + 2^{-101}"), ("1 - e^{-50}", "1"),
    ("10^{99}+1", "10^{99}"), (r"\sqrt{10^{40}+1}", "10^{20}"), (r"\ln(10^{99}+1)", r"\ln(10^{99})"),
    (r"\frac{10^{99}+1}{10^{99}}", "1"), ("10^{20}+0.5", "10^{20}"), ("(10^{99}+1, 2)", "(10^{99}, 2)"), ("25!", "25!+1"),
    (r"25!+\sqrt{2}", r"25!+\sqrt{3}"), (r"10^{16}+\pi", "10^{16}+e"), ("10^{16}x+x", "10^{16}x"), ("3.1415927", r"\pi"),
    ("100000000000000000001.5", r"\frac{200000000000000000002}{2}"), ("0.1234564", r"\frac{1234559}{10000000}"),
    ("1000000.0000001", r"\frac{2000000}{2}"), (r"\frac{1}{3}", "0.333333"), (r"\frac{1}{2}", "0.5000000001"),
]  # fmt: skip
BASES = [
    ("204_5", "204_6"), ("204_{5}", "204_{6}"), ("204_5", "204"), ("204_5", "204_{10}"), ("1010_{two}", "1010_{three}"),
    (r"1010_{\text{two}}", r"1010_{\text{three}}"), ("(101)_2", "(101)_3"), ("(101)_{2}", "10100"), ("-5_8", "-5_9"),
    ("1.1_2", "1.1_3"), ("A2F_{16}", "2AF_{16}"), ("FF_{16}", "FF_{8}"), ("1A_{16}", "A1_{16}"), ("0x1A", "0xA1"),
    ("5_8 + 3", "5_9 + 3"), (r"\{10_2, 1\}", r"\{10_3, 1\}"), (r"\frac{10_2}{3}", r"\frac{10_3}{3}"),
    (r"204\text{ (base 5)}", r"204\text{ (base 6)}"), ("_5C_2", "_6C_2"), ("x_1", "x_2"), ("a_{12}", "a_{21}"),
    ("x_{ab}", "x_{ba}"), ("x_{i,j}", "x_{j,i}"), (r"\log_2 9", r"\log_3 9"), (r"\log_2 x", r"\log_3 x"),
    (r"\text{Area}_1", r"\text{Area}_2"), ("v_{max}", "v_{min}"), ("C_5^2", "C_6^2"), ("x^1_2", "x^2_1"),
]  # fmt: skip
OTHERS = [  # more of what math-verify drops, or reads a part of
    (r"\text{e}", "2.718281828"), ("R-r", "r-R"),
    (r"\frac{R}{r}", "1"), ("R - r", "r - R"), ("f'(x)", "f(x)"), ("y'", "y''"), ("2:3:4", "1:6:1"), ("12:30", "14:35"),
    ("3/4/2021", "6/8/2021"), ("1, 2, \\ldots, 10", "1, 2, 10"), ("x^2 = -1", "x^2 = -4"), (r"5 \mid 3", "3"),
    (r"1 \to 3", r"2 \to 3"), (r"\frac{1}{3} = \frac{1}{2}", r"\frac{1}{2}"), (r"\frac{x}{y}", r"\frac{y}{x}"), ("x=5", "y=5"),
]  # fmt: skip
RIGHT = [
    ("Listen", r"\text{listen}"), ("listen", r"\textbf{Listen}."), (r"\text{New York}", "new  york"), ("straße", "STRASSE"),
    ("cafe\u0301", "caf\u00e9"), ("A", "(A)"), ("A", r"\text{(A)}"), ("A", r"\textbf{(A)}"), ("A", "a"), ("A", "A."), ("A", "A)"),
    ("A and C", "A, C"), ("A, B, and C", r"A, B \text{ and } C"), ("東京", r"\text{東京}"), ("IV", r"\mathrm{IV}"),
    ("xy", "yx"), ("2ab", "2ba"), ("2xy", "2 x y"), ("3mn", "3nm"), (r"\frac{ab}{c}", r"\frac{ba}{c}"), ("y = mx + b", "y = b + xm"),
    ("x^2 + 2xy + y^2", "(x + y)^2"), (r"\frac{abc}{4R}", r"\frac{bca}{4R}"), (r"\pi r^2 h", r"\pi h r^2"), ("F = ma", "F = am"),
    (r"\frac{1}{2}AB", r"\frac{AB}{2}"), (r"AB \cdot CD", r"CD \cdot AB"), ("AB = 5", "5"), ("e^{ix}", "e^{xi}"),
    ("x", "X"), (r"\text{e}", "e"), (r"3\mathbf{i}", "3i"), (r"\sin x \cos x", r"\cos x \sin x"), ("sqrt(8)", r"2\sqrt{2}"),
    (r"\arctan\frac12", r"\tan^{-1}\frac12"), (r"\gcd(12, 18)", "6"), ("f'(x) = 2x", "2x"), (r"\text{Area} = 12", "12"),
    ("18 cm", "18"), ("18 cm", r"18\text{ centimeters}"), ("18cm", "18.0 cm"), (r"18\text{ cm}^2", r"18\text{ square cm}"),
    (r"\frac{1}{3}\text{ cups}", r"\frac13"), ("60 km/h", r"60\text{ kilometers per hour}"), ("5 m", "5"), (r"90^\circ", "90"),
    (r"90^\circ", "90 degrees"), ("5 dollars", r"\$5"), ("$125$ miles", r"125\textnormal{ miles}"), ("7:30 am", "7:30 AM"),
    (r"\sqrt{10^{-40}}", "10^{-20}"), ("2^{-99}", r"\frac{1}{2^{99}}"), ("1E-20", "10^{-20}"), ("0.0000001", "10^{-7}"),
    (r"\frac{1}{3}", "0.3333333333"), (r"\frac{2}{3}", "0.6666666667"), (r"\sqrt{2}", "1.41421356237"),
    (r"\pi", "3.141592653589793"), (r"1.5\pi", r"\frac{3\pi}{2}"), ("0.1x + 0.2x", "0.3x"), ("0.1 + 0.2", r"\frac{3}{10}"),
    (r"(\sqrt2 + 1)^2", r"3 + 2\sqrt2"), (r"\sqrt{3 + 2\sqrt2}", r"1 + \sqrt2"), ("10^{99} + 1", "1 + 10^{99}"),
    (r"\frac{\sqrt6 + \sqrt2}{4}", r"\cos\frac{\pi}{12}"), (r"(0.5, 2)", r"(\frac12, 2)"), (r"\{2^{-99}, 1\}", r"\{1, \frac{1}{2^{99}}\}"),
    (r"\begin{pmatrix} 0.5 \\ x \end{pmatrix}", r"\begin{bmatrix} \frac12 \\ x \end{bmatrix}"), (r"\frac12", r"50\%"), (r"\log_2 8", "3"),
    ("204_5", "204_{5}"), ("204_5", r"204_{\text{five}}"), ("204_5", r"204\text{ (base 5)}"), ("(101)_2", "101_2"), ("54_{10}", "54"),
    ("t_1 + t_2", "t_2 + t_1"), ("0110", r"\text{0110}"), ("0110", "$0110$"), (r"x = 2 \text{ or } x = 3", "2, 3"), ("11 and 12", "11, 12"),
    (r"\left(-\infty, 2\right]", r"(-\infty,2]"), (r"x \in (0, 1)", "(0,1)"), ("1.5x", r"\frac{3x}{2}"), (r"x \ge 2", r"2 \le x"),
    (r"10,\!080", "10080"), (r"1,\!008", "1008"), (r"1,\!000,\!000", "1000000"), (r"\$1,\!000", "1000"),
    (r"20,\!000\text{ miles}", "20000"), (r"10\,080", "10080"), (r"10\;080", "10080"), (r"10\ 080", "10080"),
    ("10{,}080", "10080"), ("10~080", "10080"), (r"16\pi \text{ cubic inches}", r"16\pi"), (r"12\pi\mbox{ cm}^3", r"12\pi"),
    (r"2\pi \text{ units}", r"2\pi"), (r"\pi\text{ cm}^2", r"\pi"), (r"2\sqrt{3}\pi\text{ in}^3", r"2\sqrt3\pi"),
    (r"3x \text{ dollars}", "3x"), (r"x\text{ cm}", "x"), (r"5!\text{ ways}", "120"), ("540", "540m"), ("30", "30s"),
    ("30", "30g"), ("30", "30h"), ("5", r"5\text{ kg}\cdot\text{m}"), ("5", r"5\text{ m s}^{-1}"), ("5", r"5\,\mathrm{m\,s^{-1}}"),
    (r"25\% \text{ off}", "25"), (r"25\%", r"25\%\text{ of the total}"), ("60 mph", r"60\text{ miles per hour}"),
    ("60 km/h", "60 kph"), (r"5\text{ min}", "5 minutes"), (r"5\text{ sec}", r"5\text{ seconds}"), ("5 min", "5 minutes"),
    (r"12\text{ square units}", r"12\text{ units squared}"), (r"12\text{ square feet}", r"12\text{ ft}^2"), (r"6\text{ ways}", r"6\text{ arrangements}"),
    ("5 apples", "5 pieces"), ("7 red balls", "7 balls"), (r"\approx 42", "42"), (r"\large 42", "42"), (r"\Large 42", "42"), (r"\fbox{42}", "42"),
    (r"\bf 5", "5"), (r"{\bf 5}", "5"), (r"\normalsize 5", "5"), (r"\color{red}5", "5"), (r"{\color{red}5}", "5"),
    (r"\boldsymbol{5}", "5"), (r"\underline{5}", "5"), (r"\textcolor{red}{5}", "5"), ("(05,1)", "(5,1)"), ("x=05", "5"), ("10^{02}", "100"),
    ("ab", r"a\cdot b"), ("lw", r"l \cdot w"), ("IR", r"I\cdot R"), ("nRT", "n R T"), ("nRT", "n*R*T"), ("ab", r"a \times b"),
    ("2h", r"h \cdot 2"), ("2h", "y=2h"), ("30s", r"30\text{ seconds}"),
    (r"\$18.90", r"\$18.90\text{ per day}"), (r"{\bf 5\text{ cm}}", "5"), (r"\mathbf{\frac{3}{4}}", r"\frac34"), ("ab", r"ab\text{ cm}^2"), ("V=IR", "IR"), ("V = IR", r"I \cdot R"), (r"25^\circ", r"25^\circ C"), (r"5\text{ percent}", r"5\%"), ("£5", "5 pounds"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"), (r"PV = nRT", "PV = RnT"), ("p - q", "-q + p"),
]  # fmt: skip
ONE_WAY = {
    (r"x \in (0, 1)", "(0,1)"),  # math-verify reads a set in the answer, where gold is a relation
    ("540", "540m"), ("30", "30s"), ("30", "30g"), ("30", "30h"),  # where gold is 30h, h may be a height
}  # fmt: skip


def rewards(pairs):
    """Of answers in a box, and of the same as gold and answer the other way round."""
    gold, answers = zip(*pairs, strict=True)
    return accuracy_reward([rf"so \boxed{{{answer}}}" for answer in answers], solution=list(gold))


@pytest.mark.parametrize(
    "wrong", [WORDS, OPTIONS, UNITS, NEAR, BASES, OTHERS], ids=["words", "options", "units", "near", "bases", "others"]
)
def test_another_answer_of_the_same_letters_or_nearly_the_same_number_earns_nothing(wrong):
    both_ways = [*wrong, *((b, a) for a, b in wrong)]
    paid = [pair for pair, reward in zip(both_ways, rewards(both_ways), strict=True) if reward != 0]
    assert not paid


def test_the_same_answer_in_another_notation_earns_one():
    both_ways = [*RIGHT, *((b, a) for a, b in RIGHT if (a, b) not in ONE_WAY)]
    lost = [pair for pair, reward in zip(both_ways, rewards(both_ways), strict=True) if reward != 1]
    assert not lost


def test_every_answer_of_the_tables_equals_itself():
    answers = sorted(
        {side for table in (WORDS, OPTIONS, UNITS, NEAR, BASES, OTHERS, RIGHT) for pair in table for side in pair}
    )
    assert rewards([(answer, answer) for answer in answers]) == [1.0] * len(answers)
    spaced = [(answer, f" {answer} ") for answer in answers]
    assert rewards(spaced) == [1.0] * len(answers)


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("0110", "110", 0.0), ("0110", "0110", 1.0), ("007", "7", 0.0), ("(01, 1)", "(1, 1)", 1.0), ("2023-01-02", "2023-1-2", 0.0),
        ("110", "0110", 1.0), ("0.5", ".50", 1.0), ("1,005", "1005", 1.0), ("07:30", "7:30", 0.0), ("#### 0110", "110", 0.0),
    ],
)  # fmt: skip
def test_a_gold_answer_that_begins_with_zero_is_text(gold, answer, reward):
    assert rewards([(gold, answer)]) == [reward]
    assert accuracy_reward([f"#### {answer}", f"<answer>{answer}</answer>"], solution=[gold] * 2) == [reward] * 2


def test_an_answer_is_read_as_words_as_a_formula_or_as_a_number_of_a_unit():
    assert reading(r"\text{New  York}") == ("New York", "new york", None, "")
    assert reading(r"18.5 \text{ cm}^2") == ("18.5 cm^2", "18.5", "18.5", "centimeter2")
    assert reading("2ab + c").value == "2ab + c" and reading("2ab + c").unit == ""
    assert reading(r"\frac{AB}{2}").value == r"\frac{\text{AB}}{2}"


def test_a_sentence_with_one_formula_has_it_for_its_answer():
    sentence = r"<answer>Therefore $x \geq 5$ is the solution.</answer>"
    assert accuracy_reward([sentence] * 3, solution=[r"5 \leq x", r"x \leq 5", "the solution"]) == [1.0, 0.0, 0.0]
    hedged = [r"<answer>It is $x$ or $y$</answer>", r"\boxed{It costs $5 or $6}", r"\boxed{It costs $5 or $6}"]
    assert accuracy_reward(hedged, solution=["y", "5", "6"]) == [0.0] * 3
