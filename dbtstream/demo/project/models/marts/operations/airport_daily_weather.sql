with flights as (

    select * from {{ ref('fct_flights') }}

),

weather as (

    select * from {{ ref('stg_weather') }}

),

weather_by_day as (

    select
        airport_code,
        cast(observed_at as date) as flight_date,
        min(temperature_f) as lowest_temperature_f,
        max(coalesce(gust_mph, wind_mph)) as strongest_wind_mph,
        round(sum(precipitation_in), 2) as precipitation_in,
        min(visibility_mi) as lowest_visibility_mi

    from weather
    group by 1, 2

),

flights_by_day as (

    select
        origin_code as airport_code,
        flight_date,
        count(*) as scheduled_flights,
        count(*) filter (where flight_status = 'cancelled') as cancelled_flights,
        round(avg(departure_delay_min), 1) as average_departure_delay_min

    from flights
    group by 1, 2

),

joined as (

    select
        flights_by_day.airport_code,
        flights_by_day.flight_date,
        weather_by_day.lowest_temperature_f,
        weather_by_day.strongest_wind_mph,
        weather_by_day.precipitation_in,
        weather_by_day.lowest_visibility_mi,
        flights_by_day.scheduled_flights,
        flights_by_day.cancelled_flights,
        flights_by_day.average_departure_delay_min

    from flights_by_day
    left join weather_by_day
        on
            flights_by_day.airport_code = weather_by_day.airport_code
            and flights_by_day.flight_date = weather_by_day.flight_date

)

select * from joined
