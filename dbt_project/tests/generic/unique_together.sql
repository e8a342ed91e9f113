{% test unique_together(model, columns) %}
    {#- Groups of rows that agree in all of `columns`. -#}
    select {{ columns | join(', ') }}, count(*) as row_count
    from {{ model }}
    group by {{ columns | join(', ') }}
    having count(*) > 1
{% endtest %}
