"""`dbtstream lineage`: its words, and `lineage_commands` called.

As `cli`, which adds this command to its own: imports of the work are inside the function.
"""

import sys

import click

from dbtstream.cli_settings import Settings, run_to_end

_STEPS = click.IntRange(min=0)
_FAR = sys.maxsize


@click.command(short_help="What flows into what: the current graph, or a part of it.")
@click.argument("project")
@click.option("--target", metavar="NAME", help="Needed if the project has lineage of several.")
@click.option("--node", metavar="NAME", help="Around this one: a unique_id, a name, a dataset.")
@click.option(
    "--up",
    type=_STEPS,
    is_flag=False,
    flag_value=_FAR,
    metavar="[N]",
    help="What the node is made from; N steps only.",
)
@click.option(
    "--down",
    type=_STEPS,
    is_flag=False,
    flag_value=_FAR,
    metavar="[N]",
    help="What is made from the node; N steps only.",
)
@click.option("--columns", is_flag=True, help="With columns; then --node may be node.column.")
@click.option(
    "--format",
    "as_format",
    type=click.Choice(["tree", "json", "mermaid", "dot"]),
    default="tree",
    help="A tree is the default.",
)
@click.pass_obj
def lineage(
    settings: Settings,
    /,
    project: str,
    target: str | None,
    node: str | None,
    up: int | None,
    down: int | None,
    columns: bool,
    as_format: str,
) -> int:
    """Print the current lineage of a project: what its last runs declared and observed.

    It is read from NATS and needs no daemon. With --node and neither --up nor --down, all on
    both sides of it. In a tree, what has been shown already is marked (above).

    \b
    Examples:
      dbtstream lineage shop
      dbtstream lineage shop --target prod --node orders --up --down 1
      dbtstream lineage shop --node orders.amount --columns
      dbtstream lineage shop --format mermaid
    """
    from dbtstream import lineage_commands

    if node is None and (up is not None or down is not None):
        raise click.UsageError("--up and --down go with --node.")
    wanted = lineage_commands.Wanted(
        project=project, target=target, node=node, up=up, down=down, columns=columns
    )
    return run_to_end(lineage_commands.lineage(settings.nats(), wanted, as_format=as_format))
