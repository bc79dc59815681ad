{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='flight_id'
    )
}}

with flights as (

    select * from {{ ref('int_flights_with_weather') }}

)

select * from flights

{% if is_incremental() %}

    -- The newest day we have is taken again: its last flights are reported late.
    -- An empty table has no newest day (`dbt build --empty` leaves one) and takes everything.
    where flight_date >= (select coalesce(max(flight_date), date '1900-01-01') from {{ this }})

{% endif %}
