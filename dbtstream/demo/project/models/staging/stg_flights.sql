with source as (

    select * from {{ ref('raw_flights') }}

),

dated as (

    select
        *,
        make_date(year, month, day) as flight_date

    from source

),

renamed as (

    select
        -- No carrier uses one flight number twice from one airport on one day.
        concat_ws('-', flight_date, carrier, flight, origin) as flight_id,
        flight_date,

        -- The time of day comes as a number: 1530 is half past three.
        make_timestamp(
            year, month, day, sched_dep_time // 100, sched_dep_time % 100, 0
        ) as scheduled_departure_at,

        carrier as carrier_code,
        flight as flight_number,
        tailnum as tail_number,
        origin as origin_code,
        dest as destination_code,

        -- The raw data has no status: a flight that did not leave has no departure delay,
        -- one that landed elsewhere has no arrival delay.
        case
            when dep_delay is null then 'cancelled'
            when arr_delay is null then 'diverted'
            else 'completed'
        end as flight_status,

        dep_delay as departure_delay_min,
        arr_delay as arrival_delay_min,
        air_time as air_time_min,
        distance as distance_mi

    from dated

)

select * from renamed
