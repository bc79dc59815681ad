"""dbt Core as an event stream.

How the stages connect, from one message in to every node out:

    consumer → worker → execution → dbt_process ⇄ dbt_child
                            │
                            ▼
    normalizer → outbox → publishers → NATS JetStream → client

Read `execution` first. A module imports only from the layers before its own:

    0 contracts      errors statuses events messages frames subjects config
    1 pure           runs policy scrub trace normalizer (endings envelope ledger node_events
                     dbt_values) schema
    2 edges          nats_link (nats_connection nats_auth nats_errors) streams selection
                     event_stream consumer lease store (state_bucket) run_state outbox
                     (outbox_file) publishers workspace dbt_process
    3 orchestration  execution worker rejection recovery unknown_subjects control
    4 composition    daemon embedded local_run client checks follow terminal screen tables
                     logs commands cli
    –                dbt_child (stdlib and dbt only; started by path, imported by nothing)
"""

__version__ = "0.1.0"
