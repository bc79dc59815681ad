"""What a status looks like: the same colour on every panel of every dashboard."""

from typing import Final

from dbtstream.statuses import NodeStatus, RunStatus

GREEN: Final = "green"
YELLOW: Final = "yellow"
ORANGE: Final = "orange"
RED: Final = "red"
BLUE: Final = "blue"

RUN_COLOURS: Final[dict[str, str]] = {
    RunStatus.SUCCESS: GREEN,
    RunStatus.FAILURE: ORANGE,
    RunStatus.ERROR: RED,
    RunStatus.CANCELLED: "#8e8e8e",
    RunStatus.TIMED_OUT: "purple",
    RunStatus.LOST: "dark-purple",
    RunStatus.QUEUED: "light-blue",
    RunStatus.STARTING: "semi-dark-blue",
    RunStatus.RUNNING: BLUE,
}

RUN_CODES: Final[dict[str, int]] = {
    RunStatus.SUCCESS: 1,
    RunStatus.FAILURE: 2,
    RunStatus.ERROR: 3,
    RunStatus.CANCELLED: 4,
    RunStatus.TIMED_OUT: 5,
    RunStatus.LOST: 6,
}
"""Numbers for a timeline, which can show numbers only."""

NODE_COLOURS: Final[dict[str, str]] = {
    NodeStatus.SUCCESS: GREEN,
    NodeStatus.WARN: YELLOW,
    NodeStatus.FAIL: ORANGE,
    NodeStatus.ERROR: RED,
    NodeStatus.PARTIAL_SUCCESS: "dark-orange",
    NodeStatus.SKIPPED: "light-blue",
    NodeStatus.NO_OP: "#bcbcbc",
    NodeStatus.REUSED: "super-light-green",
    NodeStatus.NEVER_STARTED: "semi-dark-blue",
    NodeStatus.CANCELLED: "#8e8e8e",
    NodeStatus.LOST: "dark-purple",
}

FRESHNESS_COLOURS: Final[dict[str, str]] = {
    "passed": GREEN,
    "warned": YELLOW,
    "failed": ORANGE,
    "error": RED,
}
