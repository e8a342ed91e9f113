{% macro generate_schema_name(custom_schema_name, node) -%}
    {#- A model's schema is the one it names, without the target's in front: lake.staging, lake.modeled. -#}
    {{ (custom_schema_name or target.schema) | trim }}
{%- endmacro %}
