{#- The flights are from 2013, so how fresh they are says nothing. What can be fresh or stale is the load:
    every seed writes a line here when it has been loaded, and the source `landing.load_log` watches them. -#}

{% macro create_load_log() %}
    {#- The schema too: dbt makes the schemas of what is selected only, and that may be no seed. #}
    create schema if not exists raw;
    create table if not exists raw.load_log (
        table_name varchar not null,
        row_count bigint not null,
        invocation_id varchar not null,
        loaded_at timestamp with time zone not null
    );
{% endmacro %}

{% macro record_load(relation) %}
    insert into raw.load_log
    select
        '{{ relation.identifier }}' as table_name,
        count(*) as row_count,
        '{{ invocation_id }}' as invocation_id,
        {{ dbt.current_timestamp() }} as loaded_at
    from {{ relation }}
{% endmacro %}
