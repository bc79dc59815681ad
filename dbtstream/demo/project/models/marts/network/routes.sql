with flights as (

    select * from {{ ref('fct_flights') }}

),

airports as (

    select * from {{ ref('dim_airports') }}

),

planes as (

    select * from {{ ref('dim_planes') }}

),

by_route as (

    select
        flights.origin_code,
        flights.destination_code,
        max(flights.distance_mi) as distance_mi,
        count(distinct flights.carrier_code) as carriers,
        count(*) as scheduled_flights,
        count(*) filter (where flights.flight_status = 'completed') as completed_flights,
        median(flights.air_time_min) as median_air_time_min,

        -- Only of the planes that the registry knows, so a floor, not the number of seats sold.
        sum(planes.seats) filter (where flights.flight_status = 'completed') as known_seats_flown

    from flights
    left join planes
        on flights.tail_number = planes.tail_number
    group by 1, 2

),

final as (

    select
        by_route.origin_code || '-' || by_route.destination_code as route,
        by_route.origin_code,
        by_route.destination_code,
        airports.city as destination_city,
        airports.state as destination_state,
        by_route.distance_mi,
        by_route.carriers,
        by_route.scheduled_flights,
        by_route.completed_flights,
        by_route.median_air_time_min,
        by_route.known_seats_flown

    from by_route
    left join airports
        on by_route.destination_code = airports.airport_code

)

select * from final
