with history as (

    select * from {{ ref('planes_snapshot') }}

),

planes as (

    select * from {{ ref('stg_planes') }}

),

versions as (

    select
        tailnum as tail_number,
        count(*) as known_versions,
        max(dbt_valid_from) as unchanged_since

    from history
    group by 1

),

final as (

    select
        planes.tail_number,
        planes.manufacturer,
        planes.model,
        planes.engine_type,
        planes.engines,
        planes.seats,
        planes.built_in,
        versions.known_versions,
        versions.unchanged_since

    from planes
    left join versions
        on planes.tail_number = versions.tail_number

)

select * from final
