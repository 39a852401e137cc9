"""What is typed arrives as typed, whatever signs and scripts it is written in."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from interloom.train.commands.override_quoting import quote_paths, quote_words


def value(argument: str) -> object:
    """What Hydra makes of an argument."""
    return OverridesParser.create().parse_override(argument).value()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1))
def test_any_path(path: str) -> None:
    if path == "null" or path[0] in "'\"" or "${" in path:
        return
    (argument,) = quote_paths([f"checkpoint={path}"])
    assert value(argument) == path
    assert quote_words(quote_paths([argument])) == [argument]


@settings(deadline=None)
@given(st.lists(st.text("abcéß犬ю()&;!#=<>~/.-_ ", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_lists_and_mappings(words: list[str]) -> None:
    words = [f"d/{word}" for word in words]
    (as_list,) = quote_words([f"data.train=[{','.join(words)}]"])
    (as_mapping,) = quote_words([f"++data.sources={{mine: [{', '.join(words)}]}}"])
    assert value(as_list) == words
    assert value(as_mapping) == {"mine": words}


def test_what_hydra_reads_is_left_to_it() -> None:
    typed = [
        "a=1,2",
        "a=glob(*)",
        "a=[1,{b: c}]",
        "~a",
        "a=${b}",
        "--cfg",
        "a=s3://bucket/key",
        "a=[1",
        "checkpoint=",
    ]
    assert quote_words(typed) == typed
    assert quote_paths(["-m", "checkpoint=a,b"]) == ["-m", "checkpoint=a,b"]
