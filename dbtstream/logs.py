"""How log lines look: for a person on a terminal, JSON for a log collector.

Modules log constant sentences with facts in `extra` (`action` among them); both formats
print those facts. `cli` calls one of the two functions, once: the daemon's lines follow its
config, other commands only say what a person in front of them needs to know.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from dbtstream.config import LogConfig
from dbtstream.log_context import trace_ids

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(config: LogConfig) -> None:
    """Log lines to stderr, as the config says."""
    as_json = config.format == "json" or (config.format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("dbtstream").setLevel(config.level.upper())


def configure_client_logging() -> None:
    """Warnings to stderr, in the format for people."""
    handler = _CurrentStderr()
    handler.setFormatter(ConsoleFormatter())
    handler.addFilter(lambda record: getattr(record, "action", None) not in _IN_ERRORS)
    handler.addFilter(_is_news)
    logging.getLogger().handlers[:] = [handler]


def _is_news(record: logging.LogRecord) -> bool:
    """asyncio says of each TLS connection that its protocol keeps the far end open; it cannot."""
    return not (record.name == "asyncio" and "eof_received" in record.getMessage())


_IN_ERRORS = frozenset({"nats.problem"})
"""What these say is part of the error that a command ends with, if it ends with one."""


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """To whatever sys.stderr is now: the live view puts its own there, to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        raise AttributeError("it is sys.stderr")


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _OWN_FIELDS}


class ConsoleFormatter(logging.Formatter):
    """`12:30:01 INFO    run finished  run_id=… status=success`"""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).astimezone()
        facts = facts_of(record)
        facts.pop("action", None)
        words = " ".join(f"{key}={_word(value)}" for key, value in facts.items())
        line = f"{at:%H:%M:%S} {record.levelname:<7} {record.getMessage()}"
        if words:
            line += f"  {words}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object per line; the facts beside `time`, `level`, `logger` and `message`. A line about a
    run has `trace_id` and `span_id`, those of its events and spans.

    It reads them from the context that it is called in, so its handler must not pass lines on to
    another thread.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **trace_ids(),
            **facts_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _word(value: object) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(str, value))
    text = str(value)
    return json.dumps(text) if " " in text or not text else text
