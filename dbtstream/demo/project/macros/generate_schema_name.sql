{#- Schemas are called what the project calls them (raw, staging, marts), without the target's name in front:
    each copy of this project has its own database file, so nobody else's tables can be in the way. -#}
{% macro generate_schema_name(custom_schema_name, node) -%}
    {{ custom_schema_name | trim if custom_schema_name else target.schema }}
{%- endmacro %}
