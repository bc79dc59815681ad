"""What real dbt said, recorded for every version of it, is valid OpenLineage, and whole.

The records are those of `test_normalizer_recorded`. There are no asset events in them: what is
held for those comes out with the run's end.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dbtstream.endings import Ended, Ending
from dbtstream.event_base import ErrorBlock
from dbtstream.events import AnyEvent, NodeBatch, NodeFinished, RunFinished
from dbtstream.frames import AnyFrame, Result, decode_frame
from dbtstream.normalizer import Normalizer
from dbtstream.openlineage_runs import end_of, job_name
from tests.openlineage_events import Json, mapped
from tests.stories import context

RECORDS = sorted((Path(__file__).parent / "frames").glob("*/*.jsonl"))


def told(frames: list[AnyFrame]) -> list[AnyEvent]:
    """The events of a run whose dbt said this, and then ended or died."""
    normalizer = Normalizer(context())
    begin = datetime.fromtimestamp(frames[0].at, UTC) if frames else datetime.now(UTC)
    events = normalizer.queued(begin)
    normalizer.spawned(begin)
    for frame in frames:
        events += normalizer.frame(frame)
    ending = Ending(how=Ended.RESULT)
    if not any(isinstance(frame, Result) for frame in frames):
        error = ErrorBlock(class_="ChildCrashed", message="dbt's process died")
        ending = Ending(how=Ended.CRASHED, exit_code=-9, error=error)
    end = datetime.fromtimestamp(frames[-1].at, UTC) if frames else begin
    return events + normalizer.end(ending, at=end)


def ends(messages: list[Json]) -> Counter[tuple[str, str]]:
    return Counter(
        (m["job"]["name"], m["eventType"])
        for m in messages
        if m["eventType"] in ("COMPLETE", "FAIL", "ABORT")
    )


@pytest.mark.parametrize("cut", [1.0, 0.5], ids=["whole", "cut"])
@pytest.mark.parametrize("record", RECORDS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_end_of_ours_is_one_of_theirs(record: Path, cut: float) -> None:
    frames = [decode_frame(line) for line in record.read_bytes().splitlines()]
    events = told(frames[: int(len(frames) * cut)])
    messages = mapped(events)  # each of them valid
    wanted = Counter(
        (job_name(e.node), end_of(e.status)) for e in events if isinstance(e, NodeFinished)
    )
    wanted += Counter(
        (f"{e.unique_id}.batch", end_of(e.status)) for e in events if isinstance(e, NodeBatch)
    )
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    kind = {"success": "COMPLETE", "cancelled": "ABORT"}.get(finished.status, "FAIL")
    wanted[messages[-1]["job"]["name"], kind] += 1
    assert ends(messages) == wanted
    starts = Counter(m["run"]["runId"] for m in messages if m["eventType"] == "START")
    assert set(starts.values()) == {1}
