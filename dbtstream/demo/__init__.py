"""A small dbt project on real flights, in `project/`. Copy it to run it: dbt writes there."""
