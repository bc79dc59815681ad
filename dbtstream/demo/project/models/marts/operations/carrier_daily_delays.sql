with flights as (

    select * from {{ ref('fct_flights') }}

),

airlines as (

    select * from {{ ref('stg_airlines') }}

),

daily as (

    select
        carrier_code,
        flight_date,
        count(*) as scheduled_flights,
        count(*) filter (where flight_status = 'cancelled') as cancelled_flights,
        count(*) filter (where flight_status = 'diverted') as diverted_flights,
        count(*) filter (where arrival_delay_min >= {{ var('late_minutes') }}) as late_flights,

        -- Of completed flights only: the others have no arrival delay, and counting them as zero would flatter.
        round(avg(arrival_delay_min), 1) as average_arrival_delay_min

    from flights
    group by 1, 2

),

named as (

    select
        daily.flight_date,
        daily.carrier_code,
        airlines.carrier_name,
        daily.scheduled_flights,
        daily.cancelled_flights,
        daily.diverted_flights,
        daily.late_flights,
        daily.average_arrival_delay_min

    from daily
    left join airlines
        on daily.carrier_code = airlines.carrier_code

)

select * from named
