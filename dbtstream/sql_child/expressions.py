"""What an expression does with the columns in it: passes on, changes, adds up, decides by.

Part of the SQL reader (`reader`), so in its process only. Goes through one expression and
yields what it finds with the step that leads from there to the expression's value; does not
know what a name means (`binder` does) and does not enter subqueries.
"""

from collections.abc import Callable, Iterator, Mapping

from sqlglot import exp

from dbtstream.sql_child.traces import (
    AGGREGATION,
    CONDITIONAL,
    FILTER,
    IDENTITY,
    MASKED,
    MASKED_AGGREGATION,
    SORT,
    TRANSFORMATION,
    WINDOW,
    Step,
    then,
)

Use = tuple[exp.Expr, Step]
"""A Column, a Star (all columns), a Columns (some of them), a query (its value) or an Exists (only
whether a query has rows)."""

COUNTS = (exp.Count, exp.CountIf, exp.ApproxDistinct, exp.Hll, exp.RegrCount, exp.HashAgg)
HASHES = (
    *(exp.MD5, exp.MD5Digest, exp.MD5NumberLower64, exp.MD5NumberUpper64),
    *(exp.SHA, exp.SHA1Digest, exp.SHA2, exp.SHA2Digest),
    *(exp.StandardHash, exp.FarmFingerprint, exp.CityHash64),
)
OTHER_ROWS = (exp.Lag, exp.Lead, exp.FirstValue, exp.LastValue, exp.NthValue)
"""sqlglot counts them among the aggregates; they give the value of one other row."""

# Functions that sqlglot has no class for.
AGGREGATE_NAMES = frozenset(
    (
        *("approx_set", "array_agg_distinct", "bitstring_agg", "collect_list", "collect_set"),
        *("count_distinct", "entropy", "favg", "first", "fsum", "geomean", "histogram"),
        *("hll_accumulate", "hll_combine", "hll_union_agg", "kahan_sum", "last", "list", "mad"),
        *("map_agg", "max_by", "min_by", "multimap_agg", "product", "reservoir_quantile"),
        *("sumkahan", "countif", "uniq", "uniqcombined", "uniqexact"),
    )
)
COUNT_NAMES = frozenset(
    ("approx_set", "count_distinct", "countif", "uniq", "uniqcombined", "uniqexact")
)
HASH_NAMES = frozenset(
    (
        *("binary_checksum", "checksum", "crc32", "farm_fingerprint", "fnv_hash", "hash"),
        *("hash64", "hashbytes", "mask", "md5_number", "murmurhash3_32", "sha1", "sha1_hex"),
        *("sha224", "sha256", "sha384", "sha512", "sha2_binary", "sha2_hex", "siphash64"),
        *("siphash128", "xxh32", "xxh64", "xxhash32", "xxhash64"),
    )
)
LEAVES = (exp.Identifier, exp.Literal, exp.DataType, exp.Var, exp.JSONPath, exp.Null, exp.Boolean)
QUERIES = (exp.Select, exp.SetOperation, exp.Subquery)
ASKED = (exp.Star, exp.Columns, exp.Exists, *QUERIES)

Windows = Mapping[str, exp.Expr]


def uses(
    expression: exp.Expr, base: Step = IDENTITY, windows: Windows | None = None
) -> Iterator[Use]:
    """Each column, star and subquery in it, in the order of the text. Iterative: expressions can
    be deeper than Python's stack."""
    waiting: list[tuple[exp.Expr, Step, frozenset[str]]] = [(expression, base, frozenset())]
    while waiting:
        node, step, hidden = waiting.pop()
        if isinstance(node, LEAVES):
            continue
        if isinstance(node, exp.Column):
            if node.parts[0].name not in hidden:
                yield node, step
            continue
        if isinstance(node, ASKED) and not _wraps_scalar(node):
            yield node, step
            continue
        if isinstance(node, exp.Comprehension):
            hidden = hidden | _variables(node)
        parts = _parts(node, step, windows or {})
        waiting.extend((child, how, hidden) for child, how in reversed(parts))


def has_aggregate(expression: exp.Expr) -> bool:
    """Of this SELECT: neither of a subquery in it nor over a window."""
    waiting = [expression]
    while waiting:
        node = waiting.pop()
        if isinstance(node, QUERIES):
            continue
        if isinstance(node, exp.Window):
            return True  # then it is no group key either
        if isinstance(node, exp.AggFunc) or _name(node) in AGGREGATE_NAMES:
            return True
        waiting.extend(node.iter_expressions())
    return False


def _wraps_scalar(node: exp.Expr) -> bool:
    """`exists(list, x -> …)` of Spark and DuckDB is a function and asks no query."""
    return isinstance(node, exp.Exists) and not isinstance(node.this, QUERIES)


def _variables(node: exp.Comprehension) -> frozenset[str]:
    variables = (node.args.get(key) for key in ("expression", "position"))
    return frozenset(it.name for it in variables if it is not None)


def _parts(node: exp.Expr, step: Step, windows: Windows) -> list[Use]:
    """The node's children, each with the step from it to the whole."""
    handler = _found.get(type(node))
    if handler is None:
        handler = next((it for kinds, it in _HANDLERS if isinstance(node, kinds)), _changed)
        _found[type(node)] = handler
    return handler(node, step, windows)


def _changed(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    change = then(step, TRANSFORMATION)
    return [(child, change) for child in node.iter_expressions()]


def _same(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return [(child, step) for child in node.iter_expressions()]


def _case(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    parts = _given(node, "this", then(step, CONDITIONAL))
    for branch in node.args.get("ifs") or ():
        parts += _if(branch, step, _windows)
    return parts + _given(node, "default", then(step, TRANSFORMATION))


def _if(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return (
        _given(node, "this", then(step, CONDITIONAL))
        + _given(node, "true", then(step, TRANSFORMATION))
        + _given(node, "false", then(step, TRANSFORMATION))
    )


def _nullif(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return _given(node, "this", then(step, TRANSFORMATION)) + _given(
        node, "expression", then(step, CONDITIONAL)
    )


def _decode(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    """decode(x, search, result, search, result, default)"""
    arguments = node.expressions
    parts = [(arguments[0], then(step, CONDITIONAL))]
    for number, argument in enumerate(arguments[1:]):
        searched = number % 2 == 0 and number < len(arguments) - 2
        parts.append((argument, then(step, CONDITIONAL if searched else TRANSFORMATION)))
    return parts


def _window(node: exp.Expr, step: Step, windows: Windows) -> list[Use]:
    parts = _given(node, "this", step) if isinstance(node.this, exp.Expr) else []
    over = [node]
    named = node.args.get("alias")
    if named is not None and named.name in windows:
        over.append(windows[named.name])
    for definition in over:
        parts += [(it, then(step, WINDOW)) for it in definition.args.get("partition_by") or ()]
        parts += _given(definition, "order", then(step, WINDOW))
    return parts


def _filter(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return _given(node, "this", step) + _given(node, "expression", then(step, FILTER))


def _within_group(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    """`listagg(x) within group (order by y)` sorts by y, but `percentile_cont(0.5) within group
    (order by x)` has no other value than x."""
    key = AGGREGATION if node.this.find(exp.Column) is None else SORT
    return _given(node, "this", step) + _given(node, "expression", then(step, key))


def _order(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    """Inside an aggregate: `array_agg(x order by y)` has x as `this`."""
    keys = step if node.this is None else then(step, SORT)
    return _given(node, "this", step) + [(it, keys) for it in node.expressions]


def _having_max(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return _given(node, "this", step) + _given(node, "expression", then(step, SORT))


def _arg_max(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return _given(node, "this", then(step, AGGREGATION)) + _given(
        node, "expression", then(step, SORT)
    )


def _count(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    counted = then(step, MASKED_AGGREGATION)
    return [(it, counted) for it in node.iter_expressions() if not isinstance(it, exp.Star)]


def _aggregate(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    masked = _name(node) in COUNT_NAMES
    change = then(step, MASKED_AGGREGATION if masked else AGGREGATION)
    return [(child, change) for child in node.iter_expressions()]


def _hash(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    return [(child, then(step, MASKED)) for child in node.iter_expressions()]


def _anonymous(node: exp.Expr, step: Step, windows: Windows) -> list[Use]:
    name = _name(node)
    if name in AGGREGATE_NAMES:
        return _aggregate(node, step, windows)
    change = MASKED if name in HASH_NAMES else TRANSFORMATION
    return [(child, then(step, change)) for child in node.iter_expressions()]


def _dot(node: exp.Expr, step: Step, _windows: Windows) -> list[Use]:
    """A field of a struct; its name is no column. A function may stand there: `lib.f(x)`."""
    parts = [(node.this, then(step, TRANSFORMATION))]
    if isinstance(node.expression, exp.Func):
        parts.append((node.expression, step))
    return parts


def _given(node: exp.Expr, key: str, step: Step) -> list[Use]:
    child = node.args.get(key)
    return [(child, step)] if isinstance(child, exp.Expr) else []


def _name(node: exp.Expr) -> str:
    if isinstance(node, exp.Anonymous | exp.AnonymousAggFunc) and isinstance(node.this, str):
        return node.this.lower()
    return ""


_Handler = Callable[[exp.Expr, Step, Windows], list[Use]]
_HANDLERS: tuple[tuple[type[exp.Expr] | tuple[type[exp.Expr], ...], _Handler], ...] = (
    # The first that fits: counts and ranks are aggregates to sqlglot, too.
    ((exp.Alias, exp.Paren, exp.Distinct, exp.Ordered, exp.Where), _same),
    ((exp.IgnoreNulls, exp.RespectNulls), _same),
    (exp.Case, _case),
    (exp.If, _if),
    (exp.Nullif, _nullif),
    (exp.DecodeCase, _decode),
    (exp.Nvl2, _if),
    (exp.Window, _window),
    (exp.Filter, _filter),
    (exp.WithinGroup, _within_group),
    (exp.Order, _order),
    (exp.HavingMax, _having_max),
    ((exp.ArgMax, exp.ArgMin), _arg_max),
    (OTHER_ROWS, _changed),
    (COUNTS, _count),
    (HASHES, _hash),
    (exp.AggFunc, _aggregate),
    (exp.Anonymous, _anonymous),
    (exp.Dot, _dot),
)
_found: dict[type, _Handler] = {}
