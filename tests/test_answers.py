"""accuracy_reward on answers.py's table of equal and unequal answers, and on marks, numbers and other people's tests."""

import random
import re
import time

import pytest
from answers import ANSWERS
from more_answers import MORE_ANSWERS

from lowmem_grpo.rewards import accuracy_reward
from lowmem_grpo.rewards.compare import compare
from lowmem_grpo.rewards.final_answer import extract_answer

MORE = {f"more {family}": table for family, table in MORE_ANSWERS.items()}
SIGNS = {"<=>": (1.0, True), "<!>": (0.0, True), "=>": (1.0, False), "!>": (0.0, False)}


def rows(family):
    """(gold, answer, reward) of a family, symmetric pairs both ways round."""
    found = []
    for line in filter(None, map(str.strip, (ANSWERS | MORE)[family].splitlines())):
        left, sign, right = re.split(r" (<=>|<!>|=>|!>) ", line)
        reward, symmetric = SIGNS[sign]
        found.append((left, right, reward))
        if symmetric:
            found.append((right, left, reward))
    return found


def rewards(pairs):
    gold, answers = zip(*pairs, strict=True)
    return accuracy_reward([rf"so \boxed{{{answer}}}" for answer in answers], solution=list(gold))


@pytest.mark.parametrize("family", [*ANSWERS, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def test_equal_answers_earn_one_and_unequal_ones_nothing(family):
    table = rows(family)
    got = rewards([row[:2] for row in table])
    assert [(*row, reward) for row, reward in zip(table, got, strict=True) if reward != row[2]] == []


def test_the_table_has_three_hundred_pairs_and_every_side_equals_itself():
    assert sum(len(text.strip().splitlines()) for text in ANSWERS.values()) >= 300
    sides = sorted({side for family in ANSWERS for row in rows(family) for side in row[:2]})
    assert [side for side, reward in zip(sides, rewards([(s, s) for s in sides]), strict=True) if reward != 1.0] == []


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$.", 1.0), ("2", r"The answer is $\frac{1}{2}$.", 0.0),
        (r"\frac{1}{2}", r"The answer is \frac{1}{2}.", 1.0), ("2", r"The answer is \frac{1}{2}", 0.0),
        (r"\frac{1}{2}", r"It is \(\frac{1}{2}\).", 1.0), (r"\frac{1}{2}", "So\n\\[\n x = \\frac{1}{2}\n\\]", 1.0),
        (r"2\sqrt{3}", r"Hence $2\sqrt{3}$ it is", 1.0), ("3", r"Hence $2\sqrt{3}$ it is", 0.0),
        ("10", r"we get $2^{10}$", 0.0), ("2", "so it is x_2", 0.0), ("1024", "we get 2^{10}", 1.0), ("10", "2^10", 0.0),
        ("5", "Therefore $x > 5$.", 0.0), (r"x \geq 5", "Therefore $x >= 5$ is the solution.", 1.0), ("5", "x > 5", 0.0),
        ("25", "The area is 25π.", 0.0), (r"25\pi", "The area is 25π.", 1.0), ("6", "It is 5 / 6.", 0.0),
        ("5/6", "It is 5 / 6.", 1.0), ("2", "1÷2", 0.0), ("4", "It is 3 * 4", 0.0), ("12", "It is 3 * 4", 0.0),
        ("3", "The line is y = 2x + 3", 0.0), ("2x+3", "The line is y = 2x + 3.", 1.0), ("5", "It is 5x.", 0.0),
        ("3", "The point is (2, 3).", 0.0), ("(2,3)", "The point is (2, 3).", 1.0), ("5", "it is 5i", 0.0),
        ("5", "It is 3:5", 0.0), ("45", "at 3:45 PM", 0.0), ("5", "on 2024-01-05", 0.0), ("12", "It is 12_8.", 0.0),
        ("10", "it is 2**10", 0.0), ("18", "**Total of 3** 18", 1.0), ("18", "10 + 8 = 18 (dollars)", 1.0),
        ("3", "So x >= 3", 0.0), ("3", "So x != 3.", 0.0), ("3", "So $x+y=3$", 0.0), ("3", "#### x >= 3", 0.0),
        ("3", "<answer>x <= 3</answer>", 0.0), ("3", "#### Total cost = 3", 1.0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"It is $\begin{bmatrix}1\\2\end{bmatrix}$.", 1.0),
        ("3, 4", "The roots are $3$ and $4$.", 1.0), ("4", "The roots are $3$ and $4$.", 0.0),
        ("28", r"a loss of $28$ %", 1.0), ("0.5", "it is 50%", 1.0), ("3.5", "It takes 3 1/2 cups.", 1.0), ("3.5", "3½", 1.0),
        ("1500", "about 1.5e3 of them", 1.0), ("1500", "about 1.5 x 10^3 of them", 1.0), ("1000", "it is 10^3", 1.0),
        ("2.74", "It costs 2,74 $ a piece", 1.0), ("1000", "so it is 1 000", 1.0), ("100000", "it is ₹1,00,000", 1.0),
        ("2", "AZYUK2A", 0.0), ("18", "答案是18。", 1.0), ("18", "so it is \\$18/day", 1.0), ("18", '{"answer": 18}', 1.0),
        ("18", "=> 18", 1.0), ("18", "9 + 9 = 18", 1.0), ("18", "<b>18</b>", 1.0), ("6", "He pays $5 and $6.", 1.0), ("35", "$10 + $5 + $20 = $35 in all", 1.0), ("648", "324 x 2 = $ 648", 1.0),
        ("1/2", r"so \(x = \frac{1}{2", 0.0), ("2", r"so \(x = \frac{1}{2", 0.0), ("9", "It is $ \n 9 \n $", 0.0),
        ("1, 2", r"$\boxed{1}$ and $\boxed{2}$", 1.0), ("2", r"$\boxed{1}$ or $\boxed{2}$", 0.0),
        ("2", r"first \boxed{1}, so finally \boxed{2}", 1.0), ("2", "\\boxed{2}\n\nSo: \\boxed{2}", 1.0),
        ("1, 2", r"\boxed{1} papers and \boxed{2} bins", 1.0), ("2", r"\boxed{1}. The next is \boxed{2}", 1.0),
        ("5", r"a) \boxed{4}. Final Answer: The final answer is $5$. I hope it is correct.", 1.0),
        ("5", r"The final answer is $4$, no, \boxed{5}", 1.0), ("5", r"\boxed{\boxed{5}}", 1.0),
        ("4", r"\boxed{never closed 3, then \boxed{4}", 1.0), ("18", "makes $<<9*2=18>>18 every day", 1.0),
        ("12", "gets $<<3*2=6>>6 and then $<<6*2=12>>12.", 1.0), ("18", r"we set \( x. " + "so " * 99 + "it is 18", 1.0),
        (r"\frac{1}{2}", r"<answer>The answer is \frac{1}{2}</answer>", 1.0), ("C", r"\boxed{Option C}", 1.0),
        ("5", "less than 5", 0.0), ("5", "It is double 5.", 0.0), ("5", "5 below zero", 0.0), ("5", "half of 5", 0.0),
        ("5", "So $5 million.", 1.0), ("5", "It is 5!", 1.0), ("5", "He is 5 times as fast, so he wins.", 1.0),
        ("Paris", "<answer>The answer is Paris.</answer>", 1.0), ("Paris", "<answer>The answer is Rome.</answer>", 0.0),
        ("5", "It is 3 or 5.", 0.0), ("5", "It is between 3 and 5.", 0.0), ("5", "It is 3-5.", 0.0), ("5", "3 to 5", 0.0),
        ("5", "It is - 5.", 0.0), ("-5", "It is - 5.", 1.0), ("-5", "It is –5.", 1.0), ("-5", "It is -(-5).", 0.0), ("5", "It is -(-5).", 1.0), ("5", "- 5 apples", 1.0),
        ("5", "It is ln(5).", 0.0), ("5", "It is log 5.", 0.0), ("5", "It is 5 pi.", 0.0), ("5", "It is the 5th.", 0.0),
        ("5", "So 5 < x.", 0.0), ("5", "in release 2.5.5", 0.0), ("5", "up to 5", 0.0), ("5", "It can't be 5.", 0.0),
        ("5", "It is not equal to 5.", 0.0), ("5", "答案不是5。", 0.0), ("5", "Es sind mehr als 5.", 0.0),
        ("5", "Son más de 5.", 0.0), ("5", r"so \boxed{5", 0.0), ("5", "5 and a half", 0.0), ("5", "Son 5 manzanas.", 1.0),
        (r"\frac12", r"It is 3 \frac{1}{2}.", 0.0), (r"2\sqrt{3}", "It is 2*sqrt(3).", 1.0), ("$5", "It costs €5.", 0.0),
        ("5 km", "It is 5 km².", 0.0), ("5 km", "It is 5 square km.", 0.0), ("5 km²", "It is 5 square km.", 1.0),
    ],
)  # fmt: skip
def test_without_a_box_the_whole_formula_that_holds_the_last_number_is_the_answer(gold, text, reward):
    assert accuracy_reward([text], solution=[gold]) == [reward]


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        (1e-05, "0.00001", 1.0), (0.1 + 0.2, "0.3", 1.0), (1500.0, r"1.5 \times 10^3", 1.0), (10 / 3, r"\frac{10}{3}", 1.0),
        (1e22, "10^{22}", 1.0), (72, "72.0", 1.0), (0.5, r"\frac12", 1.0), (0.5, "5", 0.0), (float("nan"), "5", None),
    ],
)  # fmt: skip
def test_a_gold_answer_may_be_a_number(gold, answer, reward):
    assert accuracy_reward([rf"\boxed{{{answer}}}"], answer=[gold]) == [reward]


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("forty two", r"\boxed{42}", None), ("Answer is forty two.", "Answer is forty two.", None), ("Seven", "7", None),
        ("forty two", r"\boxed{forty two}", 1.0), ("forty two", r"\boxed{forty three}", 0.0), ("Paris", "42", 0.0),
        ("One Hundred Years of Solitude", r"\boxed{100}", 0.0), ("a and b", r"\boxed{a and b}", 1.0),
    ],
)  # fmt: skip
def test_a_gold_number_in_words_is_not_compared_with_digits(gold, text, reward):
    assert accuracy_reward([text], solution=[gold]) == [reward]


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("5 cm", "it is 5 cm.", 1.0), ("5 cm", "it is 50 mm.", 1.0), ("5 cm", "it is 5 km.", 0.0), ("5 cm", "it is 5.", 1.0),
        ("5 cm", "it is 5 in the end", 1.0), ("5 cm^2", "so 5 cm^2", 1.0), ("5 cm^2", "so 5 cm^3", 0.0), ("5", "5 cm^2", 1.0),
        ("5 m/s", "so 5 m/s.", 1.0), ("5 m/s", "so 5 km/h.", 0.0), ("25°C", "it is 25°F", 0.0), ("5 MPa", "5 mPa", 0.0),
        ("50%", "it is 50 cm", 0.0), ("50%", "it is 50", 1.0), ("$18", "18 cents", 0.0), ("$18", "it is $18 a day", 1.0),
        ("€5", "it is $5", 0.0), ("€5", "it is €5", 1.0), ("7 PM", "at 7 AM", 0.0), ("7:30 PM", "at 7:30 PM", 1.0),
        ("7:30 PM", "at 7:30 AM", 0.0),
        ("$5", "It costs 5 Canadian dollars.", 0.0), ("$5", "It is 5 US dollars.", 1.0), ("$5", "It is 5¢.", 0.0),
        ("5¢", "It is 5¢.", 1.0), ("$5", "It is 5 pesos.", 0.0), ("5 Mexican pesos", "It is 5 pesos.", 1.0),
        ("5000000", "It is 5 million.", 1.0), ("5", "It is 5 million.", 1.0), ("5 million", "It is 5.", 0.0),
        ("5000000", "Es sind 5 Millionen.", 1.0), ("50000", "一共有5万元。", 1.0),
    ],
)  # fmt: skip
def test_without_a_box_a_known_unit_behind_the_last_number_is_compared(gold, text, reward):
    assert accuracy_reward([text], solution=[gold]) == [reward]


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("B", "The answer is (B).", 1.0), ("B", "So the correct answer is **B**.", 1.0), ("B", "**Answer:** (B)", 1.0),
        ("B", "Therefore, option (B) is correct.", 1.0), ("B", "The correct option is B) 12 cm", 1.0), ("B", "(B)", 1.0),
        ("B", "Answer: A. No wait, Answer: B", 1.0), ("A", "Answer: A. No wait, Answer: B", 0.0), ("B", "答案是B。", 1.0),
        ("B", "The answer is B because A is too small (only 3).", 1.0), ("B", "The answer is B, not C.", 1.0),
        ("B", "The answer is not (B).", 0.0), ("B", "The answer isn't B.", 0.0), ("B", "The answer is A or B.", 0.0),
        ("B", "The answer is B if x > 0.", 0.0), ("B", "The answer is Bob.", 0.0), ("A", "The answer is a circle.", 0.0),
        ("B", "Option B gives 5. So the answer is A.", 0.0), ("B", "I think that A and B are plausible.", 0.0),
        ("B", "If the answer is B, then 3 = 4. So the answer is C.", 0.0), ("A, C", "The answers are A and C.", 1.0),
        ("A", "The answer is A and C.", 0.0), ("B. Paris", "The answer is B.", 1.0), ("Yes", "The answer is yes.", 1.0),
        ("Yes", "The answer is no.", 0.0), ("Paris", "It is not Rome, the answer is Paris!", 1.0), ("Paris", "Paris", 1.0),
        ("x", "The answer is x.", 1.0), ("1, 2", "The solutions are 1 and 2.", 1.0), ("18", "The answer is B.", 0.0),
        ("yes", "Yes, it is.", 1.0), ("no", "Yes, it is not no.", 0.0), ("No", "No, they are not.", 1.0),
        ("B", "It's B.", 1.0), ("B", "It is not B.", 0.0), ("True", "It is true.", 1.0),
        ("May 5, 2020", "May 5, 2020", 1.0), ("May 5, 2020", "5 May 2020", 1.0), ("May 5, 2020", "June 5, 2020", 0.0),
        ("2h 30m", "2 hours and 30 minutes", 1.0), ("2h 30m", "2 hours and 40 minutes", 0.0),
        ("204_5", "204 (base 5)", 1.0), ("204_5", "204 (base 6)", 0.0), (r"\frac{1}{3}", "0.333...", 1.0),
        ("Dr. Who", "Dr. Who", 1.0), ("a; b", "a; b", 1.0),
        (r"x \ge 3", "So x is at least 3.", 1.0), ("3", "So x is at least 3.", 0.0), ("5", "Es sind 1,5.", 0.0),
    ],
)  # fmt: skip
def test_without_a_box_what_the_answer_is_said_to_be_counts_where_gold_is_no_number(gold, text, reward):
    assert accuracy_reward([text], solution=[gold]) == [reward]


GSM8K_STYLES = (
    "so it is\n#### {}", "so it is \\boxed{{{}}}.", "<answer>{}</answer>", "the answer is {}.", "<answer>{} dollars</answer>",
)  # fmt: skip


@pytest.mark.parametrize("opening", [r"\(", r"\[", "$x$", "$$", "5'", "1:", "[1,", "x^", "$5 ", "√("])
def test_a_hundred_thousand_characters_are_read_in_linear_time(opening):
    seconds = []
    for size in (25_000, 100_000):
        start = time.process_time()
        accuracy_reward([(opening * size)[:size]], solution=["5 km"])
        seconds.append(time.process_time() - start)
    assert seconds[1] < max(8 * seconds[0], 1.0)  # a busy machine doubles what is measured


def test_whatever_a_completion_is_made_of_reading_it_raises_nothing():
    atoms = [
        *"{}[]()$%^_\\&<>=!,;'\"\0\x02\n1½²万é",
        "\\boxed{",
        "\\frac",
        "\\cup",
        "\\{",
        "\\begin{cases}",
        "####",
        "<answer>",
    ]
    atoms += [
        "The answer is ",
        "at least ",
        "5 million",
        "mod 7",
        "[[1,2],",
        "1e99999",
        "\ud800",
        "٣",
        "$5",
        "7:30 PM",
        "°",
    ]
    numbers = random.Random(0)
    for gold in ("5", "B", "(1, 2)", r"x \ge 3", "18 cm", r"\pi/2", "7:30 PM", r"\begin{pmatrix}1\end{pmatrix}", "\0"):
        for _ in range(60):
            text = "".join(numbers.choices(atoms, k=numbers.randint(0, 20)))
            answer = extract_answer(text, gold)
            assert answer is None or compare(gold, answer) in (True, False) or compare(answer, gold) is not None


def test_five_thousand_wrong_answers_of_gsm8ks_kind_earn_nothing(gsm8k):
    """Digits changed, signs flipped, and the words of the reasoning in another order."""
    numbers = random.Random(0)
    completions, golds = [], []
    for index in range(5000):
        reasoning, gold = gsm8k[index % len(gsm8k)].rsplit("####", 1)
        number = gold.strip().replace(",", "")
        place = numbers.choice([place for place, digit in enumerate(number) if digit.isdigit()])
        digit = numbers.choice([digit for digit in "123456789" if digit != number[place]])
        wrong = number[:place] + digit + number[place + 1 :]
        if index % 3 == 0 and float(number) != 0:
            wrong = number.removeprefix("-") if number.startswith("-") else f"-{number}"
        words = reasoning.split()
        numbers.shuffle(words)
        completions.append(" ".join(words) + "\n" + GSM8K_STYLES[index % len(GSM8K_STYLES)].format(wrong))
        golds.append(f"{reasoning}####{gold}")
    assert accuracy_reward(completions, solution=golds) == [0.0] * 5000
