{% snapshot planes_snapshot %}

{#- The block form and target_schema: dbt 1.8 knows no other. Raw rows, so that a change in staging is not history. -#}
{{
    config(
        target_schema='snapshots',
        unique_key='tailnum',
        strategy='check',
        check_cols=['year', 'manufacturer', 'model', 'engines', 'seats', 'engine']
    )
}}

select * from {{ ref('raw_planes') }}

{% endsnapshot %}
