"""The VQA accuracy: normalisation of answers and agreement with ten people (Antol et al., ICCV 2015).

Both follow the evaluation code that goes with the data set to the letter, what looks odd in it included: a text with a
comma between digits loses all its punctuation instead of having it replaced by spaces, periods go unless a digit
follows, and answers are compared as they are where all people said the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # as many as the original removes: it passes a flag where the count stands
_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}
# Contractions whose spelling without the apostrophe is mended, and those where either of two may be missing.
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've y'all'd've"""


def _without_one(word: str) -> list[str]:
    """A word without each of its apostrophes in turn."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONE.split()},
    **{short: word for word in _TWO.split() for short in _without_one(word)},
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    "somebody'd": "somebodyd",
}


def normalise_answer(text: str) -> str:
    """An answer without case, punctuation and articles, numbers as digits, contractions with their apostrophes."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original, glue = text, _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_space or glue else " ")
    text = _PERIOD.sub("", text, _PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """Mean over people of min(number of *other* people who gave the answer / 3, 1); texts are compared as they are.

    One person alone is agreed with or not.
    """
    same = sum(other == answer for other in people)
    if len(people) == 1:
        return float(same)
    # Leaving out one of the `same` leaves same - 1; leaving out another leaves all of them.
    left, kept = min((same - 1) / 3, 1.0), min(same / 3, 1.0)
    return (same * left + (len(people) - same) * kept) / len(people)


def official_accuracy(answer: str, people: Sequence[str]) -> float:
    """Accuracy of an answer as the data set's own code has it: texts are normalised only if people differ."""
    people = [person.replace("\n", " ").replace("\t", " ").strip() for person in people]
    if len(set(people)) == 1:
        return agreement(answer.replace("\n", " ").replace("\t", " ").strip(), people)
    return normalised_accuracy(answer, people)


def normalised_accuracy(answer: str, people: Sequence[str]) -> float:
    """Accuracy with texts always normalised, as published figures of IDEFICS and Flamingo-like models have it."""
    return agreement(normalise_answer(answer), [normalise_answer(person) for person in people])
