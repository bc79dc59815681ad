"""dbt Core as an event stream.

How the stages connect, from one message in to every node out:

    consumer → worker → claims → execution → dbt_process ⇄ dbt_child
                                     │  ↘
                                     │   asset_events → sql_process ⇄ sql_child
                                     ▼   ↙
             normalizer → outbox → publishers → NATS JetStream → client
                        ↘                             ↘ publishers.openlineage → OpenLineage
                          observers: metrics, publishers.otel → telemetry → /metrics, OTLP

Read `execution` first. A module imports only from the layers before its own:

    0 contracts      errors statuses event_base lineage_events events messages frames subjects
                     column_lineage config instruments spans
    1 pure           runs policy scrub trace (log_context) normalizer (endings envelope
                     ledger node_events verdict phases dbt_values) resume
                     measurements (error_types readings) span_mapping (span_attributes
                     span_texts) log_records otlp_encoding
                     assets (asset_schema) lineage (datasets duckdb_catalogs connection_words
                     node_options)
                     lineage_graph (lineage_find lineage_views lineage_drawings)
                     openlineage_mapping (openlineage openlineage_datasets openlineage_runs)
                     schema (schema_examples asyncapi)
    2 edges          nats_link (nats_connection nats_client nats_auth nats_errors) stored_message
                     streams
                     selection event_stream live_events consumer lease run_lease
                     (lease_renewal lease_keys)
                     store lineage_store (kv_bucket lineage_bucket write_behind) run_state
                     dead_letters outbox (outbox_file) publishers workspace artifacts
                     artifact_store (object_bucket) project_python duckdb_file
                     dbt_process (templates manifest_templates project_watch template
                     forked_process) sql_process
                     observers metrics (otel_sdk queue_depth) pulse http_port
    3 orchestration  execution (job attempt_events watchdog predecessor) asset_events (declared
                     build_columns) worker (claims slots queue_watch) rejection recovery
                     unknown_subjects stuck_requests control
    4 composition    daemon (telemetry gauges health) embedded local_run client verify_run
                     (verification) checks follow terminal screen tables fleet (fleet_screen)
                     logs commands dead_commands lineage_commands top_commands
                     cli (cli_dead cli_lineage cli_top cli_settings cli_words)
    –                dbt_child (stdlib and dbt only) and sql_child (sqlglot), processes of their
                     own; imported by nothing
"""

__version__ = "0.1.0"
