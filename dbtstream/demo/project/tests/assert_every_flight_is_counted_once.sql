-- A join that drops or doubles flights shows here first. Fails with the days on which the sums differ.

with flights as (

    select
        flight_date,
        count(*) as flights

    from {{ ref('fct_flights') }}
    group by 1

),

counted as (

    select
        flight_date,
        sum(scheduled_flights) as flights

    from {{ ref('carrier_daily_delays') }}
    group by 1

)

select
    coalesce(flights.flight_date, counted.flight_date) as flight_date,
    flights.flights as flights,
    counted.flights as counted

from flights
full outer join counted
    on flights.flight_date = counted.flight_date
where flights.flights is distinct from counted.flights
