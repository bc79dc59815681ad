with airports as (

    select * from {{ ref('stg_airports') }}

),

flights as (

    select * from {{ ref('stg_flights') }}

),

origins as (

    select distinct origin_code as airport_code from flights

),

final as (

    select
        airports.airport_code,
        airports.airport_name,
        airports.city,
        airports.state,
        airports.latitude,
        airports.longitude,
        origins.airport_code is not null as is_origin

    from airports
    left join origins
        on airports.airport_code = origins.airport_code

)

select * from final
