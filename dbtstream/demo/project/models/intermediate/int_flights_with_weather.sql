with flights as (

    select * from {{ ref('stg_flights') }}

),

weather as (

    select * from {{ ref('stg_weather') }}

),

joined as (

    select
        flights.*,
        weather.temperature_f,
        weather.wind_mph,
        weather.gust_mph,
        weather.precipitation_in,
        weather.visibility_mi

    from flights
    -- Left: a station that missed an hour must not cost us its flights.
    left join weather
        on
            flights.origin_code = weather.airport_code
            and date_trunc('hour', flights.scheduled_departure_at) = weather.observed_at

)

select * from joined
