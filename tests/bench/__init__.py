"""What dbtstream costs: benchmarks that print figures, goals and ratios, and assert nothing.

    python -m tests.bench                     all of them
    python -m tests.bench callback latency    some
    python -m tests.bench --small --rounds 1  whether they work; the figures mean nothing then

Each measures a baseline in the same rounds, one after the other, and the ratio to it is what
to look at: machines differ and are seldom quiet. `__main__` runs them; a benchmark is one file
with `ROUNDS` and `measure(options)`, whose docstring says what disturbs it. Common parts:
`figures` (values, goals, the table), `projects` (a dbt project of any size), `builds` (one
`dbt build`, three ways), `served` (a daemon and a NATS server as processes), `replayed`
(children that replay invented frames at a given rate), `stored` (the events stream read back),
`loop_lag` (how late a daemon's event loop is), `ways` (to start a run, warm and cold),
`process_tree` (CPU and memory of a process and all below it).
"""
