with source as (

    select * from {{ ref('raw_weather') }}

),

renamed as (

    select
        origin as airport_code,
        make_timestamp(year, month, day, hour, 0, 0) as observed_at,
        temp as temperature_f,

        -- Newark's station reported 1048 mph at three in the morning of the 12th. The strongest
        -- wind ever measured in the US was 231, so more than that is a broken reading.
        case when wind_speed <= 231 then wind_speed end as wind_mph,
        wind_gust as gust_mph,
        precip as precipitation_in,
        visib as visibility_mi

    from source

)

select * from renamed
