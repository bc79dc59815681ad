"""The process that reads SQL: the one place that imports sqlglot, started by `sql_process` only.

`__main__` is its loop, `reader` what it answers with; the other modules are the reader's parts.
It may import the contracts of layers 0 and 1 (`column_lineage`), and nothing imports it.
"""
