"""Faults made on purpose, on real processes: what README's Behaviour section says, shown.

Each test has a short form, for `make test`, and a long one with the numbers of the README, for
`make test-faults` (see `form`). `harness` has daemons, configs and runs, `project` a dbt project
that takes its time, `recorder` the proof that no two dbt processes were at one target at once.
"""
