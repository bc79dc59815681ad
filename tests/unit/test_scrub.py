"""No known secret is left in what the daemon itself writes."""

import json

import pytest
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


class TestFiles:
    @pytest.mark.parametrize(
        "secret",
        [
            *(
                "k3y",
                'k3y"k3y',
                "k3y'k3y",
                "k3y\\k3y",
                "k3y\nk3y",
                "ük3yï",
                "k3y'\"k3y",
                "\tk3y'k3y",
            ),
        ],
    )
    def test_hold_no_secret_however_json_and_python_write_it(self, secret: str) -> None:
        command = f"--vars {json.dumps({'token': secret})}"
        written = [
            f"plain {secret} in a log",
            json.dumps({"vars": {"token": secret}}),
            json.dumps({"vars": {"token": secret}}, ensure_ascii=False),
            json.dumps({"invocation_command": command}),
            repr({"token": secret}),
            repr(f"'{secret}\""),
            f"flags: {{'invocation_command': {command!r}}}",
            json.dumps({"msg": f"flags: {{'invocation_command': {command!r}}}"}),
        ]
        for text in written:
            scrubbed = Scrubber([secret]).data(text.encode()).decode()
            assert "k3y" not in scrubbed
            assert scrubbed.count(REPLACEMENT) == 1

    def test_of_json_stay_json(self) -> None:
        document = {"args": {"vars": {"token": 'a"b'}}, "n": 1, "messages": ['say "a"b"!']}
        scrubbed = json.loads(Scrubber(['a"b']).data(json.dumps(document).encode()))
        assert scrubbed == {
            "args": {"vars": {"token": "*****"}},
            "n": 1,
            "messages": ['say "*****"!'],
        }

    def test_where_secrets_overlap_hold_nothing_of_either(self) -> None:
        assert Scrubber(["abcd", "cdef"]).data(b"xabcdefx") == b"x*****x"
        assert Scrubber(["aa"]).data(b"xaaax") == b"x*****x"
        assert Scrubber(["ab", "cd"]).data(b"abcd") == b"**********"

    @given(
        st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=4),
        st.lists(st.text(st.sampled_from("abc"), max_size=7), max_size=6),
    )
    def test_come_out_the_same_however_they_are_cut_into_pieces(
        self, secrets: list[str], pieces: list[str]
    ) -> None:
        scrubber = Scrubber(secrets)
        stream = scrubber.stream()
        out = b"".join(stream.feed(piece.encode()) for piece in pieces) + stream.end()
        whole = "".join(pieces)
        assert out == scrubber.data(whole.encode())
        covered = {
            at + offset
            for secret in set(secrets)
            for at in range(len(whole))
            if whole.startswith(secret, at)
            for offset in range(len(secret))
        }
        kept = "".join(letter for at, letter in enumerate(whole) if at not in covered)
        assert out.decode().replace("*", "") == kept

    def test_without_secrets_pass_as_they_are_and_at_once(self) -> None:
        assert Scrubber([" "]).stream().feed(b"text") == b"text"
