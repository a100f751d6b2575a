"""The result of a calculation is read in any form, and only if the text commits to it."""

from __future__ import annotations

import pytest

from xlora_core.training.final_answers import final_answer, same_result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("43", "43"),
        (" -8211*y**4 + 2475*y**2 ", "-8211*y**4+2475*y**2"),
        ("X**9/6 - 3*X**6/2 + C", "x**9/6-3*x**6/2+c"),
        ("12*sqrt(2) + 17", "12*sqrt(2)+17"),
        ("11:08 PM", "11:08pm"),
        ("2, 6379, 166909", "2,6379,166909"),
        ("-7937, 2/7, 2.5", "-7937,2/7,2.5"),
        ("(b)", "b"),
        ("True", "true"),
    ],
)
def test_a_single_expression_is_the_result(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 5", "5"),
        ("$x=5$", "5"),
        ("**5**", "5"),
        ("**x = 5**", "5"),
        ("`5`", "5"),
        (r"\boxed{5}", "5"),
        (r"Hence \(x = \boxed{\frac{35}{3876}}\).", "35/3876"),
        (r"\[ x = 5 \]", "5"),
        ("The answer is **5**.", "5"),
        ("**Answer:** 5", "5"),
        ("The answer is $x = 5$, because y = 3.", "5"),
        ("132*60+45 = 7965", "7965"),
        ("132*60 + 45 = 7920 + 45 = 7965.", "7965"),
        ("So 132*60 + 45 = 7920 + 45 = 7965.", "7965"),
        ("5 m", "5"),
        ("2^3*y", "2**3*y"),
    ],
)
def test_the_form_does_not_matter(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("They have 28 - 12 = 16.\nThe answer is 28", "28"),
        ("First 16.\n#### 1,323", "1,323"),
        ("The answer is $25.", "25"),
        ("The final answer is 35/3876.", "35/3876"),
        ("The answer is 28 stickers.", "28"),
        ("The answer is 5. Check: 2 + 2 = 4.", "5"),
        ("The answer is approximately 5 a day.", "5"),
        ("The answer is 5, I think.", "5"),
        ("The answer is that Tom has 94 meters.", "94"),
        ("The answer is 2 + 3 = 5.", "5"),
        ("The answer is 2*x + 1.", "2*x+1"),
        ("The answer is 3.5 - x", "3.5-x"),
        ("The answer is 5, 22/5, 2/7, z.", "5,22/5,2/7,z"),
        ("The answer is no.", "false"),
        ("#### 384\nThe answer is: 384", "384"),
        ("Yes, 10206 is a multiple of 7.", "true"),
        ("10206 is a multiple of 7.", "true"),
        ("56 is not a factor of 2279588.", "false"),
        ("To solve it, subtract 95.\nSo e = 43.", "43"),
        ("The derivative is -890280*n.", "-890280*n"),
        ("Sorted, these are 5, 22/5, 2/7, z.", "5,22/5,2/7,z"),
        ("The probability is 1/21, I think.", "1/21"),
        ("It falls by −7", "-7"),
        ("50 meters - 264 meters = 24 meters.", "24"),
    ],
)
def test_a_text_ends_in_its_result(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know.",
        "The answer is 5 or 6.",
        "The answer is between 5 and 7.",
        "The answer is not 5.",
        "The answer is less than 5.",
        "The answer is 5 times 3.",
        "The answer is 5 million.",
        "The answer is 5 and 7.",
        "It may be 5 or 6.",
        "The result is not 5.",
        "Now add 3 + 4",
        "We raise it to x**2",
        "2 + 3 =",
        "x = 5, y = 7",
        "x = 5\ny = 7",
        "So x = 5, y = 7.",
    ],
)
def test_a_text_that_does_not_commit_itself_has_no_result(text: str) -> None:
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("value", "reference", "same"),
    [
        ("0.5", "1/2", True),
        ("16.0", "16", True),
        ("1,323", "1323", True),
        ("25%", "25", True),
        ("-4/3", "4/3", False),
        ("1/0", "1", False),
        ("b", "b", True),
        ("2*x", "x*2", False),
    ],
)
def test_results_are_compared_as_numbers_or_as_text(value: str, reference: str, same: bool) -> None:
    assert same_result(value, reference) is same
