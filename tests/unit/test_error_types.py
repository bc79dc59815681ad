"""`error.type` is one word of a closed list, whatever dbt raised."""

import pytest

from dbtstream import frames
from dbtstream.error_types import ErrorType, error_type_of, error_type_of_block
from dbtstream.event_base import ErrorBlock
from dbtstream.statuses import Reason
from tests.stories import Story, node

ORDERS = "model.shop.orders"


@pytest.mark.parametrize(
    ("class_", "message", "word"),
    [
        ("DbtDatabaseError", "Database Error in model x\n  no", "database_error"),
        ("Database Error", "what follows is of the warehouse", "database_error"),
        ("UndefinedMacroError", "Compilation Error\n  'x' is undefined", "compilation_error"),
        ("CompilationError", "", "compilation_error"),
        ("YamlParseDictError", "Parsing Error\n  Invalid models config", "parsing_error"),
        ("DbtRuntimeError", "Runtime Error\n  no", "runtime_error"),
        ("DbtProjectError", "Runtime Error\n  no dbt_project.yml", "runtime_error"),
        ("DbtProjectError", "no dbt_project.yml", "config_error"),
        ("HandshakeTimeout", "dbt's process said nothing for 60 s", "no_hello"),
        ("FrameTooLarge", "dbt's process announced a frame", "protocol"),
        ("SnowflakeOddity", "the warehouse says: Database Error", "_OTHER"),
        ("Unknown", "", "_OTHER"),
    ],
)
def test_what_was_raised(class_: str, message: str, word: str) -> None:
    assert error_type_of_block(ErrorBlock(class_=class_, message=message)) == word


def test_every_word_fits_into_a_label_and_none_is_new_by_accident() -> None:
    assert {word.value for word in ErrorType if not word.value.islower()} == {"_OTHER"}
    assert len(ErrorType) < 30


@pytest.mark.parametrize("status", ["success", "warn", "skipped", "no-op", "reused"])
def test_what_passed_or_was_skipped_has_none(status: str) -> None:
    told = Story().plan(node(ORDERS))
    told.run(ORDERS, status)
    assert error_type_of(told.end_of(ORDERS)) is None


def test_a_microbatch_model_of_which_some_batches_failed() -> None:
    told = Story().plan(node(ORDERS))
    told.run(ORDERS, "partial success")
    assert error_type_of(told.end_of(ORDERS)) is ErrorType.PARTIAL_SUCCESS


def test_a_node_that_a_time_limit_ended_has_it_and_one_that_somebody_cancelled_has_none() -> None:
    words = {}
    for stop in (Reason.TIMEOUT, Reason.CANCELLED):
        told = Story().plan(node(ORDERS))
        told.start(ORDERS)
        told.cancel(stop)
        told.interrupt()
        told.end(exit_code=2, stop=stop)
        words[stop] = (error_type_of(told.end_of(ORDERS)), error_type_of(told.finished))
    assert words == {
        Reason.TIMEOUT: (ErrorType.TIMEOUT, ErrorType.TIMEOUT),
        Reason.CANCELLED: (None, None),
    }


def test_a_run_that_could_not_be_parsed() -> None:
    told = Story()
    told.hello()
    error = frames.ErrorInfo(error_class="DuplicateRef", message="Compilation Error\n  twice")
    told.result(2, error=error)
    told.end(exit_code=2)
    assert error_type_of(told.finished) is ErrorType.COMPILATION_ERROR


def test_a_rejected_request() -> None:
    told = Story()
    (event,) = told.normalizer.rejected("unknown_project", "no", at=told.now)
    assert error_type_of(event) is ErrorType.REJECTED
