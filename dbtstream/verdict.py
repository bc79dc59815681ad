"""`run.finished`: what the run came to, and whether dbt's own results say the same. Pure.

Layer 1. `normalizer` hands over what was told; what became of the nodes is in `ledger`, what the
end of the child means in `endings`.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from dbtstream import frames
from dbtstream.dbt_values import clean, error_block
from dbtstream.endings import Ending, run_status
from dbtstream.envelope import Envelope, RunContext
from dbtstream.events import ArtifactRef, ProcessBlock, Resource, RunFinished
from dbtstream.ledger import Ledger
from dbtstream.phases import Phases
from dbtstream.runs import exit_code_of
from dbtstream.statuses import RunStatus


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of an attempt at its end, beside its nodes."""

    result: frames.Result | None
    results: Mapping[str, frames.NodeResult]  # what dbt returned, by unique_id
    frames_missing: bool
    artifacts: list[ArtifactRef]
    began: datetime
    phases: Phases


def tell_verdict(
    envelope: Envelope,
    context: RunContext,
    ledger: Ledger,
    told: Told,
    ending: Ending,
    at: datetime,
) -> RunStatus:
    """Emit the run's last event; the status in it."""
    result = told.result
    failed, failed_count = ledger.failed()
    status, exit_code = run_status(ending, result), result.exit_code if result else None
    if status is RunStatus.SUCCESS and failed_count:
        # dbt is content, but of some node we could not make out that it passed.
        status, exit_code = RunStatus.FAILURE, 1
    verified, verified_status = _verify(envelope, ledger, told, at)
    stats = result.stats if result else frames.ChildStats()
    if stats.callback_errors:
        envelope.log(
            "warn",
            "CallbackErrors",
            f"{stats.callback_errors} of dbt's events could not be read in dbt's process; "
            f"the first: {stats.callback_error}",
            at,
        )
    error = ending.error
    if result is not None:
        error = None if result.interrupted else error_block(result.error, None)
    envelope.emit(
        RunFinished,
        at,
        status=status,
        exit_code=exit_code_of(status, exit_code),
        command=context.command,
        error=error,
        counts=ledger.counts(),
        elapsed_s=max((at - told.began).total_seconds(), 0.0),
        slowest=ledger.slowest(),
        failed=failed,
        failed_count=failed_count,
        resource=Resource(max_rss=stats.max_rss_bytes, cpu_s=stats.cpu_s),
        artifacts=told.artifacts,
        attempts=context.attempt,
        verified=verified,
        verified_status=verified_status,
        phases=told.phases.timings(ending.exited_at or at),
        process=_process(ending, told.phases),
        stderr_tail=clean(ending.stderr_tail)[0] if result is None else None,
    )
    return status


def _process(ending: Ending, phases: Phases) -> ProcessBlock | None:
    if ending.pid is None or ending.exited_at is None:
        return None
    code = ending.exit_code
    killed = code is not None and code < 0
    return ProcessBlock(
        pid=ending.pid,
        started_at=phases.spawned_at or ending.exited_at,
        finished_at=ending.exited_at,
        exit_code=None if killed else code,
        signal=_signal_name(-code) if code is not None and killed else None,
        oom=ending.oom,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals between SIGRTMIN and SIGRTMAX
        return f"SIG{number}"


def _verify(envelope: Envelope, ledger: Ledger, told: Told, at: datetime) -> tuple[bool, str]:
    """Whether dbt's own results say the same of every node that both know.

    dbt returns none for ephemeral models, and none for hooks before 1.9.
    """
    result, results = told.result, told.results
    if result is None or result.interrupted or result.result_count < 0:
        return False, "no_results"
    if told.frames_missing:
        return False, "frames_missing"
    if result.result_count != len(results):
        return False, f"incomplete: {len(results)} of {result.result_count} results came"
    different = ledger.differences(results.values())
    if not different:
        return True, "equal"
    envelope.log(
        "warn",
        "ResultsDiffer",
        f"of {len(different)} nodes dbt's results say something else than its events: "
        + ", ".join(different[:10]),
        at,
    )
    return False, f"differs: {len(different)} nodes"
