"""No known secret is left in what the daemon itself writes."""

from hypothesis import given
from hypothesis import strategies as st

from dbtstream.scrub import REPLACEMENT, Scrubber


def test_every_occurrence_of_every_value_is_replaced() -> None:
    scrubber = Scrubber(["hunter2", "s3cret"])
    text = scrubber.text("hunter2 and s3cret, and hunter2s3cret again")
    assert text == "***** and *****, and ********** again"


def test_a_secret_that_contains_another_leaves_no_rest_of_itself() -> None:
    """The longest first, in whatever order they were given."""
    for values in (["key", "key-of-the-safe"], ["key-of-the-safe", "key"]):
        assert Scrubber(values).text("it is key-of-the-safe or key") == "it is ***** or *****"


def test_blank_values_are_no_secrets() -> None:
    """dbt's rule: an empty variable would otherwise put stars between all characters."""
    assert Scrubber(["", " ", "\n"]).text("a b\nc") == "a b\nc"


def test_text_without_secrets_stays_as_it_is() -> None:
    assert Scrubber().text("dbt build") == "dbt build"
    assert Scrubber(["x1"]).words(["build", "--select", "orders"]) == [
        "build",
        "--select",
        "orders",
    ]


def test_special_characters_are_meant_literally() -> None:
    assert Scrubber([r"a.c\d(", "é\nü"]).text(r"a.c\d( abc1 é" + "\nü") == "***** abc1 *****"


def test_each_word_is_scrubbed() -> None:
    assert Scrubber(["pw"]).words(["--vars", "{a: pw}"]) == ["--vars", "{a: *****}"]


def test_an_environment_gives_dbts_own_secrets_and_those_that_are_named() -> None:
    environment = {
        "DBT_ENV_SECRET_TOKEN": "tok-1",
        "DBT_TOKEN": "tok-2",
        "PASSWORD": "pass-3",
        "USER": "ada",
    }
    scrubber = Scrubber.for_environment(environment, ["PASSWORD", "NOT_SET"])
    assert scrubber.text("tok-1 tok-2 pass-3 ada") == "***** tok-2 ***** ada"


@given(
    st.lists(st.text(st.sampled_from("abc "), min_size=1, max_size=6), max_size=5),
    st.text(st.sampled_from("abc "), max_size=40),
)
def test_no_secret_is_ever_left(values: list[str], text: str) -> None:
    scrubbed = Scrubber(values).text(text)
    assert not any(value.strip() and value in scrubbed for value in values), REPLACEMENT
