"""`dbtstream top`, as `cli` has its other commands; `top_commands` does the work."""

import click

from dbtstream.cli_settings import Settings, run_to_end


@click.command(short_help="What the fleet is doing, live.")
@click.option("--project", metavar="NAME", help="Only of this project.")
@click.option("--target", metavar="NAME", help="Only of this target.")
@click.option("--once", is_flag=True, help="Print it once. So it is without a terminal, too.")
@click.option("--json", "as_json", is_flag=True, help="Once, as one JSON object.")
@click.pass_obj
def top(
    settings: Settings, /, project: str | None, target: str | None, once: bool, as_json: bool
) -> int:
    """Look at the fleet: workers, the queue, runs and how far they are, what failed last.

    Live in a terminal, until Ctrl-C. Needs a daemon that answers; NATS may go away and come
    back meanwhile.

    The JSON object has `at`, `workers` (worker, version, host, started_at, slots, used,
    draining, silent_s, projects, run_ids), `queues` (project, target, waiting, since,
    oldest_wait_s, running), `runs` (run_id, project, target, status, args, worker, attempt,
    queued_at, started_at, elapsed_s, done, total, by_status, running, nodes, eta_s, cancel,
    unstored), `ended` (run_id, project, target, status, args, finished_at, elapsed_s,
    exit_code, error) and `failures` (at, project, target, run_id, status, unique_id,
    resource_type, name, message), the last ones first, and `events_per_s`, null as nothing
    was watched.

    \b
    Examples:
      dbtstream top
      dbtstream top --project shop --once
      dbtstream top --json
    """
    from dbtstream.top_commands import top as show_top

    return run_to_end(
        show_top(settings.nats(), project=project, target=target, once=once, as_json=as_json)
    )
