with source as (

    select * from {{ ref('raw_planes') }}

),

renamed as (

    select
        tailnum as tail_number,
        year as built_in,
        manufacturer,
        model,
        engines,
        seats,
        lower(engine) as engine_type

    from source

)

select * from renamed
