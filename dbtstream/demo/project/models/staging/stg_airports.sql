with source as (

    select * from {{ ref('raw_airports') }}

),

renamed as (

    select
        iata as airport_code,
        name as airport_name,
        city,
        state,
        latitude,
        longitude

    from source

)

select * from renamed
