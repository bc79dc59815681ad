"""Relations made of others: renamed, united, decided by.

Part of the SQL reader (`reader`), so in its process only.
"""

from collections.abc import Iterable

from sqlglot import exp

from dbtstream.sql_child.names import Names
from dbtstream.sql_child.traces import End, Gathering, Out, Relation, Step, Unknown, gather


def united(arms: list[Relation], *, by_name: bool) -> Relation:
    """Columns of a union, by place or by name; the first arm has the names."""
    opened = [end for arm in arms for end in arm.ends]
    if by_name:
        names = list(dict.fromkeys(out.name for arm in arms for out in arm.outs))
        columns = [[out for arm in arms if (out := arm.exactly(name))] for name in names]
        return Relation((_one(outs, opened) for outs in columns), _nameless(opened))
    if arms[0].ends:
        return Relation(ends=_nameless(opened))
    columns = []
    for place, first in enumerate(arms[0].outs):
        others = (arm.outs[place] for arm in arms[1:] if place < len(arm.outs))
        columns.append([first, *others])
    short = any(len(arm.outs) != len(arms[0].outs) for arm in arms) and not opened
    problem = "the parts of a union have different numbers of columns" if short else None
    return Relation(_one(outs, opened, problem) for outs in columns)


def _one(outs: list[Out], opened: list[End], problem: str | None = None) -> Out:
    trace: Gathering = {}
    for out in outs:
        gather(trace, out.trace)
    problems = [out.problem for out in outs if out.problem] + [unknown(end) for end in opened]
    type_ = outs[0].type if len({out.type for out in outs}) == 1 else None
    problem = problem or (problems[0] if problems else None)
    return Out(outs[0].name, outs[0].spelled, trace, type_, problem)


def _nameless(ends: list[End]) -> list[End]:
    """After a union nobody can say whose column it is: the arms match by place."""
    return [Unknown(whose) for whose in dict.fromkeys(end.whose for end in ends)]


def decided_by(relation: Relation, out: Out, step: Step) -> None:
    if out.problem:
        relation.problems.append(out.problem)
    else:
        gather(relation.rows, out.trace, step)


def decided_by_all(relation: Relation, step: Step, of: Relation | None = None) -> None:
    of = of or relation
    for out in of.outs:
        decided_by(relation, out, step)
    relation.problems += [unknown(end) for end in of.ends]


def around(relation: Relation) -> Relation:
    """A relation of its own with the same columns, fed by the other."""
    result = Relation(relation.outs, relation.ends)
    result.feeds = [relation]
    return result


def unknown(end: End) -> str:
    return f"the columns of {end.whose} are not known"


def renamed(names: Names, relation: Relation, columns: Iterable[exp.Expr]) -> Relation:
    """With the names of `as t(a, b)`, as many as there are."""
    new = [it.this if isinstance(it, exp.ColumnDef) else it for it in columns]
    if not new:
        return relation
    result = around(relation)
    if relation.ends:
        result.outs = [
            Out(
                names.of(it),
                names.spelled(it),
                {},
                problem=unknown(relation.ends[0]),
            )
            for it in new
        ]
        return result
    for place, it in enumerate(new[: len(result.outs)]):
        out = result.outs[place]
        result.outs[place] = out._replace(name=names.of(it), spelled=names.spelled(it))
    return result
