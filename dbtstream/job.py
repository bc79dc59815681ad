"""A request that may run, and what dbt's process is given for it and leaves behind.

`worker` makes a `Job` of a request; `execution` takes from here the child's `Start`, has an
earlier run's artifacts brought into the run's own folder, and its artifacts kept at the end.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import msgspec

from dbtstream.artifact_store import ArtifactStore, latest_prefix
from dbtstream.artifacts import FILES, LOG, artifact_files, without_paths
from dbtstream.assets import COMMANDS
from dbtstream.config import DEFAULT_TARGET, Config, ProjectConfig
from dbtstream.errors import DbtstreamError, RequestRejected
from dbtstream.events import AnyEvent, RunFinished, RunStarted, TraceBlock
from dbtstream.frames import Retry, Start
from dbtstream.manifest_templates import Recipe
from dbtstream.messages import LAST_SUCCESS, OnLost, RejectCode, RunRequest, RunView
from dbtstream.policy import (
    DbtArgs,
    check_args,
    check_earlier,
    check_retry,
    own_parse,
    worker_args,
)
from dbtstream.resume import earlier_results
from dbtstream.scrub import Scrubber
from dbtstream.store import Store
from dbtstream.streams import ARTIFACTS_BUCKET
from dbtstream.subjects import NAME, is_run_id, rfc3339
from dbtstream.trace import TraceParent, parse_traceparent
from dbtstream.workspace import Workspace, project_environment

MANIFEST, RUN_RESULTS = FILES["manifest"], FILES["run_results"]
STATE_FILES = (MANIFEST, RUN_RESULTS, FILES["sources"])


GROUPED = {"generate": "docs generate", "freshness": "source freshness"}
"""dbt's name of a command in its artifacts -> as it is written, where that differs."""


class StateMissing(DbtstreamError):
    """An earlier run's artifact that the request builds on is not in the Object Store."""

    def __init__(self, name: str, whose: str) -> None:
        self.name, self.whose = name, whose
        super().__init__(f"there is no {name} of {whose} in the Object Store dbt_artifacts")


@dataclass(frozen=True, slots=True)
class Job:
    """A request that may run: checked, named, and with its place in the queue."""

    run_id: str
    project_name: str
    project: ProjectConfig
    target: str
    request: RunRequest
    request_id: str | None
    dbt: DbtArgs
    request_seq: int
    stored_at: datetime
    position: int = 0
    trace: TraceBlock | None = None

    @property
    def parent(self) -> TraceParent | None:
        """The span that asked for it."""
        return parse_traceparent(self.trace.traceparent) if self.trace else None

    @property
    def args(self) -> list[str]:
        """As the request has them, or `retry` where it only names an earlier run."""
        return self.request.args or [self.dbt.command]

    @property
    def labels(self) -> dict[str, str]:
        return self.project.labels | self.request.labels

    @property
    def on_lost(self) -> OnLost:
        return self.request.on_lost or OnLost(self.project.on_lost)


async def checked_args(
    store: Store, name: str, project: ProjectConfig, target: str, request: RunRequest
) -> DbtArgs:
    """dbt's words for the request, within the project's policy.

    Raises RequestRejected, NatsError.
    """
    if (state := request.state) is not None:
        if request.retry_of is not None:
            raise RequestRejected(
                RejectCode.BAD_MESSAGE, "retry_of brings its own state; leave out one", "state"
            )
        if state.from_ != LAST_SUCCESS and not is_run_id(state.from_):
            raise RequestRejected(
                RejectCode.BAD_MESSAGE,
                f"state.from is {state.from_!r}; it must be {LAST_SUCCESS} or a run id",
                "state.from",
            )
        if state.from_ != LAST_SUCCESS:
            await _run_of(store, state.from_, name, "state.from")
        if state.target is not None and not NAME.fullmatch(state.target):
            raise RequestRejected(
                RejectCode.BAD_MESSAGE, f"{state.target!r} is no target", "state.target"
            )
    if request.retry_of is None:
        return check_args(request.args, project)
    earlier = await _run_of(store, request.retry_of, name, "retry_of")
    if earlier.target != target:
        raise RequestRejected(
            RejectCode.USAGE_ERROR,
            f"retry_of: run {earlier.run_id} was of target {earlier.target}",
            "retry_of",
        )
    if earlier.args[:1] != ["retry"]:  # else that one was checked for the run that it repeats
        check_earlier(earlier.args, project)
    return check_retry(request.args)


async def _run_of(store: Store, run_id: str, project: str, field: str) -> RunView:
    """A run of this project. Another one's artifacts are nobody's business here."""
    stored = await store.get_run(run_id) if is_run_id(run_id) else None
    if stored is None or stored[0].project != project:
        raise RequestRejected(
            RejectCode.USAGE_ERROR, f"{field}: no run {run_id} of {project} is known", field
        )
    return stored[0]


def child_start(
    job: Job,
    workspace: Workspace,
    earlier: Sequence[AnyEvent] | None,
    known_manifest: str | None,
) -> Start:
    """What the child is told. With `earlier` events, only nodes without success run again; of a
    `known_manifest` only what is near to the selection is told."""
    project = job.project
    variables = job.request.vars
    args = worker_args(
        job.dbt,
        target=None if job.target == DEFAULT_TARGET else job.target,
        profile=project.profile,
        vars_json=msgspec.json.encode(variables).decode() if variables else "",
    )
    retry = None
    if job.request.retry_of is not None:
        args += ["--state", str(workspace.state_path)]
    elif earlier is not None:
        retry = Retry(
            args=args,
            results=earlier_results(earlier),
            state_dir=str(workspace.retry_path),
            began_at=next((rfc3339(e.time) for e in earlier if isinstance(e, RunStarted)), None),
        )
    return Start(
        args=args,
        project_dir=project.path,
        secret_env=list(workspace.secret_names),
        log_level=project.log_level,
        queries=project.queries,
        query_sql=project.query_sql,
        stack_file=str(workspace.stack_file),
        retry=retry,
        graph=project.assets.emit or project.lineage.emit or bool(project.selectors),
        known_manifest=known_manifest,
        compiled_code=(project.lineage.emit or project.assets.emit) and job.dbt.command in COMMANDS,
        adapter_columns=project.lineage.adapter_columns,
        selectors=project.selectors,
        speedups=project.speedups,
    )


def parse_recipe(config: Config, job: Job, workspace: Workspace) -> Recipe | None:
    """How the project is parsed for it; None where dbt has to do that in the run itself."""
    if job.request.retry_of is not None or own_parse(job.dbt):
        return None
    project, variables = job.project, job.request.vars
    args = worker_args(
        DbtArgs("", [""]),
        target=None if job.target == DEFAULT_TARGET else job.target,
        profile=project.profile,
        vars_json=msgspec.json.encode(variables, order="sorted").decode() if variables else "",
    )
    return Recipe(
        python=project.python,
        folder=project.path,
        args=tuple(args[1:]),
        where=(job.project_name, job.target),
        secret_names=workspace.secret_names,
        cache=workspace.parse_cache,
        environment=partial(project_environment, config, job.project_name, project),
    )


async def bring_state(
    job: Job, workspace: Workspace, artifacts: ArtifactStore, earlier: Sequence[AnyEvent] | None
) -> str:
    """What `retry_of` and `state` need, into the run's own folder; which command will run.

    With `earlier` events of a run that is itself a retry, what has succeeded since is left out.
    Raises StateMissing, NatsError, OSError.
    """
    folder = workspace.state_path
    if (retry_of := job.request.retry_of) is not None:
        if RUN_RESULTS not in await artifacts.fetch(retry_of, [RUN_RESULTS], folder):
            raise StateMissing(RUN_RESULTS, f"run {retry_of}")
        return await asyncio.to_thread(_prepare_results, folder / RUN_RESULTS, earlier or ())
    if (state := job.request.state) is not None:
        target = state.target or job.target
        last = state.from_ == LAST_SUCCESS
        prefix = latest_prefix(job.project_name, target) if last else state.from_
        if MANIFEST not in await artifacts.fetch(prefix, STATE_FILES, folder):
            whose = f"a successful run of {job.project_name}.{target}" if last else f"run {prefix}"
            raise StateMissing(MANIFEST, whose)
        # `--defer-state` is `--state` where it is not set, but dbt's retry looks there only.
        workspace.environment["DBT_STATE"] = str(folder)
        workspace.environment["DBT_DEFER_STATE"] = str(folder)
    return job.dbt.command


def object_names(run_id: str) -> dict[str, str]:
    """Kind of artifact -> `<bucket>/<name>`, where `keep_artifacts` will have it."""
    return {kind: f"{ARTIFACTS_BUCKET}/{run_id}/{name}" for kind, name in FILES.items()}


async def keep_artifacts(
    job: Job,
    command: str,
    verdict: RunFinished,
    workspace: Workspace,
    artifacts: ArtifactStore,
    scrubber: Scrubber,
) -> dict[str, str]:
    """Of what dbt wrote in this run: kind -> name in the Object Store.

    `command` is what has run, also where the request's own word was `retry`.
    """
    written = {artifact.kind for artifact in verdict.artifacts}
    found = await asyncio.to_thread(
        artifact_files,
        workspace.target_path,
        workspace.log_path,
        workspace.attempt_dir,
        scrubber,
    )
    files = {kind: path for kind, path in found.items() if kind in written or kind == LOG}
    stored = await artifacts.put_run(job.run_id, files, scrubber)
    if verdict.exit_code == 0:
        await artifacts.set_latest(
            job.project_name,
            job.target,
            command,
            files,
            scrubber,
            run_id=job.run_id,
            finished_at=verdict.time,
        )
    return stored


def _prepare_results(path: Path, earlier: Sequence[AnyEvent]) -> str:
    """Another run's results for dbt's retry here, with what has come since in `earlier`; the
    command that they are of."""
    since = {result.unique_id: result.status for result in earlier_results(earlier)}
    document = msgspec.json.decode(without_paths(path.read_bytes()))
    for result in document["results"]:
        result["status"] = since.get(result["unique_id"], result["status"])
    path.write_bytes(msgspec.json.encode(document))
    which = str(document.get("args", {}).get("which", "retry"))
    return GROUPED.get(which, which)
