{#- The seeds write the log as they are loaded. dbt cannot see that, so it is told to let them finish first. -#}
-- depends_on: {{ ref('raw_airlines') }}
-- depends_on: {{ ref('raw_airports') }}
-- depends_on: {{ ref('raw_flights') }}
-- depends_on: {{ ref('raw_planes') }}
-- depends_on: {{ ref('raw_weather') }}

with loads as (

    select * from {{ source('landing', 'load_log') }}

),

final as (

    select
        table_name,
        count(*) as loads,
        max(loaded_at) as last_loaded_at,
        arg_max(row_count, loaded_at) as row_count,
        arg_max(invocation_id, loaded_at) as invocation_id

    from loads
    group by 1

)

select * from final
